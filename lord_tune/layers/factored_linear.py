"""The one runtime layer: y = L (R x) + Q x + bias, L and R in up to two formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..declared import PIVOTED, Options
from ..errors import UsageError
from ..factorizations import Factors, others_of, pivoted
from ..kept import Standin
from ..plans import LayerPlan
from ..quantizers import DTYPES, make_quantizer
from .pivoted_linear import PivotedLinear
from .quantized_linear import NO_WRITING, CastLinear, QuantizedLinear


class Parts(NamedTuple):
    """The modules a factored layer is the sum of. Q comes before the components apart: with these as the adapter (mode
    split) the sum is taken in the same order, so the two are equal to the last bit."""

    left: nn.Module  # L, (..., rank) -> (..., out)
    right: nn.Module  # R, (..., in) -> (..., rank)
    backbone: nn.Module | None = None  # Q
    top_left: nn.Module | None = None  # the first components, stored apart
    top_right: nn.Module | None = None

    def __call__(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        output: Tensor = self.left(self.right(x))
        if self.backbone is not None:
            output = output + self.backbone(x)
        if self.top_left is not None and self.top_right is not None:
            output = output + self.top_left(self.top_right(x))
        return output


class FactoredLinear(nn.Module):
    """A linear layer with weight W = Q + L R, children `left` (L), `right` (R) and, unless absent, `backbone` (Q).

    Where the first components are stored apart, `left` and `right` hold the others, `top_left` and `top_right` these.
    Of the pivoted form, `right` is B and `left` a PivotedLinear.
    While PEFT trains the factors themselves, they live in the LoRA layer around the child `host` (which then holds the
    backbone or nothing) and `left`, `right`, `backbone` are None; see adapters/attach.py. In mode split only
    `top_left` and `top_right` move there. `route` is asked at every forward for other modules to use (of a disabled or
    merged adapter); it is neither a module nor saved.

    The attribute `weight` is for code that looks at it: of the shape (as it was stored) and dtype of the dense weight,
    decoded by whatever computes with it. It is no parameter; files have a sentinel under its key (sentinels.py).
    """

    def __init__(self, plan: LayerPlan, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        self.plan = plan
        self.out_features, self.in_features = plan.shape
        self._is_hf_initialized = True
        self.dtype = dtype or torch.get_default_dtype()  # of `weight`; stored parts have their own
        bias = torch.zeros(self.out_features, device=device, dtype=dtype) if plan.bias else None
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        rest, options = plan.rank - plan.top_rank, plan.factor_options
        self.right: Any = _factor(self.in_features, rest, plan.right_format, options, device)
        self.left: Any
        if plan.form == PIVOTED:
            left = _factor(rest, self.out_features - rest, plan.left_format, options, device)
            self.left = PivotedLinear(left, device)
        else:
            self.left = _factor(rest, self.out_features, plan.left_format, options, device)
        self.top_right: Any = None
        self.top_left: Any = None
        if plan.top_rank:
            top = plan.top_rank, plan.top_format, plan.top_options
            self.top_right = _factor(self.in_features, *top, device)
            self.top_left = _factor(top[0], self.out_features, *top[1:], device)
        self.backbone: Any = None
        if plan.backbone != "none":
            quantizer = make_quantizer(plan.backbone, plan.backbone_options)
            self.backbone = QuantizedLinear(self.in_features, self.out_features, quantizer, device)
        self.host: Any = None
        self.route: Callable[[FactoredLinear], Parts | None] | None = None

    @property
    def rank(self) -> int:
        return self.plan.rank

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def weight(self) -> Tensor:
        """(out, in), or (in, out) of a Conv1D."""
        shape = self.plan.shape[::-1] if self.plan.conv1d else self.plan.shape
        return Standin(shape, self.dtype, self.device, self._decoded, NO_WRITING)

    def _decoded(self) -> Tensor:
        """`weight`, with the adapters that are active and a gradient to what trains."""
        gradients = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            own = (QuantizedLinear, CastLinear, PivotedLinear, type(None))  # not wrapped by an adapter
            plain = self.host is None and self.route is None and all(isinstance(part, own) for part in self.parts())
            trains = gradients and any(p.requires_grad for p in self.parameters())
            if self.device.type == "meta" or (plain and not trains):
                weight = self.dense_weight(self.dtype)
            else:
                dtype = torch.promote_types(self.dtype, torch.float32)
                identity = torch.eye(self.in_features, dtype=dtype, device=self.device)
                weight = self._product(identity).T.to(self.dtype)
        return weight.T.contiguous() if self.plan.conv1d else weight

    def __setattr__(self, name: str, value: object) -> None:
        if name == "weight":
            raise UsageError(NO_WRITING)
        super().__setattr__(name, value)  # type: ignore[arg-type]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FactoredLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        _, _, _, unexpected, _ = args
        if f"{prefix}weight" in unexpected:  # a sentinel of a file
            unexpected.remove(f"{prefix}weight")

    def forward(self, input: Tensor) -> Tensor:  # (..., in) -> (..., out), by the name that nn.Linear has
        output = self._product(input)
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def _product(self, x: Tensor) -> Tensor:
        other = None if self.route is None else self.route(self)
        if other is not None:
            return other(x)
        return self.parts()(x) if self.host is None else self.host(x)

    def parts(self) -> Parts:
        return Parts(self.left, self.right, self.backbone, self.top_left, self.top_right)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W = Q + L R, summed in float64. (out, in)"""
        if self.device.type == "meta":
            return torch.empty(self.plan.shape, dtype=dtype, device="meta")
        left, right = self.dense_factors()
        total = left @ right
        if self.backbone is not None:
            total += self.backbone.dequantize(torch.float64)
        return total.to(dtype)

    def dense_factors(self) -> tuple[Tensor, Tensor]:
        """L (out, rank) and R (rank, in) with all components, float64."""
        left, right = dense_factor(self.left), dense_factor(self.right)
        if self.top_left is None:
            return left, right
        return torch.cat([dense_factor(self.top_left), left], 1), torch.cat([dense_factor(self.top_right), right])

    def set_factors(self, factors: Factors) -> None:
        """Store L and R in the form and formats of the plan; parts that the method has rounded are taken over (rounding
        the decoded values again may change the scales)."""
        if isinstance(self.left, PivotedLinear):
            rows, rest, chosen = _as_pivoted(factors)
            self.left.rows = nn.Parameter(rows, requires_grad=False)
            _store(self.left.rest, rest, factors.left_parts)
            _store(self.right, chosen, factors.right_parts)
            return
        _store(self.left, factors.left, factors.left_parts)
        _store(self.right, factors.right, factors.right_parts)
        if factors.top is not None:
            _store(self.top_left, factors.top.left, factors.top.left_parts)
            _store(self.top_right, factors.top.right, factors.top.right_parts)

    def pivot(self, dtype: torch.dtype | None = None) -> None:
        """Bring plain L and R, after something was learnt, into the form of the plan, in `dtype` (default: the dtype
        that L has); more components than outputs stay plain."""
        pair = self.left, self.right
        if self.plan.form != PIVOTED or self.top_left is not None or not all(type(f) is CastLinear for f in pair):
            return
        rank, dtype = self.left.in_features, dtype or self.left.weight.dtype
        if rank <= self.out_features:
            factors = Factors(*self.dense_factors())
            self.right = CastLinear(self.in_features, rank, dtype, device="meta")
            rest = CastLinear(rank, self.out_features - rank, dtype, device="meta")
            self.left = PivotedLinear(rest, device="meta")
            self.set_factors(factors)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.rank} -> {self.out_features}, backbone={self.plan.backbone}"


