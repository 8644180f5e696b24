"""The contract of an export: a factored model in, a folder out, and what it computes when it is loaded again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..protocols import Tokenizer
from .parts import PRESENT, Store


@dataclass(frozen=True)
class Job:
    """Where an export goes, and what it is compared on."""

    tokenizer: Tokenizer
    folder: Path  # empty, exists
    final: Path  # where `folder` will be moved
    dtype: str  # that was asked for; a key of DTYPE_NAMES
    ids: Tensor  # (window, length) of the comparison
    pad_ranks: bool = False  # of an adapter, to one that all layers share
    like: Path | None = None  # a GGUF file of the original
    dense_type: str = "f16"  # in GGUF, of decomposed layers that have no type there
    adapter_type: str = "f16"  # in GGUF, of L and R
    notes: list[str] = field(default_factory=list)  # what the export has to say
    store: Store = PRESENT  # of the model, whose tensors may have no values until they are asked for


class Export(Protocol):
    """One form of a checkpoint. Its instance in EXPORTS makes it a choice of `lord-tune export --format`."""

    name: ClassVar[str]
    model_folder: ClassVar[str]  # where in the folder the model lies: "." or a folder in it

    def check(self, model: PreTrainedModel) -> None:
        """UsageError, before any work, for a model that has no such form."""
        ...

    def write(self, model: PreTrainedModel, job: Job) -> Tensor:
        """Write the model, whose adapter is folded, and return the logits of the folder loaded again. May use up the
        model. Its tensors may be on the meta device: `job.store.load` brings those that are computed with."""
        ...

    def rounds_to(self, model_dtype: torch.dtype, job: Job) -> list[str]:
        """The dtypes that the folder computes in and the model did not: they decide what may differ."""
        ...
