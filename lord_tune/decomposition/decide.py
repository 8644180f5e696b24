"""Decide once: from what was asked for, and the layers' shapes, to a plan.

`decide` answers from shapes alone, or with None where the budget is shared out by what the calibration text says;
`decide_from` then takes the spectra. Both refuse what cannot be done. Nothing after them chooses a rank or a format.

A layer too small for its rank (a gate with one output, a router) stays dense and is warned about by name; the run is
refused only if no layer can take the rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..allocation import ALIGNMENT, Tilt, break_even
from ..declared import Options
from ..errors import LordWarning, UsageError
from ..factorizations import Projection
from ..plans import LayerChoice, Plan
from ..sites import Site
from .base import BlockRecovery
from .choices import Measured, Sized
from .sharing import NEVER_RAN, Layers, share_out
from .sizes import bits_at


@dataclass(frozen=True)
class Ranks:
    """The same rank for every layer; 0 with a backbone is rounding alone. None: all components of every layer."""

    rank: int | None


@dataclass(frozen=True)
class Bits:
    """Stored bits per weight, Q and L R together. Of one backbone each layer takes at most so many. Of several (the
    narrowest first) the widest is taken that leaves every layer `rank`, or rank 8 where none is given, and all layers
    together take at most so many."""

    bits: float
    backbones: tuple[LayerChoice, ...]  # templates that differ in the backbone
    rank: int | None = None  # None: the largest rank that fits each layer


@dataclass(frozen=True)
class Untouched:
    """Every layer stays dense: the embeddings alone are stored in another format."""


@dataclass(frozen=True)
class Given:
    """A plan that somebody else made."""

    plan: Plan


Budget = Ranks | Sized | Bits | Untouched | Given


@dataclass(frozen=True)
class Request:
    """What is asked of all layers, before their shapes are known."""

    template: LayerChoice  # everything but the rank
    budget: Budget
    targets: str | None = None
    exclude: str | None = None
    propagate: str = "dense"  # or "sequential": later blocks see the outputs of the decomposed ones
    recovery: BlockRecovery | None = None  # tune the blocks' L and R, one block at a time
    refine: int = 0  # whole models around the allocator's solution, of which held-out text chooses
    measure_control: bool = False  # run the control at equal bytes on held-out text as well
    seed: int = 0  # of an allocator that searches
    embeddings: tuple[str, Options] | None = None  # the format of embedding and output head; None: as they are
    compares: bool = False  # the plan with others on held-out text, as a correction does

    @property
    def measures(self) -> bool:
        """Whether whole models are run on held-out text."""
        return self.compares or self.measure_control or self.refine > 0

    @property
    def by_loss(self) -> bool:
        """Whether the choices that an allocator compares are weighed by the loss in a pass of their own."""
        return self.weighs and not self.predicts_loss

    @property
    def weighs(self) -> bool:
        """Whether the allocator compares choices by what they cost the loss."""
        return isinstance(self.budget, Sized) and "loss_weights" in self.budget.allocator.needs

    @property
    def predicts_loss(self) -> bool:
        """Whether the method's energies are the loss already."""
        return "output_gram" in self.template.factorization().needs

    @property
    def weighs_noise(self) -> bool:
        """Whether what rounding costs the loss is among that: with H_g of the inputs, see factorizations/base.py."""
        return self.weighs and isinstance(self.budget, Sized) and bool(self.budget.formats)

    @property
    def gradients_first(self) -> bool:
        """Whether a backward pass comes before anything is factorized."""
        return bool(self.needs() & {"fisher", "output_gram"})

    def needs(self) -> frozenset[str]:
        """The statistics that the run may take."""
        if isinstance(self.budget, Untouched):
            return frozenset()
        own = self.budget.plan.needs() if isinstance(self.budget, Given) else self.template.factorization().needs
        return own | (self.budget.allocator.needs if isinstance(self.budget, Sized) else frozenset())

    def needs_text(self) -> bool:
        """Whether it cannot be carried out without calibration text."""
        return bool(self.needs() & {"input_gram", "loss_weights", "fisher", "output_gram"})

    def templates(self) -> tuple[LayerChoice, ...]:
        """Everything but the rank, of all that a layer may become."""
        if isinstance(self.budget, Given):
            return tuple(self.budget.plan.layers.values())
        if isinstance(self.budget, Bits):
            return self.budget.backbones
        if isinstance(self.budget, Sized):
            own = (self.template,) if self.budget.low_rank else ()
            return (*own, *self.budget.backbones)
        return (self.template,)