class FrozenSum(nn.Linear):
    """x -> L (R x) + Q x, frozen: PEFT hangs the components that train on it. Q may be absent."""

    def __init__(self, left: nn.Linear, right: nn.Linear, backbone: nn.Linear | None):
        nn.Module.__init__(self)
        self.in_features, self.out_features = right.in_features, left.out_features
        self._is_hf_initialized = True
        self.register_parameter("bias", None)
        self.left, self.right, self.backbone = left, right, backbone

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        shape, device = (self.out_features, self.in_features), next(self.parameters()).device

        def read() -> Tensor:
            with torch.inference_mode(False), torch.no_grad():
                return self.forward(torch.eye(self.in_features, device=device)).T

        return Standin(shape, torch.float32, device, read, NO_WRITING)

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        return Parts(self.left, self.right, self.backbone)(x)


class FrozenBasis(FrozenSum):
    """x -> L (scale * (R x)) + Q x, frozen: PEFT hangs learnt sizes of the components of L R, and new ones, on it.

    `sizes`, (rank,) float32: |column i of L| |row i of R|, the singular values where L R is a singular value
    decomposition.
    """

    sizes: Tensor

    def __init__(self, left: nn.Linear, right: nn.Linear, backbone: nn.Linear | None):
        super().__init__(left, right, backbone)
        device = next(right.parameters()).device
        sizes = torch.empty(right.out_features, device=device)
        if device.type != "meta":
            norms = dense_factor(left).norm(dim=0) * dense_factor(right).norm(dim=1)
            sizes = norms.sqrt().float().square()  # what a parameter that starts as its root gives, to the last bit
        self.register_buffer("sizes", sizes, persistent=False)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:  # (..., in), (rank,) -> (..., out)
        if scale is None:
            return super().forward(x)
        output: Tensor = self.left(self.right(x) * scale.to(x.dtype))
        return output if self.backbone is None else output + self.backbone(x)


