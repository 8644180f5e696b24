"""The searching passes: whole models that an allocator proposes, one after the other, on text held out for it.

A trial is a walk over the blocks: each block is loaded once, its layers are put in their places, cut from the bases
that the calibrating pass kept, the hidden states go through it, and the original layers come back. Nothing is
factorized and no model is copied: a trial holds one block, in the form plain, which computes what pivoted factors do.
The logarithms of the original's probabilities stay in a file, in float16: to run its head again for every trial took
as long as a trial's blocks.

First random models run on all of the text, which chooses the windows that the search itself runs on (its own walk).
Every model that was run is a line of the journal: a run that was killed continues with the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..allocation import PLAIN, Bolaco, Score, Search, Trial
from ..calibration.states import StateFile, StateWriter
from ..calibration.task import Task
from ..errors import CalibrationError, UsageError
from ..plans import Plan
from .choices import Measured, Menu, Sized
from .decide import Request
from .passes import Passes
from .shards import to_meta
from .sharing import share_out
from .steps import Phase, of_block
from .writing import factorize

ORIGINAL, TRIAL = "original", "trial"  # streams
PROBED = "probe"  # with "trial": kinds of models that are run, as the journal names them
Predicted = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


def predictable(task: Task) -> Predicted:
    """The task's logits; UsageError for a model that has none."""
    if task.predicted is None:
        raise UsageError(
            "A model without a language-model head has no loss on text, by which `allocation` bolaco searches; choose "
            "another allocation, for example uniform."
        )
    return task.predicted


