"""Find the linear layers of a model and put others in their place."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Container, Iterable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from ..errors import CheckpointError, UsageError
from .experts import expert_layer, expert_of, fuse
from .factored_linear import FactoredLinear, FrozenSum
from .quantized_linear import CastLinear, QuantizedLinear, ZeroLinear

SHARED = "shares its weight with"  # why a layer is left alone; the other's name follows

# nn.MultiheadAttention multiplies by the weight of its output layer, a class that nothing else uses, and never calls it
_NOT_LAYERS = (QuantizedLinear, CastLinear, ZeroLinear, FrozenSum, NonDynamicallyQuantizableLinear)

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plain_model(model: nn.Module) -> PreTrainedModel:
    """Without adapters: what peft's model is asked for; it need not be imported for that."""
    base = getattr(model, "get_base_model", None)
    return cast("PreTrainedModel", model if base is None else base())


def check_plain(model: nn.Module) -> None:
    """Whether the keys of a model with an adapter on it would be found again."""
    for name, module in model.named_modules():
        inside = type(module).__module__.startswith(("peft.", "lord_tune.adapters."))
        if inside or (isinstance(module, FactoredLinear) and module.host is not None):
            raise UsageError(
                f"'{name}' has an adapter on it, so the base model alone would be saved under keys that cannot be "
                "loaded; save the PEFT model (its adapter), or what lord_tune.fold or its unload returns."
            )


def is_linear(module: nn.Module) -> bool:
    """A plain dense linear layer: `nn.Linear`, a subclass that computes the same from weight and bias, or Conv1D."""
    if type(module) is nn.Linear or isinstance(module, Conv1D):
        return True
    if not isinstance(module, nn.Linear) or isinstance(module, _NOT_LAYERS):
        return False
    weight = module._parameters.get("weight")
    known = module._parameters.keys() == {"weight", "bias"} and not module._modules and not module._buffers
    return known and type(weight) is nn.Parameter and weight.is_floating_point() and _computes_linear(module)


def _computes_linear(module: nn.Linear) -> bool:
    """Whether a small copy of the module gives x W^T + b: its class may do anything with its weight (routers return
    tuples, quantized layers round their input)."""
    if type(module).__call__ is not nn.Module.__call__:
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    inputs, outputs = 7, 5  # prime, so that parts of an input are not taken for whole ones
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64)

    copied = object.__new__(type(module))
    copied.__dict__ = {key: value for key, value in module.__dict__.items() if key != "forward"}
    weight, bias = drawn(outputs, inputs), None if module.bias is None else drawn(outputs)
    copied._parameters = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    copied._forward_hooks, copied._forward_pre_hooks = OrderedDict(), OrderedDict()
    copied.in_features, copied.out_features, copied.training = inputs, outputs, False
    for x in (drawn(3, inputs), drawn(2, 3, inputs)):
        try:
            with torch.no_grad(), torch.device("cpu"):
                found = copied(x)
        except Exception:  # a class of another library may fail in any way
            return False
        wanted = nn.functional.linear(x, weight, bias)
        if not isinstance(found, Tensor) or found.shape != wanted.shape:
            return False
        if not torch.allclose(found.double(), wanted, rtol=1e-5, atol=1e-5):  # it may compute in float32
            return False
    return True


