"""PEFT's LoRA layer in the two places where a decomposed layer needs one of its own.

`HostLora` holds all of L and R (modes factors and split), and is a difference to everything PEFT does with adapters:

    W = Q + L0 R0 + sum_a s_a (B_a A_a - L0 R0),   L0 R0 what the layer started from, s_a the scaling of adapter a

With one adapter at scaling 1 that is Q + B A, and computed as that. Without one, or in a row named `__base__`, it is
the decomposed layer; several adapters add up; a scaling of 0.5 is halfway. A new adapter starts as no difference.

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
from ..layers import FactoredLinear
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
