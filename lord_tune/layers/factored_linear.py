"""The one runtime layer: y = L (R x) + Q x + bias."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..factorizations import Factors
from ..layer_plan import DTYPES, LayerPlan, make_quantizer
from .quantized_linear import CastLinear, QuantizedLinear


class FactoredLinear(nn.Module):
    """A linear layer with weight W = Q + L R, children `left` (L), `right` (R) and, unless absent, `backbone` (Q).

    While PEFT trains the factors themselves, they live in the LoRA layer around the child `host` (which then holds the
    backbone or nothing) and `left`, `right`, `backbone` are None; see integrations/peft_adapters.py.

    The parameter `weight` is a sentinel of shape (0,) under the key of the original weight. Without it, transformers
    without lord_tune would load the checkpoint as a model with random weights and only log a line; with it, it raises.
    """

    def __init__(self, plan: LayerPlan, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.plan = plan
        self.out_features, self.in_features = plan.shape
        self._is_hf_initialized = True
        self.weight = nn.Parameter(torch.zeros(0, dtype=torch.uint8, device=device), requires_grad=False)
        bias = torch.zeros(self.out_features, device=device, dtype=dtype) if plan.bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.right: Any = _factor(self.in_features, plan.rank, plan.right_format, plan.factor_options, device)
        self.left: Any = _factor(plan.rank, self.out_features, plan.left_format, plan.factor_options, device)
        self.backbone: Any = None
        if plan.backbone != "none":
            quantizer = make_quantizer(plan.backbone, plan.backbone_options)
            self.backbone = QuantizedLinear(self.in_features, self.out_features, quantizer, device)
        self.host: Any = None

    @property
    def rank(self) -> int:
        return self.plan.rank

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if self.host is not None:
            output = self.host(x)
        else:
            output = self.left(self.right(x))
            if self.backbone is not None:
                output = output + self.backbone(x)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W = Q + L R, summed in float64. (out, in)"""
        total = dense_factor(self.left) @ dense_factor(self.right)
        if self.backbone is not None:
            total = total + self.backbone.dequantize(torch.float64)
        return total.to(dtype)

    def set_factors(self, left: Tensor, right: Tensor) -> None:
        """Store L (out, rank) and R (rank, in) in the formats of the plan."""
        store_factor(self.left, left)
        store_factor(self.right, right)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.rank} -> {self.out_features}, backbone={self.plan.backbone}"


def _factor(
    in_features: int, out_features: int, form: str, options: dict, device: torch.device | str | None
) -> nn.Linear:
    if form in DTYPES:
        return CastLinear(in_features, out_features, DTYPES[form], device)
    return QuantizedLinear(in_features, out_features, make_quantizer(form, options), device)


def dense_factor(factor: nn.Linear) -> Tensor:
    """The matrix a factor module stands for, float64."""
    return factor.dequantize(torch.float64) if isinstance(factor, QuantizedLinear) else factor.weight.detach().double()


def store_factor(module: nn.Linear, value: Tensor) -> None:
    """Write a matrix into a factor module in the module's own format."""
    if isinstance(module, QuantizedLinear):
        module.set_parts(module.quantizer.quantize(value))
    else:
        module.weight = nn.Parameter(value.to(module.weight.dtype).contiguous(), requires_grad=False)


def build_layer(
    plan: LayerPlan, factors: Factors, parts: dict[str, Tensor] | None, bias: Tensor | None, dtype: torch.dtype
) -> FactoredLinear:
    """A filled FactoredLinear; `bias` is the original layer's, to which the method's shift is added; `dtype` is that of
    the original weight, which a reload gives to the bias."""
    layer = FactoredLinear(plan, device="meta")
    sentinel = torch.zeros(0, dtype=torch.uint8, device=factors.left.device)
    layer.weight = nn.Parameter(sentinel, requires_grad=False)
    layer.set_factors(factors.left, factors.right)
    for module, stored in ((layer.left, factors.left_parts), (layer.right, factors.right_parts)):
        if stored is not None:  # rounded by the method: rounding the decoded values again may change the scales
            module.set_parts(stored)
    if parts is not None:
        layer.backbone.set_parts(parts)
    if plan.bias:
        shift = 0.0 if factors.bias_shift is None else factors.bias_shift
        start = torch.zeros(plan.shape[0], dtype=torch.float64) if bias is None else bias.detach().double()
        layer.bias = nn.Parameter((start.to(factors.left.device) + shift).to(dtype), requires_grad=False)
    return layer
