"""Recovery: train the factors (or LoRA on them) with trl's SFTTrainer; masked models with transformers' Trainer.

Defaults that differ from trl's: learning rates fit for factors (1e-4) and for LoRA on them (2e-4; trl's 2e-5 is one for
full fine-tuning), float32 on CPUs (trl's bfloat16 default fails or is up to 134 times slower there), one epoch, no
reporting to trackers unless asked. Everything else is trl's, under trl's names.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from .calibration.corpus import RowFormat, load_rows, prompt_of, recognise
from .console import is_main_process
from .errors import LordError, UsageError
from .integrations.models import RUN_FILE, kind_of, max_length
from .integrations.peft_adapters import FACTORS, LORA, SPLIT, add_lora, coverage, expose_factors
from .storage import read_json, write_json

LEARNING_RATES = {FACTORS: 1e-4, SPLIT: 1e-4, LORA: 2e-4}
_CHECKED_ROWS = 64
_MAY_CHANGE = {"resume_from_checkpoint", "num_train_epochs", "max_steps", "dry_run"}  # when a run is continued
Notify = Callable[[str, Any], None]  # (event, payload): "coverage", "data", "sample"


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """What is trained on what; the optimiser's and the loop's settings are trl's own."""

    model_name_or_path: str
    dataset_name: str
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str | None = None
    eval_dataset_name: str | None = None
    mode: str = FACTORS
    lora_r: int = 8
    lora_alpha: float | None = None
    lora_dropout: float = 0.0
    targets: str | None = None


def trainer_arguments(
    given: dict[str, Any], mode: str, causal: bool, known_elsewhere: list[str], evaluated: bool = False
) -> Any:
    """An SFTConfig from YAML or command-line values, with our defaults (masked models use its TrainingArguments part).

    Raises UsageError for an unknown key, with the nearest valid one, for values of the wrong type, and for keys of
    SFTTrainer that a masked model's training would ignore.
    """
    from transformers import HfArgumentParser, TrainingArguments
    from trl import SFTConfig

    names = {f.name for f in dataclasses.fields(SFTConfig) if f.init}
    if "torch_dtype" in given:
        raise UsageError("torch_dtype is the old spelling; write dtype.")
    for key in given:
        if key not in names:
            near = difflib.get_close_matches(key, [*names, *known_elsewhere], n=1)
            hint = f"did you mean '{near[0]}'?" if near else "see the keys of trl's SFTConfig."
            raise UsageError(f"Unknown training key '{key}'; {hint}")
    if not causal:
        shared = {f.name for f in dataclasses.fields(TrainingArguments)} | {"max_length"}
        for key in sorted(set(given) - shared):
            raise UsageError(f"{key} has no effect on a masked language model; remove it.")
    on_cpu = not torch.accelerator.is_available() or bool(_as_bool(given.get("use_cpu")))
    defaults: dict[str, Any] = {
        "learning_rate": LEARNING_RATES[mode],
        "num_train_epochs": 1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "report_to": "none",
        "logging_nan_inf_filter": False,  # else a NaN loss is logged as 0
        "bf16": not on_cpu and _bf16_works() and not _as_bool(given.get("fp16")),
        "use_cpu": on_cpu,
        "gradient_checkpointing": not on_cpu,
        "eval_strategy": "epoch" if evaluated else "no",
    }
    parser = HfArgumentParser(SFTConfig)  # type: ignore[arg-type]

    def fail(message: str) -> None:
        raise UsageError(f"Training configuration: {message}.")

    parser.error = fail  # type: ignore[method-assign,assignment]
    words: list[str] = []
    for key, value in (defaults | {k: v for k, v in given.items() if v is not None}).items():
        words.append(f"--{key}")
        words.extend(_words(value))
    try:
        return parser.parse_args_into_dataclasses(args=words, look_for_args_file=False)[0]
    except (ValueError, TypeError) as error:
        raise UsageError(f"Training configuration: {error}") from error


def _words(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [json.dumps(value)]
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    return [str(value)]


def _as_bool(value: Any) -> bool:
    return value is True or str(value).lower() in ("true", "1", "yes")


def _bf16_works() -> bool:
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.accelerator.is_available()


def expose(model: nn.Module, options: TrainOptions) -> Any:
    """The PEFT model of a mode."""
    if options.mode in (FACTORS, SPLIT):
        return expose_factors(model, options.targets, mode=options.mode)
    if options.mode == LORA:
        return add_lora(model, options.lora_r, options.lora_alpha, options.lora_dropout, options.targets)
    raise UsageError(f"mode: {options.mode} is unknown; use {FACTORS}, {SPLIT} or {LORA}.")


def prepare_rows(source: str, split: str, config: str | None, tokenizer: Any) -> tuple[Any, RowFormat]:
    """A dataset in trl's columns (text; messages; prompt + completion) and what was recognised."""
    rows = load_rows(source, split, config)
    form = recognise(rows.column_names)
    if len(rows) == 0:
        raise UsageError(f"The dataset '{source}' is empty; give rows to train on.")
    if form.kind == "messages" and not getattr(tokenizer, "chat_template", None):
        raise UsageError(f"'{source}' holds chat messages and the model has no chat template; give text or prompts.")
    if form.kind == "prompt_completion":
        columns = list(rows.column_names)
        return rows.map(
            lambda row: {"prompt": prompt_of(row, form), "completion": row[form.completion]}, remove_columns=columns
        ), form
    return rows.select_columns([form.kind]), form


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


def sample_spans(trainer: Any, tokenizer: Any, require_eos: bool) -> list[tuple[str, bool]]:
    """The first training sequence as text pieces, each with whether the loss counts it.

    Raises LordError if none of the first rows has a trained token, or no completion teaches the end of the text.
    """
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    if "labels" in trainer.train_dataset.column_names:
        heads = trainer.train_dataset.select(range(min(_CHECKED_ROWS, len(trainer.train_dataset))))["labels"]
        if not any(label != -100 for row in heads for label in row):
            raise LordError(
                "No token of the first rows is trained on (all are masked); check the columns and max_length."
            )
        if require_eos and not any(row[-1] == tokenizer.eos_token_id for row in heads):
            raise LordError(
                "No completion ends with the end-of-text token, so the model would not learn to stop; raise max_length "
                f"(all first {len(heads)} rows are truncated) or check the tokenizer's eos_token."
            )
    spans: list[tuple[list[int], bool]] = []
    for token, label in zip(ids, labels, strict=True):
        marked = label != -100
        if not spans or spans[-1][1] != marked:
            spans.append(([], marked))
        spans[-1][0].append(token)
    return [(tokenizer.decode(tokens), marked) for tokens, marked in spans]


def load_yaml(path: str) -> dict[str, Any]:
    """A mapping from a YAML file."""
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"The config file {path} does not exist; check the path.")
    try:
        content = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        line = str(error).strip().replace("\n", " ")
        raise UsageError(f"{path} is not valid YAML: {line[:300]}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} holds no keys; a YAML mapping (key: value) is wanted.")
    return content
