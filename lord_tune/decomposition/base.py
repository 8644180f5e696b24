"""The records of a decomposition: what to do, on what text, with which model, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from ..allocation import Allocator
from ..factorizations import FactorForm, Factorization
from ..quantizers import DTYPES, Quantizer, make_quantizer


@dataclass(frozen=True)
class BlockRecovery:
    """How each block is tuned to do what the original did; see recovery.py."""

    epochs: int  # passes over the calibration text
    learning_rate: float


@dataclass(frozen=True)
class Settings:
    """What to do with every layer."""

    method: Factorization
    quantizer: Quantizer | None
    rank: int | None  # either a rank ...
    kept_fraction: float | None  # ... or a budget with an allocator, or bits_per_weight
    allocator: Allocator
    factor_format: str | None  # a key of DTYPES, a quantizer's name, or None: the weight's own dtype
    factor_options: dict[str, Any] = field(default_factory=dict)
    top_rank: int = 0  # of the rank: the first components, stored apart in
    top_format: str = "fp32"
    top_options: dict[str, Any] = field(default_factory=dict)
    bits_per_weight: float | None = None  # or, with a quantizer, the rank that fits these
    targets: str | None = None
    exclude: str | None = None
    recovery: BlockRecovery | None = None  # tune the blocks' L and R, one block at a time
    propagate: str = "dense"  # or "sequential": later blocks see the outputs of the decomposed ones
    shrinkages: tuple[float, ...] = ()  # candidates of the method's `shrinkage`, chosen per layer by held-out error

    @property
    def rounds_factors(self) -> bool:
        """Whether L and R are stored in a quantized format, and so rounded with feedback."""
        return self.factor_format is not None and self.factor_format not in DTYPES

    def factor_form(self, rank: int) -> FactorForm | None:
        """How L and R of a layer of this rank are stored, if in a quantized format."""
        if not self.rounds_factors or rank < 1:
            return None
        assert self.factor_format is not None
        top = self.top_rank_of(rank)
        top_form = DTYPES.get(self.top_format) or make_quantizer(self.top_format, self.top_options)
        return FactorForm(make_quantizer(self.factor_format, self.factor_options), top, top_form)

    def top_rank_of(self, rank: int) -> int:
        """How many components are stored apart: all but one at most."""
        return max(0, min(self.top_rank, rank - 1))


@dataclass(frozen=True)
class Windows:
    """Token ids, (window, length) each."""

    calibration: Tensor
    heldout: Tensor
    sensitivity: Tensor  # for the backward pass; shorter windows hold fewer activations

    def tokens(self) -> int:
        """Of the streams that every layer's errors are measured on."""
        return self.calibration.numel() + self.heldout.numel()


class Source(Protocol):
    """A checkpoint opened lazily: a skeleton whose tensors come and go."""

    model: Any  # the skeleton; parameters on the meta device unless loaded

    def load(self, names: Iterable[str]) -> None:
        """Fill these parameters and persistent buffers from the checkpoint."""
        ...

    def release(self, names: Iterable[str]) -> None:
        """Put them back on the meta device."""
        ...

    def stored(self, name: str) -> Tensor | None:
        """The tensor as the checkpoint stores it, in its own dtype; None where it is not stored under one name."""
        ...


@dataclass
class LayerRecord:
    """What became of a layer; the errors are relative output errors, None when no text was given.

    They are of what is stored, except that without a backbone the rounding of L and R to 16 bits (below 0.5 %) is left
    out.
    """

    shape: tuple[int, int]
    rank: int | str  # "dense" for a layer left alone
    method: str
    backbone: str
    bits_per_weight: float
    error_calibrated: float | None
    error_heldout: float | None
    error_plain: float | None  # plain SVD at the same rank (of W - Q where there is a backbone), on the same text
    error_backbone: float | None  # Q alone, without L R
    seconds: float
    error_beyond_top: float | None = None  # calibrated, relative to the outputs without their largest direction
    shrinkage: float | None = None  # chosen by held-out error, where the method has one
    inputs: dict[str, float] = field(default_factory=dict)  # see Moments.describe
    # one layer of each shape: feedback rounding without L R at other widths, format -> {bits, calibrated, heldout}
    equal_bits: dict[str, dict[str, float | None]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """One step of a run, for whoever shows it."""

    phase: str  # calibrating, sensitivity, writing
    done: int  # blocks
    total: int
    remaining: float | None  # seconds to the end of the run, estimated
    layers: dict[str, LayerRecord]  # finished in this step


Notify = Callable[[Progress], None]
