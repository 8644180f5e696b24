"""The measuring pass: the loss of whole models on the held-out text, for several plans at once and before any is
written.

Every plan is a stream of hidden states. A block is loaded once; for each plan its layers are put in their places, the
plan's stream goes through the block, and the original layers come back. Layers that plans have in common are made once
per block. So N plans cost N forward passes over the held-out text, and no more memory than the layers of one block in
the plans' forms.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import torch

from ..calibration.route import Score
from ..calibration.task import Task
from ..errors import UsageError
from ..layers import FactoredLinear
from ..plans import LayerChoice, Plan
from .calibrating import collect
from .passes import CALIBRATION, HELDOUT, Passes, Statistics
from .shards import to_meta
from .steps import Phase, of_block
from .writing import factorize

Pair = tuple[float, int]  # summed loss, tokens


def measure(run: Passes, plans: Mapping[str, Plan], analysed: bool, kept: str | None = None) -> dict[str, float]:
    """Plan's name -> loss on the held-out text, nats per token. `analysed`: the calibrating pass has looked at every
    layer, from which L R without Q is cut. The layers of the plan `kept` are those that will be written."""
    score, text = scored(run.task), run.text
    heldout = torch.cat([run.task.prepare(window[None]) for window in text.heldout])
    streams = {name: f"plan{number}" for number, name in enumerate(plans)}
    choices = [choice for plan in plans.values() for choice in plan.factored().values()]
    cut = analysed and all(choice.backbone == "none" and not choice.rounds_factors for choice in choices)
    walked = {} if cut else {CALIBRATION: text.calibration, HELDOUT: text.heldout}
    walk = run.walk(walked | dict.fromkeys(streams.values(), heldout), Phase.MEASURING)
    own: dict[str, Pair] = {}
    for index in range(run.count):
        step = of_block(Phase.MEASURING, index)
        if run.journal.has(step):
            continue
        with run.loaded(index):
            run.compare(walk, index)
            statistics: Statistics | None = collect(run, walk, index, index + 1 < run.count) if walked else None
            made: dict[str, FactoredLinear | None] = {}
            if kept is not None:
                done = factorize(run, plans[kept], index, statistics, analysed)
                run.made.keep(run.journal, index, done)
                made = {_key(layer, plans[kept].layers[layer]): finished.layer for layer, finished in done.items()}
            for name, plan in plans.items():
                keys = _make(run, plan, index, statistics, analysed, made)
                dense = {}
                for layer, key in keys.items():
                    replacement = made[key]
                    if replacement is not None:
                        dense[layer] = run.survey.layers[layer].install(run.model, replacement)
                if walk.streamed:
                    walk.advance(index, streams[name])
                else:
                    windows = walk.share(streams[name], text.heldout)
                    with torch.no_grad():
                        own[name] = _sum([_plain(score(run.model, window[None])) for window in windows])
                for layer, module in dense.items():
                    run.model.set_submodule(layer, module)
            for replacement in made.values():
                if replacement is not None:
                    to_meta(replacement)
        found = {name: _sum(run.workers.gather(pair)) for name, pair in own.items()}
        run.journal.commit(step, losses=found)
        run.clock.report(Phase.MEASURING, index)
        if walk.streamed:
            walk.forget(index - 1, list(walk.windows))
    run.compare_result(walk)
    if walk.streamed:
        with run.outside_loaded():
            for name, stream in streams.items():
                walk.hand_out(stream, text.heldout)  # a masked model's corrupted ids are drawn again by its loss
                own[name] = _sum(walk.scores(stream, score))
        found = {name: _sum(run.workers.gather(pair)) for name, pair in own.items()}
    else:
        found = {name: tuple(pair) for name, pair in run.journal.steps[step]["losses"].items()}
    return {name: loss / max(tokens, 1) for name, (loss, tokens) in found.items()}


def scored(task: Task) -> Score:
    """The task's loss with the tokens it is the sum of; UsageError for a model that has none."""
    if task.scored is None:
        raise UsageError(
            "A model without a language-model head has no loss on text, so that no plan can be measured; leave "
            "`refine`, `measure_control` and `measure` out."
        )
    return task.scored


def _make(
    run: Passes,
    plan: Plan,
    index: int,
    statistics: Statistics | None,
    analysed: bool,
    made: dict[str, FactoredLinear | None],  # by key, of earlier plans: added to
) -> dict[str, str]:
    """The layers of a block as the plan has them; returns layer -> key."""
    keys = {layer: _key(layer, plan.layers[layer]) for layer in run.survey.members(index)}
    new = [layer for layer, key in keys.items() if key not in made]
    for layer, finished in factorize(run, plan, index, statistics, analysed, new).items():
        made[keys[layer]] = finished.layer
    return keys


def _key(layer: str, choice: LayerChoice) -> str:
    """What makes two plans' layers the same."""
    same = dataclasses.replace(choice, predicted_loss=None, reason=None)
    return json.dumps([layer, same.to_dict()], sort_keys=True)


def _plain(pair: tuple[torch.Tensor, int]) -> Pair:
    return float(pair[0]), pair[1]


def _sum(scores: list[Pair]) -> Pair:
    return sum(loss for loss, _ in scores), sum(count for _, count in scores)
