"""What the options of a run name: the PEFT model of its mode, the teacher of its distillation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.attach import BASIS, FACTORS, LORA, MODES, SCALES, SPLIT, add_lora, add_scales, expose_factors
from ..adapters.basis import add_basis
from ..errors import UsageError
from ..integrations.running import kind_of
from ..integrations.sources import original_of, resolve_model
from ..layers import plain_model
from .arguments import TrainOptions

if TYPE_CHECKING:
    from peft import PeftModel

    from ..protocols import CausalModel


def expose(model: CausalModel, options: TrainOptions) -> PeftModel:
    """The PEFT model of a mode."""
    if options.mode in (FACTORS, SPLIT):
        return expose_factors(model, options.targets, mode=options.mode)
    if options.mode == LORA:
        return add_lora(
            model, options.lora_r, options.lora_alpha, options.lora_dropout, options.targets, on=options.lora_on
        )
    if options.mode == SCALES:
        return add_scales(model, options.targets, on=options.scales_on)
    if options.mode == BASIS:
        return add_basis(model, options.basis_new, options.targets)
    raise UsageError(f"mode: {options.mode} is unknown; use one of {', '.join(MODES)}.")


def trained_kind(model: CausalModel) -> str:
    """causal or masked; UsageError for a model that `train` has no loss for."""
    kind = kind_of(model)
    if kind == "bare":
        raise UsageError("The model has no language-model head, so there is no loss to train on.")
    if kind == "seq2seq":
        raise UsageError(
            f"{type(plain_model(model)).__name__} is an encoder-decoder; `train` takes models that predict the next or "
            "a masked token. Give what expose_factors returns to transformers' Seq2SeqTrainer."
        )
    return kind


def teacher_source(options: TrainOptions) -> str:
    """A folder or Hub id: the model that was named, else the one that the student was decomposed from."""
    if options.teacher_model_name_or_path is not None:
        return resolve_model(options.teacher_model_name_or_path)
    record = Path(options.model_name_or_path) / "decomposition.json"
    if not record.is_file():
        raise UsageError(
            f"objective: distill finds no decomposition.json in {options.model_name_or_path} that names the original "
            "model; set teacher_model_name_or_path."
        )
    return original_of(record.parent, "set teacher_model_name_or_path")
