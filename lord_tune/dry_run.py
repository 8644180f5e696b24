"""`--dry-run`: what a verb would read is there, and what its options come to.

A file or folder that is missing is refused as the run would refuse it. A name that can only be one of the Hub is not
looked up. Nothing is loaded, converted or written.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .config import (
    CompareConfig,
    CorrectConfig,
    DecomposeConfig,
    EvaluateConfig,
    HubOptions,
    QuickstartConfig,
    RunConfig,
    TrainConfig,
)
from .console import note, say, show_table
from .data.files import check_there, is_hub_id, local_paths
from .errors import UsageError
from .integrations.files import ADAPTER_FILE
from .integrations.hub import check_push, place_of
from .integrations.sources import base_of_adapter, local_model
from .protocols import TrlConfig


def show_dry_run(
    config: RunConfig,
    models: Iterable[str | None],  # as the verbs take them
    data: Iterable[str | None] = (),  # text or rows
    files: Iterable[str | None] = (),  # others: plans, quantized checkpoints
) -> dict[str, Any]:
    """Refuse what is missing, then print the resolved configuration and return it."""
    check_inputs(models, data, files)
    if isinstance(config, HubOptions | TrainConfig):
        check_push(config.upload()[0])
    resolved = config.resolved()
    show_table("resolved configuration", ["key", "value"], [[key, str(value)] for key, value in resolved.items()])
    for line in _effective(config):
        say(line)
    return resolved


def check_inputs(models: Iterable[str | None], data: Iterable[str | None], files: Iterable[str | None]) -> None:
    """UsageError for the first that is not there; a note for those that are of the Hub."""
    for name in models:
        if name is None:
            continue
        found = local_model(name)
        if found is None:
            note(f"{name} is not on this machine; a run would look for it on the Hugging Face Hub")
        elif (found / ADAPTER_FILE).is_file() and not (found / "config.json").is_file():
            base_of_adapter(found)
    for name in data:
        if name is None:
            continue
        check_there(name)
        if is_hub_id(name):
            note(f"{name} is no file here; a run would look for a data set of this name on the Hugging Face Hub")
        elif not local_paths(name):
            raise UsageError(f"No file matches {name}; check the pattern.")
    for name in files:
        if name is not None and not Path(name).expanduser().exists():
            raise UsageError(f"{name} does not exist; check the path.")


def _effective(config: RunConfig) -> list[str]:
    """What is read and trained on, in words."""
    lines = []
    if isinstance(config, DecomposeConfig | CorrectConfig | CompareConfig) and config.calibration:
        windows = -(-config.calibration_tokens // config.context_length)
        lines.append(
            f"calibration: {windows * config.context_length:,} tokens in {windows} windows of "
            f"{config.context_length:,}, or of what the model takes if less, and a sixteenth more held out"
        )
    if isinstance(config, EvaluateConfig) and config.text:
        most = "all" if config.max_tokens is None else f"at most {config.max_tokens:,}"
        lines.append(f"text: {most} tokens of each, in windows of {config.context_length:,}")
    if isinstance(config, CompareConfig) and config.steps:
        rates = ", ".join(f"{rate:g}" for rate in config.rates())
        lines.append(_training(config.steps, 1, config.max_length, f"learning rate {rates}"))
    if isinstance(config, QuickstartConfig):
        lines.append(_training(config.steps, 1, 256, "learning rate 3e-05 and 0.0001"))
    if isinstance(config, HubOptions | TrainConfig):
        repo, private = config.upload()
        if repo is not None:
            what = f"{config.output_dir} without its checkpoints" if isinstance(config, TrainConfig) else config.out
            lines.append(f"upload: {what} to {place_of(repo, private)}")
    return lines


def _training(steps: int, sequences: int, length: int, rate: str) -> str:
    tokens = sequences * length
    told = f"training: {steps} steps of {sequences} sequence of at most {length:,} tokens"
    return f"{told}, {steps * tokens:,} in all, {rate}"


def show_steps(arguments: TrlConfig) -> dict[str, Any]:
    """What a training step is made of; returned under the names of `effective`."""
    here, batches, processes = (
        arguments.per_device_train_batch_size,
        arguments.gradient_accumulation_steps,
        arguments.world_size,
    )
    sequences = here * batches * processes
    length = arguments.max_length
    tokens = None if length is None else sequences * length
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    per = "" if tokens is None else f" of at most {length:,} tokens, {tokens:,} tokens"
    say(
        f"a step: {here} sequences at once x {batches} accumulated x {processes} processes = {sequences} sequences{per}"
    )
    schedule = vars(arguments)["lr_scheduler_type"]
    schedule, warmup = getattr(schedule, "value", schedule), float(vars(arguments)["warmup_steps"])
    whole = f"{arguments.num_train_epochs:g} passes over the rows" if steps is None else f"{steps:,} steps"
    total = "" if steps is None or tokens is None else f", at most {steps * tokens:,} tokens"
    say(
        f"learning rate {arguments.learning_rate:g}, {schedule}, rising for {warmup:g} "
        f"{'of the' if warmup < 1 else ''} steps; {whole}{total}".replace("  ", " ")
    )
    return {
        "learning_rate": arguments.learning_rate,
        "sequences_per_step": sequences,
        "tokens_per_step": tokens,
        "processes": processes,
        "steps": steps,
        "epochs": None if steps is not None else arguments.num_train_epochs,
    }
