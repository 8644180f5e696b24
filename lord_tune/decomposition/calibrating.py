"""The calibrating pass: analyse every layer at every rank, for budgets that are shared out by the spectra."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..allocation import break_even
from ..calibration.collect import BlockWalk
from ..calibration.moments import Moments
from ..factorizations import Projection
from ..storage import write_tensors
from .choices import Measured, Sized
from .decide import Request
from .gradients import gram_beside, measure_sensitivity, sensitivity_file
from .layerwise import Analysis, analyse
from .noise import noise_of
from .passes import CALIBRATION, HELDOUT, SENSITIVITY, Passes, Statistics
from .steps import Phase, of_block


def calibrate(run: Passes, request: Request) -> dict[str, Measured]:
    """Analyse every block, keeping what the sensitivity pass needs on the way; returns what is known of the layers that
    ran."""
    streams = {CALIBRATION: run.text.calibration, HELDOUT: run.text.heldout}
    if request.by_loss:
        streams[SENSITIVITY] = run.prepared()
    walk = run.walk(streams, Phase.CALIBRATING)
    for index in range(run.count):
        step = of_block(Phase.CALIBRATING, index)
        if run.journal.has(step):
            continue
        with run.loaded(index):
            found = _analyse_block(run, walk, index, request)
            if request.by_loss and walk.streamed:
                walk.advance(index, SENSITIVITY)
            run.compare(walk, index)
        path = run.journal.work / _analysis_file(index)
        tensors = {f"{n}:{k}": t for n, a in found.items() if a is not None for k, t in a.tensors().items()}
        digest = write_tensors(path, tensors) if run.journal.writes else None
        facts = {name: None if analysis is None else analysis.facts for name, analysis in found.items()}
        del found, tensors  # not beside those of the next block
        run.journal.commit(step, path, digest, layers=facts)
        run.clock.report(Phase.CALIBRATING, index)
        # one step late: another process may die before process 0 has recorded this one
        if walk.streamed:
            walk.forget(index - 1, [CALIBRATION, HELDOUT])
    run.compare_result(walk)
    if request.by_loss:
        measure_sensitivity(run, walk, lambda index: _bases(run, index))
    return _measured(run, request)


def _analyse_block(run: Passes, walk: BlockWalk, index: int, request: Request) -> dict[str, Analysis | None]:
    statistics = collect(run, walk, index, keep=index + 1 < run.count)
    gradients = run.read(sensitivity_file(index)) if request.gradients_first else {}
    method, form = request.template.factorization(), request.template.form
    budget = request.budget
    assert isinstance(method, Projection) and isinstance(budget, Sized), "decide refuses methods without nested ranks"
    formats = {name: (template.quantizer(), ranked) for name, (template, ranked) in budget.formats.items()}

    def look(name: str) -> Analysis | None:
        calibration = statistics[CALIBRATION].get(name)
        if calibration is None:  # it never ran
            return None
        assert isinstance(calibration, Moments)
        weight = run.survey.layers[name].weight(run.model)
        limit = None if request.by_loss else break_even((weight.shape[0], weight.shape[1]), form)
        heldout, noticed = statistics[HELDOUT].get(name), gradients.get(f"{name}:inputs")
        output_gram = gram_beside(gradients, name, backbone=False)
        beside = gram_beside(gradients, name, backbone=True) if formats else None
        return analyse(weight, calibration, heldout, method, limit, output_gram, form, formats, noticed, beside)

    return run.deal(index, dict.fromkeys(run.survey.members(index), method), look)


def collect(run: Passes, walk: BlockWalk, index: int, keep: bool) -> Statistics:
    """Statistics of the inputs of the block's layers; `keep` writes the block's outputs for the next one."""
    return walk.collect(index, run.modules(index), keep, sampled=(HELDOUT,))


def _analysis_file(index: int) -> str:
    return f"analysis-{index:05d}.safetensors"


def analyses(run: Passes, index: int) -> dict[str, Analysis | None]:
    """What the calibrating pass kept of a block's layers; None for one that never ran."""
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, tensor in run.read(_analysis_file(index)).items():
        name, _, part = key.rpartition(":")
        by_layer.setdefault(name, {})[part] = tensor
    facts: dict[str, Any] = run.journal.steps[of_block(Phase.CALIBRATING, index)]["layers"]
    return {n: None if f is None else Analysis.of(by_layer[n], f) for n, f in facts.items()}


def _bases(run: Passes, index: int) -> dict[str, Tensor]:
    return {name: found.spectrum.basis for name, found in analyses(run, index).items() if found is not None}


def _measured(run: Passes, request: Request) -> dict[str, Measured]:
    found = {}
    for index in range(run.count):
        weights = run.read(sensitivity_file(index)) if request.by_loss else {}
        by_layer: dict[str, dict[str, Tensor]] = {}
        for part in (":energies", ":noise."):
            for key, tensor in run.read(_analysis_file(index), part).items():
                name, _, what = key.rpartition(":")
                by_layer.setdefault(name, {})[what] = tensor.cpu()
        for name, tensors in by_layer.items():
            energies, weight, gradient = tensors["energies"], weights.get(name), weights.get(f"{name}:total")
            if request.predicts_loss and request.weighs:
                weight = torch.ones_like(energies)
            found[name] = Measured(
                run.survey.layers[name].shape,
                energies,
                None if weight is None else weight.cpu(),
                None if gradient is None else float(gradient),
                noise_of(tensors),
            )
    return found