def decide(layers: Layers, request: Request, rest: int = 0, embeddings: int = 0) -> Plan | None:
    """The plan, or None where the calibration decides it. UsageError for what is impossible.

    rest: bytes of everything in the checkpoint but these layers' weights, for budgets of the whole; embeddings: those
    of embedding and output head among them.
    """
    plan = _from_shapes(layers, request, rest, embeddings)
    if plan is not None:
        _say_dense(plan)
    return plan


def _from_shapes(layers: Layers, request: Request, rest: int, embeddings: int) -> Plan | None:
    budget = request.budget
    if isinstance(budget, Given):
        return _matched(layers, budget.plan)
    if isinstance(budget, Untouched):
        return Plan({name: request.template.at(None) for name in layers})
    for template in request.templates():
        _check_template(template)
    if isinstance(budget, Ranks):
        return _of_one_rank(layers, request.template, budget.rank)
    if isinstance(budget, Bits):
        return _of_bits(layers, budget)
    budget.check()
    if budget.unit == "average_rank":
        _check_sides(_shapes(layers), int(budget.limit))
    if budget.allocator.needs:
        _check_nested(request)
    plan = share_out(layers, request.template, budget, rest, embeddings=embeddings)
    return None if budget.allocator.needs else plan


def decide_from(
    layers: Layers, request: Request, measured: Mapping[str, Measured], rest: int = 0, tilt: Tilt | None = None
) -> Plan:
    """The plan of a budget that is shared out by what the calibrating pass measured. A layer that it knows nothing of
    never ran: it stays dense."""
    assert isinstance(request.budget, Sized)
    plan = share_out(layers, request.template, request.budget, rest, measured, tilt)
    if tilt is None:
        _say_dense(plan)
    return plan


def _check_nested(request: Request) -> None:
    """UsageError for methods that have no spectrum, whose ranks cannot be told apart before they are fitted."""
    template = request.templates()[0]
    method = template.factorization()
    assert isinstance(request.budget, Sized)
    beside = request.budget.backbones and "input_gram" not in method.needs
    if not isinstance(method, Projection) or beside:
        raise UsageError(
            f"`allocation` {request.budget.allocator.name} measures every rank at once, which method "
            f"'{template.method}' cannot{' beside a backbone' if beside else ''}; use whitened, or `allocation` "
            "uniform."
        )


def _say_dense(plan: Plan) -> None:
    """One warning per reason why layers stay dense; those that never ran are warned about one by one, by the run."""
    by_reason: dict[str, list[str]] = {}
    for name, choice in plan.layers.items():
        if choice.rank is None and choice.reason not in (None, NEVER_RAN):
            by_reason.setdefault(str(choice.reason), []).append(name)
    for reason, names in by_reason.items():
        others = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"{len(names)} of {len(plan.layers)} layers stay dense, {', '.join(names[:3])}{others}: {reason}.",
            LordWarning,
            stacklevel=3,
        )


def _check_template(template: LayerChoice) -> None:
    if template.backbone == "none" and template.factorization().needs_backbone:
        raise UsageError(f"Method '{template.method}' needs a quantized backbone; choose one, for example nf4.")


def _shapes(layers: Layers) -> dict[str, tuple[int, int]]:
    return {name: site.shape for name, site in layers.items()}


