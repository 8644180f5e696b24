"""Experts of a mixture as ordinary linear layers.

transformers keeps the experts of a block in 3-D parameters, (expert, out, in) or transposed (expert, in, out), of a
module whose class is decorated with `use_experts_implementation`. The decoration says how the module computes (gate,
biases, norm, transposed or not), so no architecture is named here. `unfuse` replaces such a parameter, like
`mlp.experts.down_proj`, by one linear layer per expert, `mlp.experts.unfused.down_proj.3`: every expert has its own
statistics, rank and format, and hooks, adapters, folding and counting find a module as everywhere else. `fuse` undoes
it. What is given up: the kernels that run all experts at once.

Whoever looks at the parameter still finds it, made of the experts' weights when something computes with it; files have
a sentinel under its name (sentinels.py). The layers do not stand under `mlp.experts.3.down_proj`, as in many original
checkpoints, because transformers' converters would match these names and fuse them again.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import UsageError
from ..kept import Standin
from .quantized_linear import NO_WRITING

_CONTAINER = "unfused"
_FUSED = ("gate_up_proj", "up_proj", "down_proj")  # the names that the decoration knows
_DECLARED = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")
_NAME = re.compile(rf"^(?P<path>.+)\.{_CONTAINER}\.(?P<leaf>\w+)\.(?P<expert>\d+)(?P<weight>\.weight)?$")


class TransposedLinear(Conv1D):
    """A linear layer without bias whose weight is (in, out)."""

    def __init__(self, weight: nn.Parameter):  # (in, out)
        nn.Module.__init__(self)
        self.nx, self.nf = weight.shape
        self.weight = weight
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:  # (token, in) -> (token, out)
        return x @ self.weight


class UnfusedExperts(nn.Module):
    """The forward of a decorated module of which some parameters are unfused: the operations of transformers' own loop
    over the experts, in the same order."""

    unfused: nn.ModuleDict  # parameter -> its layers
    fused_class: ClassVar[type[nn.Module]]
    # what the decoration declares
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool
    act_fn: Callable[[Tensor], Tensor]
    post_expert_norm: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        unfused = self._modules.get(_CONTAINER)
        if not isinstance(unfused, nn.ModuleDict) or name not in unfused:
            return super().__getattr__(name)
        weights = [cast("Tensor", layer.weight) for layer in unfused[name].children()]
        first = weights[0]
        return Standin(
            (len(weights), *first.shape), first.dtype, first.device, lambda: torch.stack(weights), NO_WRITING
        )

    def _load_from_state_dict(
        self,
        state_dict: dict[str, object],
        prefix: str,
        metadata: dict[str, object],
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for leaf in self.unfused:
            if f"{prefix}{leaf}" in unexpected:  # a sentinel of a file
                unexpected.remove(f"{prefix}{leaf}")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        # (token, in), (token, k), (token, k) -> (token, in)
        output = torch.zeros_like(hidden_states)
        for expert, tokens, positions in _routed(top_k_index, len(self.layers(next(iter(self.unfused))))):
            x = self._project("gate_up_proj" if self.has_gate else "up_proj", expert, hidden_states[tokens])
            x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
            x = self._project("down_proj", expert, x)
            if self.has_post_expert_norm:
                x = self.post_expert_norm(x)
            x = x * top_k_weights[tokens, positions, None]
            output.index_add_(0, tokens, x.to(output.dtype))
        return output

    def _project(self, leaf: str, expert: int, x: Tensor) -> Tensor:
        output: Tensor
        if leaf in self.unfused:
            output = self.layers(leaf)[expert](x)
        else:
            weight = self._fused(leaf)[expert]
            output = x @ weight if self.is_transposed else nn.functional.linear(x, weight)
        return output + self._fused(f"{leaf}_bias")[expert] if self.has_bias else output

    def layers(self, leaf: str) -> nn.ModuleList:
        """Those that a parameter was replaced by, one per expert."""
        found = self.unfused[leaf]
        assert isinstance(found, nn.ModuleList)
        return found

    def _fused(self, name: str) -> Tensor:
        parameter = self._parameters[name]
        assert parameter is not None
        return parameter


def _routed(chosen: Tensor, experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, which of their choices it is) of every expert that was chosen; `chosen` is (token, k).

    Shapes alone (the meta device) do not say who was chosen: there, all experts get an equal share.
    """
    flat = chosen.T.reshape(-1)  # first choices first: the order that transformers' loop adds up in
    order = flat.argsort(stable=True)
    if chosen.is_meta:
        sizes = [max(1, len(flat) // experts)] * experts
    else:  # the only wait for the device; a number past the last expert stands for another process's expert
        sizes = torch.bincount(flat, minlength=experts)[:experts].tolist()
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            rows = order[:size] if chosen.is_meta else order[start : start + size]
            yield expert, rows % len(chosen), rows // len(chosen)
        start += size


@functools.cache
def _with_own_forward(kind: type[nn.Module]) -> type[UnfusedExperts]:
    """A subclass under the same name, by which FSDP and transformers find a class."""
    own = type(kind.__name__, (UnfusedExperts, kind), {"__module__": kind.__module__, "fused_class": kind})
    return cast(type[UnfusedExperts], own)


def _unfusable(module: nn.Module) -> list[str]:
    """The names of the parameters of a decorated module that can be unfused."""
    if not all(hasattr(module, name) for name in _DECLARED):
        return []
    parameters = {leaf: module._parameters.get(leaf) for leaf in _FUSED}
    return [leaf for leaf, parameter in parameters.items() if parameter is not None and parameter.dim() == 3]


def unfuse(model: nn.Module, names: Iterable[str] | None = None) -> list[str]:
    """Give each expert its own layers, in place; returns the names of the parameters that were replaced. `names`: of
    the parameters, by default all that can be. The layers share the parameter's memory."""
    wanted = None if names is None else set(names)
    done = []
    for path, module in list(model.named_modules()):
        for leaf in _unfusable(module):
            name = f"{path}.{leaf}" if path else leaf
            if wanted is None or name in wanted:
                _unfuse_one(module, leaf)
                done.append(name)
    return done


def _unfuse_one(module: nn.Module, leaf: str) -> None:
    fused = module.get_parameter(leaf)
    parts = fused.detach().unbind()
    if fused.is_meta:  # views there have addresses, by which they would be taken for one tensor
        parts = tuple(part.clone() for part in parts)
    weights = [nn.Parameter(part, requires_grad=fused.requires_grad) for part in parts]
    if not isinstance(module, UnfusedExperts):
        module.unfused = nn.ModuleDict()
        module.__class__ = _with_own_forward(type(module))  # type: ignore[arg-type]  # mypy doubts classes' hashes
        module.__dict__.pop("forward", None)  # accelerate leaves one on the instance when its hooks are removed
    assert isinstance(module, UnfusedExperts)
    module.unfused[leaf] = nn.ModuleList(expert_layer(weight, module.is_transposed) for weight in weights)
    module._parameters[leaf] = None  # keeps its place


def expert_layer(weight: nn.Parameter, transposed: bool, bias: nn.Parameter | None = None) -> nn.Module:
    """One expert's layer; the weight is (out, in), or (in, out) if transposed."""
    if transposed:
        layer: nn.Module = TransposedLinear(weight)
    else:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


def fuse(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Put dense experts back into the 3-D parameters `names` (default all), in place.

    Raises UsageError where an expert got a bias that the model has no place for.
    """
    wanted = None if names is None else set(names)
    for path, module in list(model.named_modules()):
        if isinstance(module, UnfusedExperts):
            for leaf in list(module.unfused):
                if wanted is None or f"{path}.{leaf}" in wanted:
                    _fuse_one(path, module, leaf)


def fuse_untouched(model: nn.Module, chosen: Iterable[str], skipped: dict[str, str]) -> dict[str, str]:
    """Put back the parameters none of whose experts is among the layers `chosen`, in place; returns `skipped` with the
    parameter in place of its experts."""
    touched = {part[0] for name in chosen if (part := expert_of(name)) is not None}
    whole = [name for name in unfused_parameters(model) if name not in touched]
    fuse(model, whole)
    found: dict[str, str] = {}
    for name, reason in skipped.items():
        part = expert_of(name)
        found[part[0] if part is not None and part[0] in whole else name] = reason
    return found


def _fuse_one(path: str, module: UnfusedExperts, leaf: str) -> None:
    layers = module.layers(leaf)
    parts = [layer.get_parameter("weight") for layer in layers]
    dtype = functools.reduce(torch.promote_types, [part.dtype for part in parts])
    biases = module._parameters.get(f"{leaf}_bias")
    for expert, layer in enumerate(layers):
        bias = layer._parameters["bias"]
        if bias is None:
            continue
        if biases is None:
            raise UsageError(
                f"'{path}.{_CONTAINER}.{leaf}.{expert}' carries a bias (method afm), for which the model has no place, "
                "so a dense checkpoint would lose it; export with `format` factored, or decompose with `method` "
                "whitened."
            )
        with torch.no_grad():
            biases[expert] += bias.to(biases)
    weights = torch.stack([part.detach().to(dtype) for part in parts])
    module._parameters[leaf] = nn.Parameter(weights, requires_grad=parts[0].requires_grad)
    del module.unfused[leaf]
    if not module.unfused:
        del module.unfused
        module.__class__ = type(module).fused_class  # type: ignore[assignment]


def unfused_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters whose experts are layers of their own."""
    return [
        f"{path}.{leaf}"
        for path, module in model.named_modules()
        if isinstance(module, UnfusedExperts)
        for leaf in module.unfused
    ]


def expert_of(name: str) -> tuple[str, int] | None:
    """The fused parameter that an expert's layer, or its weight, is a part of, and which part; None for others."""
    found = _NAME.match(name)
    return None if found is None else (f"{found['path']}.{found['leaf']}", int(found["expert"]))


def container_of(fused: str) -> str:
    """The module that holds the layers of the experts of a parameter; the other way round than `expert_of`."""
    path, _, leaf = fused.rpartition(".")
    return f"{path}.{_CONTAINER}.{leaf}"
