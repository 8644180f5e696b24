"""The sensitivity pass: gradients of the loss, block by block from the last to the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..calibration.collect import BlockWalk
from ..calibration.sensitivity import (
    fisher_means,
    output_grams,
    output_sensitivity,
    shrunk,
    whole_model_fisher,
    whole_model_output_grams,
    whole_model_sensitivity,
)
from ..factorizations import Factorization
from ..storage import write_tensors
from .passes import SENSITIVITY, Passes
from .steps import Phase, of_block, start_of

Bases = Callable[[int], dict[str, Tensor]]  # block -> layer -> (out, k): the directions whose cost is wanted
Methods = Mapping[str, Factorization]  # by layer


def measure_gradients(run: Passes, methods: Methods, predicts: bool) -> None:
    """What the layers' methods need of the gradients: squared ones by the weight, second moments of those by the
    output, and where these foresee the loss (`predicts`) those of the inputs as the loss notices them. The blocks only
    run before it."""
    walk = run.walk({SENSITIVITY: run.prepared()}, Phase.FORWARD)
    for index in range(run.count if walk.streamed else 0):
        step = of_block(Phase.FORWARD, index)
        if not run.journal.has(step):
            with run.loaded(index):
                walk.advance(index, SENSITIVITY)
                run.compare(walk, index)
            run.journal.commit(step)
            run.clock.report(Phase.FORWARD, index)
    run.compare_result(walk)
    _pass_back(run, walk, lambda index: _moments(run, walk, index, methods, predicts))


def measure_sensitivity(run: Passes, walk: BlockWalk, bases: Bases) -> None:
    """Of each layer's output directions `bases`."""
    _pass_back(run, walk, lambda index: _sensitivity(run, walk, index, bases(index)))


def _pass_back(run: Passes, walk: BlockWalk, measure: Callable[[int], dict[str, Tensor]]) -> None:
    """A file per block with what is measured on it while the gradients pass."""
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
            found = measure(index)
        path = run.journal.work / sensitivity_file(index)
        digest = write_tensors(path, found) if run.journal.writes else None
        run.journal.commit(step, path, digest)
        run.clock.report(Phase.SENSITIVITY, index)
        if walk.streamed:
            walk.forget_gradients(index, SENSITIVITY)


def _sensitivity(run: Passes, walk: BlockWalk, index: int, directions: dict[str, Tensor]) -> dict[str, Tensor]:
    modules, windows = run.modules(index), run.text.sensitivity
    modules, tokens = {name: modules[name] for name in directions}, windows.numel()
    if walk.streamed:
        return output_sensitivity(walk, index, SENSITIVITY, modules, directions, tokens, run.workers)
    own = walk.share(SENSITIVITY, windows)
    return whole_model_sensitivity(run.model, own, modules, directions, run.task.loss, tokens, run.workers)


def _moments(run: Passes, walk: BlockWalk, index: int, methods: Methods, predicts: bool) -> dict[str, Tensor]:
    """The backward pass is repeated where a plan's methods need both kinds, and where they need none here: the blocks
    before this one need the gradients."""
    windows = run.text.sensitivity
    own = walk.share(SENSITIVITY, windows)
    by_weight, by_output = (_needing(run, index, methods, kind) for kind in ("fisher", "output_gram"))
    shapes = {name: site.shape for name, site in run.survey.members(index).items()}
    found: dict[str, Tensor] = {}
    if by_weight or not by_output:
        count = len(windows)
        if walk.streamed:
            found |= fisher_means(walk, index, SENSITIVITY, by_weight, shapes, count, run.workers)
        else:
            found |= whole_model_fisher(run.model, own, by_weight, shapes, run.task.loss, count, run.workers)
    if by_output:
        count = windows.numel()
        if walk.streamed:
            found |= output_grams(walk, index, SENSITIVITY, by_output, shapes, count, run.workers, predicts)
        else:
            found |= whole_model_output_grams(
                run.model, own, by_output, shapes, run.task.loss, count, run.workers, predicts
            )
    return found


def _needing(run: Passes, index: int, methods: Methods, kind: str) -> dict[str, nn.Module]:
    """The layers of the block whose methods need this statistic."""
    return {
        name: module for name, module in run.modules(index).items() if name in methods and kind in methods[name].needs
    }


def gram_beside(gradients: Mapping[str, Tensor], name: str, backbone: bool) -> Tensor | None:
    """(out, out): what weighs the outputs of a layer, with or without a backbone; None where nothing measured it."""
    gram = gradients.get(f"{name}:gram")
    return shrunk(gram, gradients[f"{name}:chance"]) if backbone and gram is not None else gram


def sensitivity_file(index: int) -> str:
    return f"sensitivity-{index:05d}.safetensors"