def weight_of(module: nn.Module) -> Tensor:
    """The weight as (out, in)."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_transposed(module) else weight


def bias_of(module: nn.Module) -> Tensor | None:
    """(out,)"""
    return module._parameters["bias"]


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored as (in, out)."""
    return isinstance(module, Conv1D)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in)"""
    weight = weight_of(module)
    return weight.shape[0], weight.shape[1]


def select_linears(
    model: PreTrainedModel,
    prefixes: Iterable[str],  # module paths of the blocks; "" is the whole model
    targets: str | None,
    exclude: str | None,
    computed_with: Container[str] = (),  # layers whose weights the model's own code computes with
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers to decompose, by name, and why each other linear layer is left alone.

    `targets` and `exclude` are regular expressions searched in the full module name. The output head and layers that
    share a weight with another module are never taken: losses multiply by the head's weight directly.
    """
    include, leave = _pattern("`targets`", targets), _pattern("`exclude`", exclude)
    prefixes = tuple(prefixes)
    embeddings = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    linears = {name: m for name, m in model.named_modules() if is_linear(m)}
    shared = _shared_weights(model)
    if not linears and any(isinstance(m, FactoredLinear) for m in model.modules()):
        raise UsageError("The model is decomposed already; start from the original dense model.")
    for name, module in linears.items():
        if id(module.weight) in embeddings:
            skipped[name] = "output head or tied embedding"
        elif not any(prefix == "" or name.startswith(prefix + ".") for prefix in prefixes):
            skipped[name] = "outside the blocks"
        elif include is not None and not include.search(name):
            skipped[name] = "not in targets"
        elif leave is not None and leave.search(name):
            skipped[name] = "in exclude"
        elif name in shared:
            skipped[name] = f"{SHARED} {shared[name]}"
        elif name in computed_with:
            skipped[name] = "the model's own code computes with its weight"
        else:
            chosen[name] = module
    if not chosen:
        names = ", ".join(list(linears)[:4])
        raise UsageError(
            f"No layer matches (`targets` {targets!r}, `exclude` {exclude!r}); the {len(linears)} linear layers "
            f"are named like {names or '(none: no nn.Linear or Conv1D)'}."
        )
    return chosen, skipped


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """Module -> another one with the same weight: by the tensor, or, where each has its own on the meta device, by the
    list that transformers keeps."""
    holders: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            holders.setdefault(id(weight), []).append(name)
    found: dict[str, str] = {}
    for names in holders.values():
        found |= {name: names[1 if name == names[0] else 0] for name in names if len(names) > 1}
    for target, origin in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target.endswith(".weight") and origin.endswith(".weight"):
            one, other = target.removesuffix(".weight"), origin.removesuffix(".weight")
            found = {one: other, other: one} | found
    return found


def _pattern(option: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(text) if text else None
    except re.error as error:
        raise UsageError(f"{option} {text!r} is not a regular expression ({error}); correct it.") from error


def fused_parameters(model: nn.Module) -> dict[str, Tensor]:
    """3-D parameters that hold the weights of several linear maps, as the experts of a mixture do in transformers 5."""
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d)
    return {
        f"{name}.{key}" if name else key: parameter
        for name, module in model.named_modules()
        if not isinstance(module, convolutions)
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def check_finite(model: nn.Module) -> None:
    """CheckpointError naming the first tensor in memory that holds NaN or Inf."""
    for name, tensor in model.named_parameters():
        if tensor.is_meta or not tensor.is_floating_point():
            continue
        values = tensor.detach()
        # NaN and Inf show in the extremes, which take one pass and no memory: this is asked at every block
        if values.numel() and not torch.isfinite(torch.stack(torch.aminmax(values))).all():
            bad = int((~torch.isfinite(values)).sum())
            raise CheckpointError(f"'{name}' holds {bad} NaN or Inf values; repair the checkpoint.")


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """The decomposed layers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


def densify(model: nn.Module, dtype: torch.dtype | None = None, names: Collection[str] | None = None) -> None:
    """Replace every factored layer by the dense layer it stands for, in the class the original had, in place; experts
    become 3-D parameters again.

    The weight takes `dtype`, by default float32. names: of the layers to replace, with all experts of a 3-D parameter
    or none of them; default all.
    """
    layers = factored_layers(model)
    for name in layers if names is None else names:
        layer = layers[name]
        weight = layer.dense_weight(dtype or torch.float32)
        if expert_of(name) is not None:
            weight = weight.T.contiguous() if layer.plan.conv1d else weight
            bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
            frozen = nn.Parameter(weight, requires_grad=False)
            model.set_submodule(name, expert_layer(frozen, layer.plan.conv1d, bias))
            continue
        if layer.plan.conv1d:
            with torch.device("meta"):
                dense: nn.Module = Conv1D(layer.out_features, layer.in_features)
            weight = weight.T.contiguous()
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        dense.weight = nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            dense.bias = nn.Parameter(layer.bias.detach().to(weight.dtype), requires_grad=False)
        elif layer.plan.conv1d:  # a Conv1D always has a bias
            dense.bias = nn.Parameter(weight.new_zeros(layer.out_features), requires_grad=False)
        model.set_submodule(name, dense)
    fuse(model, None if names is None else {part[0] for name in names if (part := expert_of(name)) is not None})
