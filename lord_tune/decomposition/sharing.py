"""A size shared out over the layers by an allocator, and the control that it is compared with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

from ..allocation import ALIGNMENT, Infeasible, LossWeighted, Tilt, break_even, rank_grid
from ..console import human_bytes
from ..errors import LordWarning, UsageError
from ..plans import LayerChoice, Plan
from ..sites import Site
from .choices import Measured, Menu, Sized

Layers = Mapping[str, Site]  # by name
NEVER_RAN = "it never ran on the calibration text"


def share_out(
    layers: Layers,
    template: LayerChoice,
    sized: Sized,
    rest: int,  # bytes of everything else in the checkpoint
    measured: Mapping[str, Measured] | None = None,  # None: nothing yet, to see whether the budget can be met at all
    tilt: Tilt | None = None,
    embeddings: int = 0,  # bytes of embedding and output head, of `rest`
) -> Plan:
    """The allocator's choices as a plan; warns where it keeps more than was asked for. A layer that nothing was
    measured of never ran: it stays dense."""
    menu = Menu(layers, template, sized)
    table = menu.table(measured)
    able = {name: layers[name] for name in table}
    silent = sum(site.dense_bytes for name, site in layers.items() if name not in table)
    budget = sized.budget(able if sized.relative else layers, rest)
    if not sized.relative:
        budget -= silent
    try:
        picked = sized.allocator.allocate(table if tilt is None else tilt(table), budget)
    except Infeasible as error:
        raise _infeasible(sized, sized.as_limit(error.least, able, rest + silent), rest + silent, embeddings) from error
    chosen: dict[str, LayerChoice] = {}
    for name, site in layers.items():
        if name not in table:
            chosen[name] = template.at(None, NEVER_RAN)
            continue
        choice = menu.choices[name][picked[name]]
        if choice.rank is None and len(menu.choices[name]) == 1:
            choice = choice.at(None, _nothing_saves(site, template, sized))
        losses = None if measured is None else table[name].losses
        predicted = None if losses is None else float(losses[picked[name]])
        chosen[name] = replace(choice, shape=site.shape, predicted_loss=predicted)
    _warn_above(sized, sum(float(table[name].costs[index]) for name, index in picked.items()), budget, able, chosen)
    return Plan(chosen)


def _infeasible(sized: Sized, least: float, fixed: int, embeddings: int) -> UsageError:
    if sized.unit == "max_bytes":
        share = f"; {human_bytes(embeddings)} of them, {embeddings / least:.0%} of the whole, are embeddings"
        smaller = "`embeddings` int8 or int4, " if embeddings else ""
        return UsageError(
            f"`max_bytes` {human_bytes(int(sized.limit))} cannot be met: the smallest checkpoint that these choices "
            f"allow has {human_bytes(int(least))}, {human_bytes(fixed)} of them outside the layers to decompose"
            f"{share if embeddings else ''}. Allow more, or offer smaller choices ({smaller}`allocation` mixed, a "
            "`backbone` of fewer bits)."
        )
    amount = f"{math.ceil(least * 1000) / 1000:.3f}"
    if sized.unit == "bits_per_weight":
        taken = f"takes {amount} bits per weight"
    else:
        taken = f"keeps {amount} of the {'parameters' if sized.numbers else 'bytes'}"
    lower = ", or give a smaller `rank`" if sized.ranks is not None and max(sized.ranks) > 1 else ""
    return UsageError(
        f"`{sized.unit}` {sized.limit:g} cannot be met: the smallest choice everywhere already {taken}. Allow more, or "
        f"decompose more layers{lower}."
    )


def _warn_above(sized: Sized, spent: float, budget: float, able: Layers, chosen: Mapping[str, LayerChoice]) -> None:
    if spent <= budget * (1 + 1e-9) or sized.unit != "kept_fraction":
        if spent > budget * (1 + 1e-9):
            raise UsageError(
                f"`allocation` {sized.allocator.name} cannot meet `{sized.unit}` {sized.limit:g}: layers that are too "
                "small for their share stay dense. Use loss_weighted or mixed."
            )
        return
    dense = [name for name in able if chosen[name].rank is None]
    kept = sized.as_limit(spent, able, 0)
    warnings.warn(
        f"{kept:.3f} of the parameters are kept, more than `kept_fraction` {sized.limit:g}: "
        f"{len(dense)} layers, like {dense[0]}, would get less than the smallest rank and stay dense.",
        LordWarning,
        stacklevel=2,
    )


def _nothing_saves(site: Site, template: LayerChoice, sized: Sized) -> str:
    limit = break_even(site.shape, template.form)
    if sized.ranks is not None and not sized.backbones:
        return f"rank {max(sized.ranks)} is above its break-even {limit}"
    if rank_grid(site.shape, form=template.form):
        return "none of its choices saves anything"
    return f"no rank from {ALIGNMENT} on saves anything, its break-even is {limit}"


def control_of(
    layers: Layers, template: LayerChoice, sized: Sized, measured: Mapping[str, Measured], plan: Plan
) -> Plan | None:
    """The best plan without L R of the same bytes: every layer dense or rounded to one of the formats that were
    measured. None where there are none, or no such plan is as small."""
    if not sized.control:
        return None
    known = {name: layers[name] for name in layers if name in measured}
    spent = sum(sized.cost(site, plan.layers[name]) for name, site in known.items())
    alone = replace(sized, limit=spent, unit="max_bytes", backbones=sized.control, low_rank=False, ranks=(0,))
    menu = Menu(known, template, alone)
    table = menu.table(measured)
    try:
        picked = LossWeighted().allocate(table, spent)
    except Infeasible:
        return None
    chosen = {name: plan.layers[name] for name in layers if name not in known}
    for name, index in picked.items():
        losses = table[name].losses
        assert losses is not None, "the run weighs by the loss"
        chosen[name] = replace(menu.choices[name][index], shape=layers[name].shape, predicted_loss=float(losses[index]))
    return Plan({name: chosen[name] for name in layers})
