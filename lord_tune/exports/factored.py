"""Export as a factored checkpoint with the adapter folded into L and R, exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..integrations.remote_code import add_remote_code
from ..integrations.transformers_quantizer import attach
from .base import Job
from .by_blocks import outputs_by_blocks
from .streamed import save_factored


@dataclass(frozen=True)
class FactoredExport:
    """L, R and Q as they are stored; needs lord_tune to load."""

    name: ClassVar[str] = "factored"
    model_folder: ClassVar[str] = "."

    def check(self, model: PreTrainedModel) -> None:
        """Every factored model has this form."""

    def write(self, model: PreTrainedModel, job: Job) -> Tensor:
        attach(model)
        add_remote_code(model.config, job.folder)
        save_factored(model, job.tokenizer, job.folder, job.store)
        return outputs_by_blocks(job.folder, job.ids, lambda model: None)

    def rounds_to(self, model_dtype: torch.dtype, job: Job) -> list[str]:
        return []  # every dtype is kept
