"""The writing pass: carry out the plan, block by block, and write one shard per block."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..calibration.collect import BlockWalk
from ..calibration.moments import Moments
from ..errors import UsageError
from ..factorizations import Fisher
from ..layers import FactoredLinear
from ..plans import LayerPlan, Plan, TablePlan
from ..storage import write_tensors
from .calibrating import analyses, collect
from .decide import Request
from .embedding import RoundedTable, show_tables, table_tensors
from .gradients import gram_beside, sensitivity_file
from .head_inputs import head_gram, head_table
from .layerwise import Analysis, Finished, install, left_dense, project_layer, split_layer
from .passes import CALIBRATION, HELDOUT, Passes, Statistics
from .recovery import STUDENT, STUDENT_HELDOUT, tune_block
from .shards import Loaded, shard_name, shard_of, to_meta, untouched
from .sharing import NEVER_RAN
from .steps import REST, Phase, of_block


def write(run: Passes, plan: Plan, request: Request, from_analysis: bool) -> None:
    """Factorize as planned and write one shard per block. With `from_analysis` the factors are cut from what the
    calibrating pass kept; otherwise this pass calibrates."""
    walk = _walk(run, request, from_analysis) if plan.factored() else None
    student = request.recovery is not None
    handed_on = [STUDENT, STUDENT_HELDOUT] if student else [CALIBRATION, HELDOUT]
    if not student and request.propagate != "sequential":
        handed_on = []
    for index in range(run.count):
        step = of_block(Phase.WRITING, index)
        if run.journal.has(step):
            _show_plans(run, step)
            continue
        with run.loaded(index) as loaded:
            if walk is not None:
                run.compare(walk, index)
            statistics = _statistics(run, walk, index, request, from_analysis)
            if run.made:
                done = run.made.restored(run.journal, index, run.read)
            else:
                done = factorize(run, plan, index, statistics, from_analysis)
            del statistics
            layers = {name: finished.layer for name, finished in done.items() if finished.layer is not None}
            for name, layer in layers.items():
                dense = run.survey.layers[name].install(run.model, layer)
                to_meta(dense)  # hooks that were removed from it left a circle of references: it would stay for long
                del dense
            recovered = None
            if walk is not None and request.recovery is not None:
                recovered = tune_block(walk, index, layers, request.recovery, run.workers)
            if walk is not None and index + 1 < run.count:
                for stream in handed_on:
                    walk.advance(index, stream)
            path = run.journal.folder / shard_name(index, run.shards)
            tensors = shard_of(run.source, loaded.names, layers) if run.journal.writes else {}
            digest = write_tensors(path, tensors) if run.journal.writes else None
            content = {
                "layers": {name: dataclasses.asdict(finished.record) for name, finished in done.items()},
                "plans": {name: layer.plan.to_dict() for name, layer in layers.items()},
                "tensors": list(tensors),
                "recovery": recovered,
            }
            del tensors
            for layer in layers.values():
                to_meta(layer)
        run.journal.commit(step, path, digest, **content)
        run.clock.report(Phase.WRITING, index, {name: finished.record for name, finished in done.items()})
        if walk is not None and walk.streamed:
            walk.forget(index - 1, list(walk.windows))
    if walk is not None:
        run.compare_result(walk)


def _walk(run: Passes, request: Request, from_analysis: bool) -> BlockWalk | None:
    """None where nothing runs the blocks: without text, or with all that is needed analysed already."""
    student = request.recovery is not None
    if run.windows is None or (from_analysis and not student):
        return None
    streams = {CALIBRATION: run.windows.calibration, HELDOUT: run.windows.heldout}
    if student:
        streams |= {STUDENT: run.windows.calibration, STUDENT_HELDOUT: run.windows.heldout}
    walk = run.walk(streams, Phase.WRITING)
    if student and not walk.streamed:
        raise UsageError(
            "The model has no repeated blocks that could be recovered one by one; leave `recover_epochs` out."
        )
    return walk


def _statistics(
    run: Passes, walk: BlockWalk | None, index: int, request: Request, from_analysis: bool
) -> Statistics | None:
    """Of the inputs that this pass calibrates on; None where it does not. The original block's outputs are written on
    the way where somebody needs them: the next block, or block-wise recovery."""
    sequential = request.propagate == "sequential"
    if walk is None:
        return None
    if request.recovery is None:
        return collect(run, walk, index, keep=not (sequential or index + 1 == run.count))
    if sequential or from_analysis:
        for stream in (CALIBRATION, HELDOUT):
            walk.advance(index, stream)
    if from_analysis:
        return None
    if not sequential:
        return collect(run, walk, index, keep=True)
    streams = (STUDENT, STUDENT_HELDOUT)
    found = walk.collect(index, run.modules(index), False, (STUDENT_HELDOUT,), streams)
    return {CALIBRATION: found[STUDENT], HELDOUT: found[STUDENT_HELDOUT]}


def factorize(
    run: Passes,
    plan: Plan,
    index: int,
    statistics: Statistics | None,
    from_analysis: bool,  # L R without Q is cut from what the calibrating pass kept
    only: list[str] | None = None,  # of the block's layers, without their errors
) -> dict[str, Finished]:
    """The layers of the block in memory."""
    members = {n: site for n, site in run.survey.members(index).items() if only is None or n in only}
    methods = {name: plan.layers[name].factorization() for name in members}
    kept: dict[str, Analysis | None] = analyses(run, index) if from_analysis else {}
    weighed = any(method.needs & {"fisher", "output_gram"} for method in methods.values())
    gradients = {}
    if weighed and not (from_analysis and statistics is None):
        gradients = run.read(sensitivity_file(index), ":gram", ":chance", ":rows", ":columns")
    # in the middle of the model, one layer of each shape is compared with feedback rounding alone
    middle = only is None and index == run.count // 2
    compared = {site.shape: name for name, site in reversed(members.items())} if middle else {}

    def finish(name: str) -> Finished:
        site, choice = members[name], plan.layers[name]
        module = site.module(run.model)
        analysis = kept.get(name)
        calibration = heldout = None
        if statistics is not None:
            calibration, heldout = statistics[CALIBRATION].get(name), statistics.get(HELDOUT, {}).get(name)
        if (from_analysis and analysis is None) or (statistics is not None and calibration is None):
            return left_dense(module, 0.0, NEVER_RAN)
        if choice.rank is None:
            return left_dense(module, 0.0 if analysis is None else analysis.facts["seconds"], choice.reason)
        if analysis is not None and choice.backbone == "none" and not choice.rounds_factors:
            return install(module, analysis, choice)
        assert calibration is None or isinstance(calibration, Moments)
        output_gram = gram_beside(gradients, name, choice.backbone != "none")
        if choice.backbone == "none":
            return project_layer(module, calibration, heldout, choice, output_gram)
        given = None if run.given is None else run.given.parts(name, choice)
        compare = choice.rank > 0 and compared.get(site.shape) == name and given is None
        fisher = _fisher(name, gradients)
        return split_layer(module, calibration, heldout, choice, fisher, compare, output_gram, only is None, given)

    return run.deal(index, methods, finish)


def _fisher(name: str, gradients: dict[str, Tensor]) -> Fisher | None:
    if f"{name}:rows" not in gradients:
        return None
    return Fisher(gradients[f"{name}:rows"].sqrt(), gradients[f"{name}:columns"].sqrt())


def _show_plans(run: Passes, step: str) -> None:
    """Give the skeleton the layers of a block that an earlier process wrote."""
    for name, content in run.journal.steps[step]["plans"].items():
        site: Any = run.survey.layers[name]
        site.install(run.model, FactoredLinear(LayerPlan.from_dict(name, content), device="meta", dtype=site.dtype))


def write_rest(run: Passes, tables: Mapping[str, TablePlan]) -> None:
    """The shard of everything outside the blocks, with the embeddings that are stored in another format; shows these
    in the skeleton."""
    if not (run.blocks.whole or run.journal.has(REST)):
        _write_rest(run, tables)
    show_tables(run.model, tables)


def _write_rest(run: Passes, tables: Mapping[str, TablePlan]) -> None:
    path = run.journal.folder / shard_name(run.count, run.shards)
    tensors: dict[str, Tensor] = {}
    digest = None
    rounded: dict[str, RoundedTable] = {}
    gram, head = head_gram(run), head_table(run.model, tables)
    if run.journal.writes:
        replaced = {f"{name}.weight" for name in tables}
        stored = {name: run.source.stored(name) for name in run.outside if name not in replaced}
        with Loaded(run.source, [name for name, tensor in stored.items() if tensor is None], run.model):
            tensors = {n: untouched(run.source, n) if t is None else t for n, t in stored.items()}
        for name, table in tables.items():
            made, rounded[name] = table_tensors(run.source, name, table, gram if name == head else None)
            tensors |= made
        digest = write_tensors(path, tensors)
    run.journal.commit(REST, path, digest, tensors=list(tensors), rounded=run.workers.send(rounded, 0))