def _factor(
    in_features: int, out_features: int, form: str, options: Options, device: torch.device | str | None
) -> CastLinear | QuantizedLinear:
    if form in DTYPES:
        return CastLinear(in_features, out_features, DTYPES[form], device)
    return QuantizedLinear(in_features, out_features, make_quantizer(form, options), device)


def _as_pivoted(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """(rows, C, B)"""
    if factors.pivots is None:
        return pivoted(factors.left, factors.right)
    return factors.pivots, factors.left[others_of(factors.pivots, len(factors.left))], factors.right


def dense_factor(factor: nn.Linear) -> Tensor:
    """The matrix a factor module stands for, float64."""
    if isinstance(factor, PivotedLinear):
        return factor.dense(torch.float64).detach()
    return factor.dequantize(torch.float64) if isinstance(factor, QuantizedLinear) else factor.weight.detach().double()


def _store(module: nn.Linear, value: Tensor, parts: dict[str, Tensor] | None) -> None:
    """Write a matrix into a factor module in the module's own format."""
    if isinstance(module, QuantizedLinear):
        module.set_parts(module.quantizer.quantize(value) if parts is None else parts)
    else:
        module.weight = nn.Parameter(value.to(module.weight.dtype).contiguous(), requires_grad=False)


def build_layer(
    plan: LayerPlan, factors: Factors, parts: dict[str, Tensor] | None, bias: Tensor | None, dtype: torch.dtype
) -> FactoredLinear:
    """A filled FactoredLinear; `bias` is the original layer's, to which the method's shift is added; `dtype` is that of
    the original weight, which a reload gives to the bias."""
    layer = FactoredLinear(plan, device="meta", dtype=dtype)
    layer.set_factors(factors)
    if parts is not None:
        layer.backbone.set_parts(parts)
    if plan.bias:
        shift = 0.0 if factors.bias_shift is None else factors.bias_shift
        start = torch.zeros(plan.shape[0], dtype=torch.float64) if bias is None else bias.detach().double()
        layer.bias = nn.Parameter((start.to(factors.left.device) + shift).to(dtype), requires_grad=False)
    return layer
