"""The laws every factorization and every quantizer passes. A new one adds a row; a law that does not apply says why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lord_tune.calibration.moments import MomentAccumulator, Moments
from lord_tune.factorizations import AFM, Caldera, FactorForm, Fisher, LoftQ, PlainSVD, Tucker, TwoSided, Whitened
from lord_tune.quantizers import (
    E8P2,
    E8P3,
    E8P4,
    NF4,
    Q2_0,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    W2A16,
    W4A16,
    W8A16,
    Int2,
    Int3,
    Int4,
    Int8,
    Lloyd2,
    Lloyd3,
    Lloyd4,
    Rotated,
    SpQR,
)


@dataclass(frozen=True)
class FactorizationRow:
    """A method, and the laws it is excused from with the reason."""

    method: Any
    quantizer: Any = None
    excused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.method}-{self.quantizer}"


_NOT_WEIGHT_OPTIMAL = "minimises the output error, not the weight error"
_AFFINE = "an affine map may beat the linear bound by its bias"
_QUANTIZED = "Q changes the matrix that is factored, so the bound on W does not apply"
_ALTERNATES = "each rank alternates to another Q; tests/test_caldera.py bounds it by LDLQ alone"
_ROUNDED = "L and R are rounded, so no rank recovers W; tests/test_caldera.py bounds what rounding adds"
_GRADIENTS = "minimises the error in a norm of gradients, see tests/test_caldera.py"
_CALDERA = {"weight_optimum": _QUANTIZED, "output_optimum": _QUANTIZED, "error_falls_with_rank": _ALTERNATES}
_WEIGHED = "minimises the error as the loss weighs it; tests/test_two_sided.py"
_TWO_SIDED = {"weight_optimum": _NOT_WEIGHT_OPTIMAL, "output_optimum": _WEIGHED, "error_falls_with_rank": _WEIGHED}
_SINK = "position 0 weighs more by design, so the plain calibrated error is not minimal"

FACTORIZATIONS = [
    FactorizationRow(PlainSVD(), excused={"output_optimum": "minimises the weight error"}),
    FactorizationRow(Tucker(), excused={"output_optimum": "minimises the weight error"}),
    FactorizationRow(Whitened(sink_weight=0.0), excused={"weight_optimum": _NOT_WEIGHT_OPTIMAL}),
    FactorizationRow(Whitened(), excused={"weight_optimum": _NOT_WEIGHT_OPTIMAL, "output_optimum": _SINK}),
    FactorizationRow(TwoSided(sink_weight=0.0), excused=_TWO_SIDED),
    FactorizationRow(TwoSided(damping=1e-3), excused=_TWO_SIDED),
    FactorizationRow(AFM(), excused={"weight_optimum": _NOT_WEIGHT_OPTIMAL, "output_optimum": _AFFINE}),
    FactorizationRow(AFM(centred=False), excused={"weight_optimum": _NOT_WEIGHT_OPTIMAL}),
    FactorizationRow(PlainSVD(), NF4(), {"weight_optimum": _QUANTIZED, "output_optimum": _QUANTIZED}),
    FactorizationRow(Tucker(), NF4(), {"weight_optimum": _QUANTIZED, "output_optimum": _QUANTIZED}),
    FactorizationRow(Whitened(), NF4(), {"weight_optimum": _QUANTIZED, "output_optimum": _QUANTIZED}),
    FactorizationRow(TwoSided(), NF4(), _TWO_SIDED),
    FactorizationRow(AFM(), NF4(), {"weight_optimum": _QUANTIZED, "output_optimum": _QUANTIZED}),
    FactorizationRow(
        LoftQ(),
        NF4(),
        {
            "weight_optimum": _QUANTIZED,
            "output_optimum": _QUANTIZED,
            "error_falls_with_rank": "each rank alternates to another Q; the law is tested for T=1",
        },
    ),
    FactorizationRow(Caldera(iterations=2), Int4(group_size=8), _CALDERA),
    FactorizationRow(
        Caldera(iterations=2, factor_form=FactorForm(Rotated(Lloyd4()), 1, torch.float16)),
        Rotated(E8P2()),
        _CALDERA | {"full_rank": _ROUNDED},
    ),
    FactorizationRow(
        Caldera(iterations=2, weighting="fisher"),
        Rotated(Lloyd3()),
        _CALDERA | {"gain_on_outputs": _GRADIENTS},
    ),
    FactorizationRow(LoftQ(iterations=1), NF4(), {"weight_optimum": _QUANTIZED, "output_optimum": _QUANTIZED}),
]

QUANTIZERS = [
    NF4(),
    NF4(double_quant=True),
    NF4(block_size=32),
    NF4(block_size=256, double_quant=True),
    *(form() for form in (Int2, Int3, Int4, Int8, Lloyd2, Lloyd3, Lloyd4, E8P2, E8P3, E8P4)),
    Int3(group_size=24, symmetric=True),
    *(form() for form in (Q2_0, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, W2A16, W4A16, W8A16)),
    W4A16(group_size=32, symmetric=False),
    Lloyd2(group_size=17),
    SpQR(),
    SpQR(bits=4, group_size=8),
    SpQR(outlier_fraction=0.0),
    Rotated(E8P2(), 3),
    Rotated(Lloyd3()),
    Rotated(NF4(block_size=32)),
]

SHAPES = [(24, 24), (40, 16), (16, 40), (33, 17)]


def inputs(width: int, tokens: int = 512, seed: int = 0) -> Tensor:
    """(1, token, width): correlated inputs with a strong mean and one massive channel, as in language models."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    scales = torch.logspace(1, -2, width, dtype=torch.float64)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ (mixing * scales)
    x[:, 0] += 30.0
    return x[None]


def moments_of(x: Tensor) -> Moments:
    accumulator = MomentAccumulator(x.shape[-1], x.device)
    accumulator.update(x)
    return accumulator.result("test")


def weight(shape: tuple[int, int], seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fisher_of(shape: tuple[int, int], seed: int = 2) -> Fisher:
    """Rows and columns of squared gradients, some a hundred times larger than others."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (torch.randn(size, generator=generator, dtype=torch.float64).exp() for size in shape)
    return Fisher(rows, columns)


def output_gram_of(out: int, tokens: int = 300, seed: int = 3) -> Tensor:
    """(out, out): G = E[g g^T] of gradients that differ a thousandfold between directions."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(out, out, generator=generator, dtype=torch.float64)
    gradients = torch.randn(tokens, out, generator=generator, dtype=torch.float64)
    gradients = gradients * torch.logspace(-3, 0, out, dtype=torch.float64) @ mixing
    return 1e-6 * gradients.T @ gradients / tokens
