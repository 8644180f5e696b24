"""Export as an ordinary Hugging Face checkpoint, W = Q + L R per layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import UsageError
from ..integrations.models import DTYPE_NAMES
from ..layers import expert_of, factored_layers
from .base import Job
from .by_blocks import outputs_by_blocks
from .streamed import save_dense


@dataclass(frozen=True)
class DenseExport:
    """Any loader takes it."""

    name: ClassVar[str] = "dense"
    model_folder: ClassVar[str] = "."

    def check(self, model: PreTrainedModel) -> None:
        """Every factored model has this form."""

    def rounds_to(self, model_dtype: torch.dtype, job: Job) -> list[str]:
        return [str(model_dtype).removeprefix("torch."), job.dtype]

    def write(self, model: PreTrainedModel, job: Job) -> Tensor:
        biased = [name for name, layer in factored_layers(model).items() if layer.bias is not None]
        expected = {name for name in biased if expert_of(name) is None}  # densify looks after those of experts

        def check(reloaded: PreTrainedModel) -> None:
            for name in expected:
                if getattr(reloaded.get_submodule(name), "bias", None) is None:
                    raise UsageError(
                        f"'{name}' carries a bias (method afm) and {type(reloaded).__name__} has no place for one, so "
                        "a dense checkpoint would lose it; export with `format` factored, or decompose with `method` "
                        "whitened."
                    )

        save_dense(model, job.tokenizer, job.folder, DTYPE_NAMES[job.dtype], job.store)
        return outputs_by_blocks(job.folder, job.ids, check)
