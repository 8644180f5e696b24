"""The records of a decomposition: what to do, on what text, with which model, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypedDict

from torch import Tensor

from ..allocation import PLAIN
from ..factorizations import Curve

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..plans import LayerChoice, Plan
    from ..sites import Site

CHECKED_TOKENS = 128  # of held-out text, on which the walk is compared with an ordinary forward pass


@dataclass(frozen=True)
class BlockRecovery:
    """How each block is tuned to do what the original did; see recovery.py."""

    epochs: int  # passes over the calibration text
    learning_rate: float


@dataclass(frozen=True)
class Windows:
    """Token ids, (window, length) each."""

    calibration: Tensor
    heldout: Tensor
    sensitivity: Tensor  # for the backward pass; shorter windows hold fewer activations
    validation: Tensor | None = None  # held out from all others, for allocators that run whole models

    def tokens(self) -> int:
        """Of the streams that every layer's errors are measured on."""
        return self.calibration.numel() + self.heldout.numel()


class Source(Protocol):
    """A checkpoint opened lazily: a skeleton whose tensors come and go."""

    model: PreTrainedModel  # the skeleton; parameters on the meta device unless loaded

    def load(self, names: Iterable[str]) -> None:
        """Fill these parameters and persistent buffers from the checkpoint."""
        ...

    def release(self, names: Iterable[str]) -> None:
        """Put them back on the meta device."""
        ...

    def stored(self, name: str) -> Tensor | None:
        """The tensor as the checkpoint stores it, in its own dtype; None where it is not stored under one name."""
        ...


class GivenCodes(Protocol):
    """Codes of Q that another program has chosen."""

    def parts(self, name: str, choice: LayerChoice) -> dict[str, Tensor] | None:
        """Of a layer, where the choice is to have the given ones."""
        ...

    def compared(self, plan: Plan, layers: Mapping[str, Site]) -> dict[str, Plan]:
        """Whole models that the plan is run beside, on held-out text; the plan among them."""
        ...


class EqualBits(TypedDict):
    """Feedback rounding alone, without L R."""

    bits: float  # per weight
    calibrated: float  # relative output error
    heldout: float | None


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
    equal_bits: dict[str, EqualBits] = field(default_factory=dict)  # format -> its error, for one layer of each shape
    warnings: list[str] = field(default_factory=list)
    form: str = PLAIN  # of storing the factors
    spectrum: Curve | None = None  # error at every rank, before L and R are rounded; of what Q leaves, beside a Q


@dataclass(frozen=True)
class Progress:
    """One step of a run, for whoever shows it."""

    phase: str  # calibrating, sensitivity, writing, ...
    done: int  # blocks; of probing and searching, models
    total: int
    remaining: float | None  # seconds to the end of the run, estimated
    layers: dict[str, LayerRecord]  # finished in this step


Notify = Callable[[Progress], None]
