"""The story of `evaluate`: what is asked is read before any model is loaded, then measured, shown and written."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapters.loading import load
from .calibration.corpus import file_windows
from .cards import write_measured
from .config import EvaluateConfig
from .console import note, progress
from .errors import LordWarning, UsageError
from .evaluation.agreement import Agreement, agreement, check_comparable
from .evaluation.code_tasks import Asked, run_code_task
from .evaluation.generation import Decoding, continued
from .evaluation.harness import check_harness, run_tasks, scores
from .evaluation.problems import KINDS, read_problems
from .evaluation.run import evaluate_model
from .evaluation.speed import speeds
from .evaluation.task_rows import Rows, find_file, task_rows
from .evaluation_tables import (
    show_agreement,
    show_scores,
    show_sizes,
    show_solved,
    show_speeds,
    show_texts,
    show_written,
)
from .integrations.destination import protect_file
from .integrations.files import ADAPTER_FILE
from .integrations.running import kind_of, max_length, window_length
from .integrations.sources import base_of_adapter, resolve_model
from .integrations.vocabulary import check_vocabulary
from .layers.sizes import sizes
from .protocols import CausalModel, Tokenizer
from .provenance import identity_of
from .storage import check_json_file

_PROMPT, _CONTINUATION = 32, 48  # tokens of a window that are shown, and of what the models make of it


@dataclass(frozen=True)
class Questions:
    """What is asked beside text."""

    tasks: list[Rows]
    code: list[Asked]
    samples_file: Path | None  # of the programming tasks


def prepared(config: EvaluateConfig) -> Questions:
    """Read what is asked, and refuse what cannot be answered or written, before a model is loaded."""
    file = None if config.json_file is None else Path(config.json_file)
    samples = file.with_name(f"{file.stem}.samples.jsonl") if file is not None and config.code_tasks else None
    folder = None if config.tasks_dir is None else Path(config.tasks_dir).expanduser()
    if folder is not None and not folder.is_dir():
        raise UsageError(f"The folder {folder} does not exist; `tasks_dir` is where TASK.jsonl lies.")
    by_lm_eval = [name for name in config.task_names if name not in KINDS]
    if by_lm_eval:
        check_harness()
        assert folder is not None, "the record refuses it"
    tasks = [task_rows(name, find_file(name, folder), config.limit) for name in by_lm_eval if folder is not None]
    decoding = Decoding(config.max_new_tokens, config.temperature, chat=config.apply_chat_template, seed=config.seed)
    code = [
        Asked(name, *read_problems(name, folder, config.limit), config.samples_per_problem, decoding)
        for name in config.code_tasks
    ]
    questions = [*(str(entry.path) for entry in tasks), *(str(entry.path) for entry in code)]
    models, texts = [config.model, config.original], [*(config.text or []), *questions]
    protect_file(config.json_file, models, texts, own_key="texts")
    if samples is not None:
        protect_file(str(samples), [], texts)
    check_json_file(config.json_file)
    return Questions(tasks, code, samples)


def measured(config: EvaluateConfig, asked: Questions, model: CausalModel, tokenizer: Tokenizer) -> dict[str, Any]:
    """Measure and show one thing after the other, then write: the keys of `evaluate --json`."""
    _check_kind(config, model, tokenizer)
    result: dict[str, Any] = {"model": config.model}
    length = window_length(config.context_length, model) if config.text else 0
    windows = _windows(config, model, tokenizer, length)
    if windows:
        with progress() as update:
            result |= evaluate_model(model, tokenizer, windows, length, update)
        show_texts(f"{config.model}, context {length}", result["texts"])
    else:
        result |= {**sizes(model.eval()), "texts": {}}
    show_sizes(result)
    if config.speed:
        with progress() as update:
            result["speed"] = speeds(model, sorted({1, config.batch_size}), update)
        show_speeds(result["speed"])
    if config.original is not None or config.samples:
        result |= _compared(config, model, tokenizer, windows, result["texts"])
    if asked.tasks:
        with progress() as update:
            found = run_tasks(model, tokenizer, asked.tasks, config.batch_size, config.apply_chat_template, update)
        longest = max_length(model)
        chat = {"chat": config.apply_chat_template}
        result["tasks"] = {entry.task: scores(found, entry, tokenizer, longest) | chat for entry in asked.tasks}
        result["lm_eval"] = version("lm_eval")
        show_scores(result["tasks"], result["lm_eval"])
    for entry in asked.code:
        with progress() as update:
            figures = run_code_task(
                model, tokenizer, entry, _identity(config), asked.samples_file, config.batch_size, update
            )
        result.setdefault("tasks", {})[entry.kind] = figures
        show_solved(entry.kind, figures)
    if config.json_file:
        write_measured(Path(config.json_file), result, config.model)
    return result


def _check_kind(config: EvaluateConfig, model: CausalModel, tokenizer: Tokenizer) -> None:
    continues = config.samples or config.speed or config.task_names
    if continues and kind_of(model) != "causal":
        raise UsageError(
            f"The model is {kind_of(model)}, and `tasks`, `speed` and `samples` are for models that continue text; "
            "measure it on `text` alone."
        )
    if config.apply_chat_template and getattr(tokenizer, "chat_template", None) is None:
        raise UsageError("The tokenizer has no chat template, so `apply_chat_template` has no effect; remove it.")


def _windows(config: EvaluateConfig, model: CausalModel, tokenizer: Tokenizer, length: int) -> dict[str, Tensor]:
    """text -> (window, length)"""
    given = length, config.max_tokens, config.plain_prompts, note
    found = {path: file_windows(path, tokenizer, *given) for path in config.text or []}
    check_vocabulary(model, tokenizer, found.values())
    return found


def _compared(
    config: EvaluateConfig,
    model: CausalModel,
    tokenizer: Tokenizer,
    windows: dict[str, Tensor],  # text -> (window, length)
    texts: dict[str, dict[str, Any]],  # the figures of each, which get those of the comparison
) -> dict[str, Any]:
    """With the original, which is in memory no longer than this takes."""
    models = {"model": model}
    result: dict[str, Any] = {}
    if config.original is not None:
        original, its_tokenizer = load(config.original, config.dtype)
        check_comparable(model, tokenizer, original, its_tokenizer)
        found: list[Agreement] = []
        with progress() as update:
            for name, part in windows.items():
                found.append(agreement(model, original, tokenizer, part, update))
                texts[name]["original"] = found[-1].to_dict()
        result["original"] = {"model": config.original, **functools.reduce(Agreement.joined, found).to_dict()}
        show_agreement(result["original"])
        models = {"original": original, **models}
    if config.samples:
        first = next(iter(windows.values()))[: config.samples]
        if len(first) < config.samples:
            warnings.warn(f"The text has {len(first)} windows, so {len(first)} samples.", LordWarning, stacklevel=2)
        result["samples"] = _continuations(models, tokenizer, first)
        show_written(result["samples"])
    return result


def _continuations(
    models: dict[str, CausalModel],
    tokenizer: Tokenizer,
    windows: Tensor,  # (window, length)
) -> list[dict[str, str]]:
    """How each model goes on after the beginning of each window, by the likeliest token."""
    shown = windows[:, : min(_PROMPT, max(1, windows.shape[1] // 2))]
    prompts = [tokenizer.decode(row, skip_special_tokens=True) for row in shown]
    rows = [{"prompt": prompt} for prompt in prompts]
    for name, model in models.items():
        for index, text in continued(model, tokenizer, prompts, Decoding(_CONTINUATION), len(prompts)):
            rows[index][name] = text
    return rows


def _identity(config: EvaluateConfig) -> str:
    """Of what the model computes: its weights and settings, those of an adapter's base too, and the dtype."""
    source = resolve_model(config.model)
    parts = [identity_of("", source)]
    if (Path(source) / ADAPTER_FILE).is_file():
        parts.append(identity_of("", base_of_adapter(Path(source))))
    told = json.dumps([parts, config.dtype, config.dequantize_once], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()