def _of_one_rank(layers: Layers, template: LayerChoice, rank: int | None) -> Plan:
    shapes = _shapes(layers)
    if rank is None:
        return Plan({name: template.at(min(shape)) for name, shape in shapes.items()})
    backbone = template.backbone != "none"
    if rank < (0 if backbone else 1):
        raise UsageError(f"Got rank {rank}; a rank is at least 1 (0 is plain rounding and needs a backbone).")
    if backbone:
        _check_sides(shapes, rank)
        return Plan({name: _within_sides(template, rank, shape) for name, shape in shapes.items()})
    limits = [break_even(shape, template.form) for shape in shapes.values()]
    if rank > (best := max(limits)):
        raise UsageError(
            f"Rank {rank} is above break-even for every layer: its factors would hold more numbers than W. "
            f"Choose at most {best}, or add a backbone, for example nf4."
        )
    return Plan({name: _below_break_even(template, rank, shape) for name, shape in shapes.items()})


def _check_sides(shapes: Mapping[str, tuple[int, int]], rank: int) -> None:
    """UsageError for a rank that no layer can take beside a backbone."""
    if all(rank > min(shape) for shape in shapes.values()):
        name, shape = max(shapes.items(), key=lambda entry: min(entry[1]))
        raise UsageError(
            f"Rank {rank} exceeds the smaller side of every layer (that of {name}, {shape[0]}x{shape[1]}, is the "
            f"largest); choose at most {min(shape)}."
        )


def _within_sides(template: LayerChoice, rank: int, shape: tuple[int, int]) -> LayerChoice:
    limit = min(shape)
    return template.at(rank) if rank <= limit else template.at(None, f"rank {rank} exceeds its smaller side {limit}")


def _below_break_even(template: LayerChoice, rank: int, shape: tuple[int, int]) -> LayerChoice:
    limit = break_even(shape, template.form)
    return template.at(rank) if rank <= limit else template.at(None, f"rank {rank} is above its break-even {limit}")


def _of_bits(layers: Layers, budget: Bits) -> Plan:
    if budget.rank is not None:
        _check_sides(_shapes(layers), budget.rank)
    chosen = len(budget.backbones) > 1
    template = _widest(layers, budget) if chosen else budget.backbones[0]
    if budget.rank is not None:
        return _of_one_rank(layers, template, budget.rank)
    able = _able(layers, ALIGNMENT)
    if not chosen:
        _check_backbone(able, template, budget.bits)
    ranks = _ranks_together(able, template, budget.bits) if chosen else _ranks_within(able, template, budget.bits)
    return Plan(
        {
            name: template.at(ranks[name])
            if name in able
            else template.at(None, f"its smaller side {min(site.shape)} is below the smallest rank {ALIGNMENT}")
            for name, site in layers.items()
        }
    )


def _check_backbone(able: Layers, template: LayerChoice, bits: float) -> None:
    needed = {name: bits_at(site, template.at(0)) for name, site in able.items()}
    name = max(needed, key=lambda n: needed[n])
    if needed[name] > bits:
        raise UsageError(
            f"Got {bits:g} bits per weight; {template.backbone} alone takes {needed[name]:.3f} for '{name}'. "
            "Give more, or choose a backbone of fewer bits."
        )


def _ranks_within(able: Layers, template: LayerChoice, bits: float, least: int = 0) -> dict[str, int]:
    """Each layer's largest rank at which it takes at most `bits` per weight, and `least` where that is less."""
    by_kind: dict[Any, int] = {}
    for site in able.values():
        key = (site.shape, site.dtype)
        if key not in by_kind:
            by_kind[key] = max(least, _rank_within(site, template, bits))
    return {name: by_kind[site.shape, site.dtype] for name, site in able.items()}


