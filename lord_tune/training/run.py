"""Recovery: train the factors (or LoRA on them) with trl's SFTTrainer; masked models with transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..console import is_main_process
from ..errors import LordError, UsageError
from ..integrations.models import RUN_FILE, kind_of, max_length
from ..integrations.peft_adapters import FACTORS, LORA, SPLIT, add_lora, coverage, expose_factors
from ..storage import read_json, write_json
from .arguments import TrainOptions
from .data import prepare_rows, sample_spans

_MAY_CHANGE = {"resume_from_checkpoint", "num_train_epochs", "max_steps", "dry_run"}  # when a run is continued
Notify = Callable[[str, Any], None]  # (event, payload): "coverage", "data", "sample"


def expose(model: nn.Module, options: TrainOptions) -> Any:
    """The PEFT model of a mode."""
    if options.mode in (FACTORS, SPLIT):
        return expose_factors(model, options.targets, mode=options.mode)
    if options.mode == LORA:
        return add_lora(model, options.lora_r, options.lora_alpha, options.lora_dropout, options.targets)
    raise UsageError(f"mode: {options.mode} is unknown; use {FACTORS}, {SPLIT} or {LORA}.")


def train_model(
    model: nn.Module,
    tokenizer: Any,
    options: TrainOptions,
    arguments: Any,  # SFTConfig
    resolved: dict[str, Any],  # stored beside the checkpoints: a changed run refuses to resume
    notify: Notify = lambda event, payload: None,
) -> dict[str, Any]:
    """Train and write the adapter to arguments.output_dir; resumes from the last checkpoint found there.

    Returns the trainer's metrics: train_loss, steps, the loss history, trainable_parameters.
    """
    from transformers.trainer_utils import get_last_checkpoint

    output = Path(arguments.output_dir)
    asked = arguments.resume_from_checkpoint
    if asked and str(asked).lower() in ("true", "false"):  # transformers' spelling of what is done anyway
        if str(asked).lower() == "false":
            raise UsageError("resume_from_checkpoint: false came; choose another output_dir to start anew.")
        asked = None
    if asked and not Path(asked).is_dir():
        raise UsageError(f"The checkpoint {asked} (resume_from_checkpoint) does not exist; check the path.")
    checkpoint = asked or (get_last_checkpoint(str(output)) if output.is_dir() else None)
    _check_output(output, checkpoint, resolved, arguments)
    rows, form = prepare_rows(options.dataset_name, options.dataset_train_split, options.dataset_config, tokenizer)
    notify("data", {"rows": len(rows), "format": str(form), "source": options.dataset_name})
    held = None
    if options.eval_dataset_name or options.dataset_test_split:
        name = options.eval_dataset_name or options.dataset_name
        held, _ = prepare_rows(name, options.dataset_test_split or "train", options.dataset_config, tokenizer)
    exposed = expose(model, options)
    notify("coverage", coverage(exposed))
    trainer = _make_trainer(exposed, tokenizer, arguments, rows, held)
    notify("sample", sample_spans(trainer, tokenizer, require_eos=form.kind == "prompt_completion"))
    if is_main_process():
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / RUN_FILE, resolved)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    _check_trained(exposed, arguments)
    trainer.save_model()
    trainer.save_state()
    history = [entry for entry in trainer.state.log_history if "loss" in entry or "eval_loss" in entry]
    metrics = {
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "resumed_from": checkpoint,
        "trainable_parameters": coverage(exposed).trainable_parameters,
        "train_runtime": result.metrics.get("train_runtime"),
        "history": history,
    }
    if is_main_process():
        write_json(output / "train_results.json", metrics)
    return metrics


def _check_trained(model: nn.Module, arguments: Any) -> None:
    """The trainer logs a NaN loss as 0 and goes on, so the weights are looked at."""
    broken = [n for n, p in model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
    if broken:
        raise LordError(
            f"Training diverged: {len(broken)} trained tensors hold NaN or Inf, like {broken[0]}; lower learning_rate "
            f"({arguments.learning_rate:g}) or max_grad_norm. No adapter was written."
        )


def _check_output(output: Path, checkpoint: Any, resolved: dict[str, Any], arguments: Any) -> None:
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    run = output / RUN_FILE
    if not output.is_dir() or not run.is_file():
        raise UsageError(f"{output} holds something other than a training run; choose another output_dir.")
    if checkpoint is None and not (output / "adapter_config.json").is_file():
        return  # a run that stopped before its first checkpoint: nothing to continue, nothing to lose
    before = read_json(run)
    # as text: the command line gives "64" where YAML gives 64
    keys = {*before, *resolved} - _MAY_CHANGE
    changed = sorted(key for key in keys if str(before.get(key)).lower() != str(resolved.get(key)).lower())
    if changed:
        raise UsageError(
            f"{output} holds a run with another {', '.join(changed[:5])}; choose another output_dir, or remove it to "
            "start anew."
        )
    if checkpoint is None:
        raise UsageError(f"{output} holds a finished run without checkpoints; choose another output_dir.")
    if _finished(output, Path(checkpoint), arguments):
        raise UsageError(f"{output} holds a finished run; raise max_steps or num_train_epochs, or choose another one.")


def _finished(output: Path, checkpoint: Path, arguments: Any) -> bool:
    """Whether the adapter in `output` is that of the whole run: the trainer would go on for one more step."""
    state_file, results = checkpoint / "trainer_state.json", output / "train_results.json"
    if not state_file.is_file() or not results.is_file():
        return False
    state = read_json(state_file)
    if read_json(results)["steps"] < state["global_step"]:
        return False  # stopped between its last checkpoint and the adapter
    if arguments.max_steps > 0:
        return state["global_step"] >= arguments.max_steps
    return state["epoch"] >= arguments.num_train_epochs


def _make_trainer(model: Any, tokenizer: Any, arguments: Any, rows: Any, held: Any) -> Any:
    kind = kind_of(model)
    if kind == "bare":
        raise UsageError("The model has no language-model head, so there is no loss to train on.")
    if kind == "causal":
        from trl import SFTTrainer

        return SFTTrainer(model, arguments, train_dataset=rows, eval_dataset=held, processing_class=tokenizer)
    from transformers import DataCollatorForLanguageModeling, Trainer

    if "text" not in rows.column_names:
        raise UsageError("A masked language model trains on plain text; give a dataset with a text column.")
    limit = min(arguments.max_length or 512, max_length(model))

    def tokenize(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokenizer(row["text"], truncation=True, max_length=limit)["input_ids"]}

    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    rows = rows.map(tokenize, remove_columns=rows.column_names)
    held = None if held is None else held.map(tokenize, remove_columns=held.column_names)
    return Trainer(model, arguments, data_collator=collator, train_dataset=rows, eval_dataset=held)
