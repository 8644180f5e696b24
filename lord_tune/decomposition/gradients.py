"""The sensitivity pass: gradients of the loss, block by block from the last to the first."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..calibration.collect import BlockWalk
from ..calibration.sensitivity import fisher_means, output_sensitivity, whole_model_fisher, whole_model_sensitivity
from ..storage import write_tensors
from .passes import SENSITIVITY, Passes
from .steps import Phase, of_block, start_of

Bases = Callable[[int], dict[str, Tensor]]  # block -> layer -> (out, k): the directions whose cost is wanted


def measure_fisher(run: Passes) -> None:
    """Squared gradients by every weight, for methods that weigh with them."""
    walk = run.walk({SENSITIVITY: run.prepared()}, Phase.CALIBRATING)
    for index in range(run.count if walk.streamed else 0):
        step = of_block(Phase.CALIBRATING, index)
        if not run.journal.has(step):
            with run.loaded(index):
                walk.advance(index, SENSITIVITY)
                run.compare(walk, index)
            run.journal.commit(step)
            run.clock.report(Phase.CALIBRATING, index)
    run.compare_result(walk)
    measure_sensitivity(run, walk, None)


def measure_sensitivity(run: Passes, walk: BlockWalk, bases: Bases | None) -> None:
    """Of each layer's output directions `bases`; without them, of its weights' rows and columns. A file per block."""
    if walk.streamed and not run.journal.has(start_of(Phase.SENSITIVITY)):
        # the corrupted ids of a masked model are drawn again by the loss itself: the same ones
        walk.hand_out(SENSITIVITY, run.text.sensitivity)
        with run.outside_loaded():
            walk.write_gradients(SENSITIVITY, run.task.loss)
        run.journal.commit(start_of(Phase.SENSITIVITY))
    for index in reversed(range(run.count)):
        step = of_block(Phase.SENSITIVITY, index)
        if run.journal.has(step):
            continue
        with run.loaded(index):
            found = _block_sensitivity(run, walk, index, bases)
        path = run.journal.work / sensitivity_file(index)
        digest = write_tensors(path, found) if run.journal.writes else None
        run.journal.commit(step, path, digest)
        run.clock.report(Phase.SENSITIVITY, index)
        if walk.streamed:
            walk.forget_gradients(index, SENSITIVITY)


def _block_sensitivity(run: Passes, walk: BlockWalk, index: int, bases: Bases | None) -> dict[str, Tensor]:
    modules, windows = run.modules(index), run.text.sensitivity
    if bases is None:
        shapes = {name: site.shape for name, site in run.survey.members(index).items()}
        if walk.streamed:
            return fisher_means(walk, index, SENSITIVITY, modules, shapes, len(windows), run.workers)
        own = walk.share(SENSITIVITY, windows)
        return whole_model_fisher(run.model, own, modules, shapes, run.task.loss, len(windows), run.workers)
    directions, tokens = bases(index), windows.numel()
    modules = {name: modules[name] for name in directions}
    if walk.streamed:
        return output_sensitivity(walk, index, SENSITIVITY, modules, directions, tokens, run.workers)
    own = walk.share(SENSITIVITY, windows)
    return whole_model_sensitivity(run.model, own, modules, directions, run.task.loss, tokens, run.workers)


def sensitivity_file(index: int) -> str:
    return f"sensitivity-{index:05d}.safetensors"