def _ranks_together(able: Layers, template: LayerChoice, bits: float) -> dict[str, int]:
    """Ranks from the smallest on at which all layers together take at most `bits` per weight: a small layer, whose
    smallest rank takes more, has it all the same, and the others that much less."""
    low, high = 0.0, bits
    ranks = _ranks_within(able, template, bits, ALIGNMENT)
    if _mean_bits(able, template, ranks) <= bits:
        return ranks
    for _ in range(40):
        middle = (low + high) / 2
        ranks = _ranks_within(able, template, middle, ALIGNMENT)
        low, high = (middle, high) if _mean_bits(able, template, ranks) <= bits else (low, middle)
    return _ranks_within(able, template, low, ALIGNMENT)


def _mean_bits(able: Layers, template: LayerChoice, ranks: Mapping[str, int]) -> float:
    """Stored bits of all these layers per weight of them all."""
    stored = sum(bits_at(site, template.at(ranks[name])) * site.numbers for name, site in able.items())
    return stored / sum(site.numbers for site in able.values())


def _able(layers: Layers, rank: int) -> Layers:
    """The layers that can take a rank; all of them where none can."""
    return {name: site for name, site in layers.items() if min(site.shape) >= rank} or layers


def _widest(layers: Layers, budget: Bits) -> LayerChoice:
    """The template with the widest backbone that leaves the layers that can take it the smallest rank, together: of a
    small layer it takes more bits per weight than of a large one, and no layer decides for all.

    Width goes to Q first: at equal bits feedback rounding gains more from another bit than from a rank at widths up to
    a few thousand (the table of equal bits after each run says by how much), and L R is there to be trained.
    """
    smallest = ALIGNMENT if budget.rank is None else budget.rank
    able = _able(layers, smallest)
    ranks = dict.fromkeys(able, smallest)
    for template in reversed(budget.backbones):
        if _mean_bits(able, template, ranks) <= budget.bits:
            return template
    narrowest = budget.backbones[0]
    needed = _mean_bits(able, narrowest, ranks)
    raise UsageError(
        f"Got {budget.bits:g} bits per weight; the narrowest format, {narrowest.backbone}, takes {needed:.3f} with "
        f"rank {smallest}. Give at least that{', a coarser factor_format, or rank 0' if smallest else ''}."
    )


def _rank_within(site: Site, template: LayerChoice, bits: float) -> int:
    """The largest multiple of 8, or 0, at which the layer takes at most `bits` per weight."""
    low, high = 0, min(site.shape) // ALIGNMENT
    while low < high:
        middle = (low + high + 1) // 2
        fits = bits_at(site, template.at(middle * ALIGNMENT)) <= bits
        low, high = (middle, high) if fits else (low, middle - 1)
    return low * ALIGNMENT


def _matched(layers: Layers, plan: Plan) -> Plan:
    """The plan in the model's order; UsageError for a layer that only one of the two has, or an impossible rank."""
    missing = [name for name in layers if name not in plan.layers]
    unknown = [name for name in plan.layers if name not in layers]
    if missing or unknown:
        what = f"has no entry for '{missing[0]}'" if missing else f"names '{unknown[0]}', which the model lacks"
        raise UsageError(
            f"The plan does not fit the model: it {what} ({len(missing)} layers without an entry, {len(unknown)} "
            "entries without a layer). Use the model, targets and exclude that the plan was made with."
        )
    for name, shape in _shapes(layers).items():
        choice = plan.layers[name]
        if choice.shape is not None and choice.shape != shape:
            raise UsageError(
                f"The plan was made for a layer '{name}' of {'x'.join(map(str, choice.shape))}; the model's is "
                f"{shape[0]}x{shape[1]}. Use a model of the architecture that the plan was made for."
            )
        limit = min(shape) if choice.backbone != "none" else break_even(shape, choice.form)
        if choice.rank is not None and choice.rank > limit:
            raise UsageError(
                f"The plan gives layer '{name}' ({shape[0]}x{shape[1]}) rank {choice.rank}; its largest is {limit}."
            )
        if choice.rank is not None:
            _check_template(choice)
    return Plan({name: plan.layers[name] for name in layers}, embeddings=plan.embeddings)