def search(run: Passes, request: Request, measured: dict[str, Measured], rest: int) -> Search:
    """All models that the request's allocator runs, or an earlier process ran for it."""
    sized, windows = request.budget, run.text.validation
    assert isinstance(sized, Sized) and isinstance(sized.allocator, Bolaco)
    if windows is None or len(windows) < 2:
        raise CalibrationError("The text that is held out for the search fills no two windows; give more text.")
    rule, layers, template = sized.allocator, run.survey.layers, request.template
    names = rule.names(Menu(layers, template, sized).table(measured))
    passes: dict[Phase, _Models] = {}

    def evaluate(point: dict[str, float], chosen: list[int] | None) -> list[Score]:
        phase = Phase.PROBING if chosen is None else Phase.SEARCHING
        if phase not in passes:
            for other in passes.values():
                other.forget()
            passes[phase] = _Models(run, phase, windows if chosen is None else windows[chosen])
        plan = share_out(layers, template, replace(sized, allocator=rule.at(point)), rest, measured)
        return passes[phase].scores(plan)

    def record(kind: str, trial: Trial) -> None:
        number = sum(step.startswith(f"{kind}/") for step in run.journal.steps)
        run.journal.commit(f"{kind}/{number}", point=trial.point, scores=[asdict(score) for score in trial.scores])
        phase, total = (Phase.PROBING, rule.probes) if kind == PROBED else (Phase.SEARCHING, rule.trials)
        run.clock.report(phase, number, total=total)

    earlier = Search(rule, _recorded(run, PROBED), _recorded(run, TRIAL))
    count = max(1, len(windows) // 2)
    found = rule.search(names, evaluate, count, request.seed, earlier, record, lambda p: run.workers.send(p, 0))
    for other in passes.values():
        other.forget()
    return found


def _recorded(run: Passes, kind: str) -> list[Trial]:
    """The models of the journal."""
    lines = [line for step, line in run.journal.steps.items() if step.startswith(f"{kind}/")]
    return [Trial(line["point"], [Score(**score) for score in line["scores"]]) for line in lines]


class _Models:
    """Whole models on the same windows, and the original they are compared with."""

    def __init__(self, run: Passes, phase: Phase, windows: Tensor):
        self._run, self._windows = run, windows
        self._predicted = predictable(run.task)
        self._prepared = torch.cat([run.task.prepare(window[None]) for window in windows])
        streams = {ORIGINAL: self._prepared, TRIAL: self._prepared}
        self._walk = run.walk(streams, phase, alike=True)
        for index in range(run.count if self._walk.streamed else 0):
            step = of_block(phase, index)
            if not run.journal.has(step):
                with run.loaded(index):
                    self._walk.advance(index, ORIGINAL)
                run.journal.commit(step)
                self._walk.forget(index - 1, [ORIGINAL])
        self._file = run.journal.work / f"states-{phase}" / f"original-{run.workers.rank}.bin"
        if self._walk.streamed and not self._file.is_file():
            self._walk.hand_out(ORIGINAL, windows)  # a masked model's corrupted ids are drawn again by its head
            with run.outside_loaded(), StateWriter(self._file) as target:
                for logits, _ in self._walk.answers(ORIGINAL, self._padded):
                    target.append(logits)

    def _padded(self, model: Any, window: Tensor) -> tuple[Tensor, int]:
        """Log-probabilities (length, vocabulary) of as many tokens as a window may predict, and of how many it does."""
        logits, labels = self._predicted(model, window)
        found = logs_of(logits).half()
        return torch.nn.functional.pad(found, (0, 0, 0, window.shape[1] - len(found))), len(labels)

    def scores(self, plan: Plan) -> list[Score]:
        """Of every window, in their order."""
        plan = Plan({name: replace(choice, form=PLAIN) for name, choice in plan.layers.items()})
        own = self._streamed(plan) if self._walk.streamed else self._whole(plan)
        parts = self._run.workers.gather(own)
        return [parts[i % len(parts)][i // len(parts)] for i in range(len(self._windows))]

    def forget(self) -> None:
        """Remove the files: no model will be run any more."""
        if self._walk.streamed:
            self._file.unlink(missing_ok=True)
            for index in range(self._run.count + 1):
                self._walk.forget(index, [ORIGINAL, TRIAL])

    def _streamed(self, plan: Plan) -> list[Score]:
        run, walk = self._run, self._walk
        walk.hand_out(TRIAL, self._prepared)
        for index in range(run.count):
            with run.loaded(index), self._installed(plan, index):
                walk.advance(index, TRIAL)
            if index > 0:  # what block 0 needs is the same for every model
                walk.forget(index, [TRIAL])
        walk.hand_out(TRIAL, self._windows)
        if not len(walk.windows[TRIAL]):  # fewer windows than processes
            return []
        with run.outside_loaded(), closing(StateFile(self._file)) as original:
            found = enumerate(walk.answers(TRIAL, self._predicted))
            return [compared(original[position], *own) for position, own in found]

    def _whole(self, plan: Plan) -> list[Score]:
        found = []
        with self._run.loaded(0), torch.no_grad():
            for window in self._walk.share(TRIAL, self._windows):
                original = logs_of(self._predicted(self._run.model, window[None])[0])
                with self._installed(plan, 0):
                    found.append(compared(original, *self._predicted(self._run.model, window[None])))
        return found

    @contextmanager
    def _installed(self, plan: Plan, index: int) -> Iterator[None]:
        """The block with the plan's layers in it."""
        run = self._run
        made = factorize(run, plan, index, None, True, list(run.survey.members(index)))
        layers = {name: finished.layer for name, finished in made.items() if finished.layer is not None}
        dense = {name: run.survey.layers[name].install(run.model, layer) for name, layer in layers.items()}
        try:
            yield
        finally:
            for name, module in dense.items():
                run.model.set_submodule(name, module)
            for layer in layers.values():
                to_meta(layer)


def logs_of(logits: Tensor) -> Tensor:
    """Logarithms of the probabilities, finite in float16: a vocabulary may have entries that are never predicted."""
    return logits.log_softmax(-1).clamp_(min=-1e4)


def compared(
    original: Tensor,  # (at least tokens, vocabulary) logarithms of the probabilities
    logits: Tensor,  # (tokens, vocabulary)
    labels: Tensor,  # (tokens,)
) -> Score:
    """Loss, and KL(own || original), summed over the tokens."""
    logs = logs_of(logits)
    loss = torch.nn.functional.nll_loss(logs, labels.to(logs.device), reduction="sum")
    difference = logs - original[: len(logs)].to(logs)
    divergence = torch.linalg.vecdot(logs.exp_(), difference).double().sum()
    return Score(float(loss), float(divergence), len(labels))
