"""What a training run says while it goes: a line per logging step, and the curve at every save."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from ..console import duration, note
from .curve import draw

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ..protocols import TrainerLike

CURVE = "loss_curve.png"


class ShowProgress(TrainerCallback):
    """In place of transformers' printed dicts. Active on the main process only."""

    def __init__(self, trainer: TrainerLike, title: str, unit: str):
        self._trainer, self._title, self._unit = trainer, title, unit
        self._start = self._first = 0.0
        self._last_time, self._last_tokens = 0.0, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._start = self._last_time = time.monotonic()
        self._first = state.global_step
        self._last_tokens = getattr(self._trainer, "_total_train_tokens", 0)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        self._last_time += (metrics or {}).get("eval_runtime", 0.0)  # not training: it counts in no tokens/s

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if state.is_world_process_zero and state.global_step == self._first + 1 < state.max_steps:
            seconds = time.monotonic() - self._start
            left = duration((state.max_steps - state.global_step) * seconds)
            note(f"  the first step took {seconds:.1f} s; about {left} for the others")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if not state.is_world_process_zero or not logs or not ({"loss", "eval_loss"} & set(logs)):
            return
        step = str(state.global_step).rjust(len(str(state.max_steps)))
        note(f"  step {step}/{state.max_steps}  " + ("  ".join(self._words(state, logs))))

    def _words(self, state: TrainerState, logs: dict[str, float]) -> list[str]:
        if "eval_loss" in logs:
            return [
                f"{name.replace('eval_', 'eval ')} {logs[name]:.4f}"
                for name in ("eval_loss", "eval_kl")
                if name in logs
            ]
        words = [f"{name} {logs[name]:.4f}" for name in ("loss", "kl", "ce") if name in logs]
        if "rewards/accuracies" in logs:
            words.append(f"accuracy {logs['rewards/accuracies']:.2f}")
        words.append(f"lr {logs['learning_rate']:.2e}")
        now, tokens = time.monotonic(), getattr(self._trainer, "_total_train_tokens", 0)
        if tokens > self._last_tokens:
            words.append(f"{(tokens - self._last_tokens) / max(now - self._last_time, 1e-9):,.0f} tokens/s")
        self._last_time, self._last_tokens = now, tokens
        done = state.global_step - self._first
        if done:
            words.append(f"{duration((state.max_steps - state.global_step) * (now - self._start) / done)} left")
        return words

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if args.output_dir is not None:
            self.draw(state, Path(args.output_dir))

    def draw(self, state: TrainerState, output: Path) -> None:
        if state.is_world_process_zero:
            draw(state.log_history, output / CURVE, self._title, self._unit)
