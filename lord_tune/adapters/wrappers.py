"""PEFT's LoRA layer in the two places where a decomposed layer needs one of its own.

`HostLora` holds all of L and R (modes factors and split), and is a difference to everything PEFT does with adapters:

    W = Q + L0 R0 + sum_a s_a (B_a A_a - L0 R0),   L0 R0 what the layer started from, s_a the scaling of adapter a

With one adapter at scaling 1 that is Q + B A, and computed as that. Without one, or in a row named `__base__`, it is
the decomposed layer; several adapters add up; a scaling of 0.5 is halfway. A new adapter starts as no difference.

`BasisLora` (mode basis) learns the size s = w^2 of each component of L R, and new components B A (adapters/basis.py).
As a difference to the decomposed model, with s0 the sizes it started from:

    W = Q + L diag(1 + sum_a c_a (s_a / s0 - 1)) R + sum_a c_a B_a A_a,   c_a the scaling of adapter a

`LayerLora` is LoRA around a whole decomposed layer, W + s B A, for the targets that a configuration for the original
model names (`q_proj`, `all-linear`): its keys are those of an adapter of the original.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import UsageError
from ..layers import FactoredLinear, FrozenBasis, dense_factor
from .route import Start, active_in, around, base_of, start_of, trained_start

NOT_MERGED = "PEFT's merge would write into stored parts; use lord_tune.merge or lord_tune.fold, which are exact."


def _matrix(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


class HostLora(lora.Linear):
    """See the top. `start` is set when the first adapter is attached (injection.py)."""

    start: Start | None = None

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        self.fill(adapter_name)

    def fill(self, adapter_name: str) -> None:
        """No difference: B A = L0 R0."""
        if self.start is None or adapter_name not in self.lora_A or self.lora_A[adapter_name].weight.is_meta:
            return
        left, right = trained_start(self.start, _matrix(self.lora_A[adapter_name]).device)
        for matrices, value in ((self.lora_A, right), (self.lora_B, left)):
            trains = _matrix(matrices[adapter_name]).requires_grad
            matrices[adapter_name].weight = nn.Parameter(value, requires_grad=trains)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # (..., in) -> (..., out)
        self._check_forward_args(x, *args, **kwargs)
        names = kwargs.get("adapter_names")
        if names is None or self.disable_adapters:
            return self._with(x, active_in(self))
        found: Tensor | None = None
        for name in dict.fromkeys(names):
            rows = [row for row, wanted in enumerate(names) if wanted == name]
            part = self._with(x[rows], (name,) if name in self.lora_A else ())
            found = part.new_empty(len(names), *part.shape[1:]) if found is None else found
            found = found.index_copy(0, torch.tensor(rows, device=part.device), part)
        assert found is not None, "the lengths were compared"
        return found

    def _with(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        """W x with these adapters; L0 R0 is read only where it counts."""
        base, rest = base_of(self), 1 - sum(self.scaling[name] for name in names)
        if not names:
            return self._started(x)
        output = base(x)
        dtype = output.dtype
        if rest and self.start is not None:
            left, right = (value.to(x.dtype) for value in start_of(self.start, x.device))
            output = output + rest * linear(linear(x, right), left)
        for name in names:
            a, b = self.lora_A[name], self.lora_B[name]
            seen = self._cast_input_dtype(x, _matrix(a).dtype)
            output = output + b(a(self.lora_dropout[name](seen))) * self.scaling[name]
        return output.to(dtype)

    def _started(self, x: Tensor) -> Tensor:
        assert self.start is not None
        return around(base_of(self), *start_of(self.start, x.device))(x)

    def get_delta_weight(self, adapter: str) -> Tensor:  # (out, in)
        assert self.start is not None
        left, right = _matrix(self.lora_B[adapter]), _matrix(self.lora_A[adapter])
        start_left, start_right = (value.to(left.dtype) for value in start_of(self.start, left.device))
        return self.scaling[adapter] * (left @ right - start_left @ start_right)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False  # the converted one would be an ordinary LoRA on the host, which holds no L0 R0

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(NOT_MERGED)


class BasisLora(HostLora):
    """See the top. `lora_basis` holds w (rank,); a w of 0 stays 0 by its gradient, 2 w: that is a pruned component."""

    adapter_layer_names: tuple[str, ...] = (*lora.Linear.adapter_layer_names, "lora_basis")

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not hasattr(self, "lora_basis"):
            self.lora_basis = nn.ParameterDict()
        super().update_layer(adapter_name, *args, **kwargs)

    def fill(self, adapter_name: str) -> None:
        """No difference: s = s0, B = 0, and A of normal numbers / sqrt(k)."""
        base, (a, b) = base_of(self), (_matrix(m[adapter_name]) for m in (self.lora_A, self.lora_B))
        assert isinstance(base, FrozenBasis)
        drawn = torch.randn(a.shape, device=a.device) / len(a) ** 0.5
        started = base.sizes.to(a.device).sqrt()
        for matrices, value in ((self.lora_A, drawn), (self.lora_B, torch.zeros(b.shape, device=a.device))):
            matrices[adapter_name].weight = nn.Parameter(value, requires_grad=a.requires_grad)
        self.lora_basis[adapter_name] = nn.Parameter(started, requires_grad=a.requires_grad)

    def scale(self, names: tuple[str, ...]) -> Tensor:  # (rank,)
        """What each component of L R is multiplied by."""
        base = base_of(self)
        assert isinstance(base, FrozenBasis)
        sizes = torch.where(base.sizes > 0, base.sizes, 1.0)
        ratios = [self.lora_basis[name].square() / sizes for name in names]
        if len(names) == 1 and self.scaling[names[0]] == 1:
            return ratios[0]
        found = torch.ones_like(sizes)
        for name, ratio in zip(names, ratios, strict=True):
            found = found + self.scaling[name] * (ratio - 1)
        return found

    def _with(self, x: Tensor, names: tuple[str, ...]) -> Tensor:
        base = base_of(self)
        if not names:
            return base(x)
        output: Tensor = base(x, self.scale(names))
        dtype = output.dtype
        for name in names:
            a, b = self.lora_A[name], self.lora_B[name]
            seen = self._cast_input_dtype(x, _matrix(a).dtype)
            output = output + b(a(self.lora_dropout[name](seen))) * self.scaling[name]
        return output.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:  # (out, in)
        base = base_of(self)
        assert isinstance(base, FrozenBasis)
        left, right = (dense_factor(factor).float() for factor in (base.left, base.right))
        new = _matrix(self.lora_B[adapter]) @ _matrix(self.lora_A[adapter])
        return left * (self.scale((adapter,)) - 1) @ right + self.scaling[adapter] * new


class LayerLora(lora.Linear):
    """See the top."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, **kwargs)
        layer = self.get_base_layer()
        assert isinstance(layer, FactoredLinear)
        self.fan_in_fan_out = layer.plan.conv1d

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, FactoredLinear)
        return module.in_features, module.out_features

    def merge(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError(NOT_MERGED)
