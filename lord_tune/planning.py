"""Plans that the calibration text decides, without a decomposition: `plan --save` and `plan --sweep`.

The passes are those of `decompose`, in a working folder that is removed afterwards; the model is not loaded whole.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .allocation import ALLOCATORS
from .config import PlanConfig
from .decomposition import Compared, Journal, Notify, Phase, Request, Sized, decide_measured
from .decomposition.choices import Measured
from .decomposition.decide import decide
from .decomposition.engine import costs_of, look
from .decomposition.measuring import measure, scored
from .decomposition.passes import Passes
from .decomposition.sharing import Layers, share_out
from .decomposition.sizes import added_bias_bytes, stored_bytes
from .decomposition.survey import survey
from .errors import UsageError
from .integrations.checkpoint import Checkpoint
from .integrations.models import default_device, load_tokenizer
from .integrations.running import kind_of, run_model, task_of
from .integrations.vocabulary import check_vocabulary
from .parallel import Workers
from .plans import LayerChoice, Plan
from .provenance import identity_of, made_from
from .quantizers import DTYPES
from .resolve import outside_of, windows_of

_SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)  # of the linears' numbers that L R keeps, in a sweep
_BITS = (2.25, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0)  # per weight, of mixtures
_BESIDE = (0, 16)  # ranks beside one format for all layers


@dataclass(frozen=True)
class Point:
    """One plan of a sweep."""

    series: str
    setting: str  # in the words of the options
    bytes: int  # of the whole checkpoint
    bits_per_weight: float  # of the layers to decompose
    predicted_loss: float  # increase, nats per token
    loss: float | None = None  # measured on the held-out text, nats per token


@contextmanager
def _passes(
    config: PlanConfig, source_name: str, request: Request, beside: Path, notify: Notify, plans: int = 0
) -> Iterator[_Work]:
    """Everything that the calibrating pass needs, and its files beside `beside` for the length of a `with`. plans: how
    many are measured."""
    device = default_device()
    tokenizer = load_tokenizer(source_name)
    with tempfile.TemporaryDirectory(dir=beside.parent, prefix=".lord_tune_plan_") as folder:
        journal = Journal(Path(folder) / "run", Workers())
        journal.open({}, resume=False)
        source = Checkpoint(source_name, config.dtype, journal.work / "converted-0", device)
        windows, calibration = windows_of(config, source.model, tokenizer)
        if windows is None:
            raise UsageError("The calibration text decides the ranks of this budget; pass `calibration` FILE.")
        check_vocabulary(source.model, tokenizer, [windows.calibration, windows.heldout])
        found = survey(source.model, request.targets, request.exclude, run_model)
        task = task_of(tokenizer, kind_of(source.model))
        costs = costs_of(request, None) | {Phase.WRITING: 0.0}
        costs[Phase.MEASURING] += 0.1 * plans
        run = Passes(source, found, windows, task, journal, costs, notify)
        made = made_from(config, identity_of(config.model, source_name), calibration)
        yield _Work(run, found.layers, outside_of(source.model, found, request).rest, made)
        journal.discard()


@dataclass(frozen=True)
class _Work:
    run: Passes
    layers: Layers
    rest: int  # bytes of everything in the checkpoint but the layers' weights
    made: dict[str, Any]


def plan_on_text(
    config: PlanConfig, source_name: str, request: Request, beside: Path, notify: Notify
) -> tuple[Plan, Compared]:
    """What `decompose` with the same options would decide."""
    with _passes(config, source_name, request, beside, notify) as work:
        plan, compared = decide_measured(work.run, request, work.rest)
        return replace(plan, made=work.made), compared


def sweep(
    config: PlanConfig, source_name: str, request: Request, beside: Path, notify: Notify
) -> tuple[list[Point], float | None, dict[str, Any]]:
    """Plans of several allocators and sizes from one calibration; the measured loss of the model as it is, with
    `measure`; and what it was made from. request: a mixture of all formats that the sweep shall look at."""
    mixture = request.budget
    assert isinstance(mixture, Sized)
    plans = 4 * len(_SHARES) + len(_BITS) + len(_BESIDE) * len(mixture.backbones) if config.measure else 0
    with _passes(config, source_name, request, beside, notify, plans) as work:
        decide(work.layers, request, work.rest)  # refuses methods without nested ranks
        if config.measure:
            scored(work.run.task)
        measured = look(work.run, request)
        made = _plans(work, request, measured)
        losses: dict[str, float] = {}
        if config.measure:
            whole = next(iter(made.values())).dense()
            losses = measure(work.run, {"dense": whole} | made, analysed=True)
        points = []
        weights = sum(site.numbers for site in work.layers.values())
        for name, plan in made.items():
            series, _, setting = name.partition(": ")
            stored = sum(stored_bytes(site, plan.layers[n]) for n, site in work.layers.items())
            biases = sum(added_bias_bytes(site, plan.layers[n]) for n, site in work.layers.items())
            predicted = plan.predicted_loss()
            assert predicted is not None, "the sweep weighs by the loss"
            size = work.rest + stored + biases
            points.append(Point(series, setting, size, 8.0 * stored / weights, predicted, losses.get(name)))
        return points, losses.get("dense"), work.made


def _plans(work: _Work, request: Request, measured: dict[str, Measured]) -> dict[str, Plan]:
    """'series: setting' -> plan; sizes that cannot be met are left out."""
    mixture = request.budget
    assert isinstance(mixture, Sized)
    held = DTYPES.get(request.template.factor_format or "")  # a float32 model's L R in 16 bits are half as large anyway
    sizes_of = [site.numbers * held.itemsize if held else site.dense_bytes for site in work.layers.values()]
    dense = sum(sizes_of)
    found: dict[str, Plan] = {}

    def add(name: str, sized: Sized) -> None:
        try:
            found[name] = share_out(work.layers, request.template, sized, work.rest, measured)
        except UsageError:
            return

    for allocator in ("loss_weighted", "uniform", "energy", "typed"):
        for share in _SHARES:
            limit = work.rest + share * dense
            add(f"L R, {allocator}: {share:g} kept", Sized(limit, ALLOCATORS[allocator](), "max_bytes"))
    for bits in _BITS:
        add(f"mixed: {bits:g} bits", replace(mixture, limit=bits, unit="bits_per_weight"))
    for template in mixture.backbones:
        for rank in _BESIDE:
            what = template.backbone + (f" + rank {rank}" if rank else "")
            found[f"one format, rank {rank}: {what}"] = _of_one(work.layers, template, rank, measured)
    return found


def _of_one(layers: Layers, template: LayerChoice, rank: int, measured: dict[str, Measured]) -> Plan:
    """Every layer that ran in one format beside one rank."""
    chosen = {}
    for name, site in layers.items():
        choice = template.at(min(rank, min(site.shape)) if name in measured else None)
        losses = measured[name].losses([choice]) if name in measured else None
        predicted = None if losses is None else float(losses[0])
        chosen[name] = replace(choice, shape=site.shape, predicted_loss=predicted)
    return Plan(chosen)
