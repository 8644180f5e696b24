"""What a layer may become under a budget of size, what each of it costs, and what it is predicted to do to the loss.

A choice moves the layer's outputs by E x, E = W - W'. To second order, with the K-FAC factors H = E[x x^T] of the
inputs and G = E[g g^T] of the loss gradients at the outputs (Martens and Grosse 2015), the loss grows by
1/2 tr(G E H E^T), in nats per token. A method that weighs the outputs itself (two_sided) gives that, beside a backbone
with H_g in place of H where the layer reads massive activations (`foreseen` in factorizations/base.py). For others both
kinds of choices are measured in one basis U, that of the method for W:

    L R of rank r   E H E^T is diagonal in U: 1/2 sum over j >= r of sigma_j^2 u_j^T G u_j
    Q + L R         D = W - Q: the spectrum of D H D^T gives the energy that rank r leaves of it, and 1/2 of the mean of
                    u_j^T G u_j weighted by u_j^T D H D^T u_j what a unit of it costs. D is noise: its directions are
                    not those of U, nor of G, so that this mean holds for what L R leaves of it as well

U spans the outputs that W reaches; a tall W leaves others, which D reaches too: their share of G is what the sum over U
leaves of tr G, spread evenly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from ..allocation import Allocator, Choices, break_even, factor_cost, rank_grid, role_of
from ..errors import UsageError
from ..plans import LayerChoice
from ..sites import Site
from .sizes import added_bias_bytes, stored_bytes

Unit = Literal["kept_fraction", "bits_per_weight", "max_bytes", "average_rank"]


@dataclass(frozen=True)
class Noise:
    """What rounding to one format does to a layer's outputs, D = W - Q."""

    energies: Tensor  # (k,) float64: of the directions of D H D^T, largest first; their sum alone, (1,), without L R
    spread: Tensor  # (k,) float64: u_j^T D H D^T u_j
    whole: Tensor  # (), float64: tr D H D^T

    def cost(self, shape: tuple[int, int], weights: Tensor, gradient: float) -> float:
        """What a unit of its energy costs the loss, twice over. weights: u_j^T G u_j; gradient: tr G."""
        others = shape[0] - len(weights)
        known = float((self.spread * weights).sum())
        beyond = max(float(self.whole - self.spread.sum()), 0.0) if others > 0 else 0.0
        unknown = beyond * max(gradient - float(weights.sum()), 0.0) / max(others, 1)
        return (known + unknown) / max(float(self.whole), 1e-300)


@dataclass(frozen=True)
class Measured:
    """What the calibrating pass says of one layer."""

    shape: tuple[int, int]
    energies: Tensor  # (k,) float64: sigma_j^2; decreasing unless they are what the loss notices
    loss_weights: Tensor | None = None  # (k,) float64: u_j^T G u_j
    gradient: float | None = None  # tr G; None: the energies are the loss already, and all weights are 1
    noise: Mapping[str, Noise] = field(default_factory=dict)  # backbone -> what it does

    def losses(self, choices: list[LayerChoice]) -> Tensor | None:
        """(n,) float64: predicted increase of the loss of each, nats per token; None without loss weights."""
        weights = self.loss_weights
        if weights is None:
            return None
        tails = {"none": _tails(self.energies * weights)}
        for name, noise in self.noise.items():
            cost = 1.0 if self.gradient is None else noise.cost(self.shape, weights, self.gradient)
            tails[name] = [cost * energy for energy in _tails(noise.energies)]
        return 0.5 * _at(tails, choices)

    def errors(self, choices: list[LayerChoice]) -> Tensor:
        """(n,) float64: squared errors of the outputs relative to the outputs' energy."""
        tails = {"none": _tails(self.energies)} | {name: _tails(n.energies) for name, n in self.noise.items()}
        return _at(tails, choices) / max(tails["none"][0], 1e-300)


def _at(tails: Mapping[str, list[float]], choices: list[LayerChoice]) -> Tensor:
    """The tail of each choice's backbone at its rank; 0 for dense ones."""
    values = [0.0 if choice.rank is None else tails[choice.backbone][choice.rank] for choice in choices]
    return torch.tensor(values, dtype=torch.float64)


def _tails(values: Tensor) -> list[float]:
    """(k + 1): sums over j >= r for r = 0..k."""
    found: list[float] = torch.cat([values.flip(0).cumsum(0).flip(0), values.new_zeros(1)]).tolist()
    return found


@dataclass(frozen=True)
class Sized:
    """A size, shared out over the layers by an allocator."""

    limit: float
    allocator: Allocator
    unit: Unit = "kept_fraction"
    backbones: tuple[LayerChoice, ...] = ()  # templates of Q + L R; () for L R alone
    low_rank: bool = True  # whether L R without Q is a choice
    ranks: tuple[int, ...] | None = None  # beside a backbone, or of L R where there is none; None: the grid
    control: tuple[LayerChoice, ...] = ()  # templates of Q alone, for the best plan without L R of the same bytes

    @property
    def formats(self) -> dict[str, tuple[LayerChoice, bool]]:
        """Backbone -> its template, and whether L R beside it is a choice: all that the calibrating pass looks at."""
        ranked = self.ranks is None or max(self.ranks) > 0
        found = {template.backbone: (template, False) for template in self.control}
        return found | {template.backbone: (template, ranked) for template in self.backbones}

    @property
    def includes_control(self) -> bool:
        """Whether the plan without L R is one of those that were asked for."""
        formats = {template.backbone for template in self.control} <= {template.backbone for template in self.backbones}
        return bool(self.control) and formats and (self.ranks is None or 0 in self.ranks)

    @property
    def relative(self) -> bool:
        """Whether the limit says something of each layer, so that those that never ran do not count."""
        return self.unit in ("kept_fraction", "average_rank")

    @property
    def numbers(self) -> bool:
        """Whether numbers are counted, not bytes: of L R alone, whose formats are all one."""
        return self.unit == "kept_fraction" and not self.backbones

    def offered(self, site: Site, template: LayerChoice) -> list[LayerChoice]:
        """Everything that the layer may become; dense is the last."""
        found: list[LayerChoice] = []
        if self.low_rank:
            grid = rank_grid(site.shape, form=template.form)
            if self.ranks is not None and not self.backbones:
                limit = break_even(site.shape, template.form)
                grid = [rank for rank in self.ranks if 0 < rank <= limit]
            found += [template.at(rank) for rank in grid]
        for backbone in self.backbones:
            ranks = range(0, min(site.shape) + 1, 8) if self.ranks is None else self.ranks
            plain = [backbone.at(rank) for rank in ranks if rank <= min(site.shape)]
            found += [choice for choice in plain if stored_bytes(site, choice) < site.dense_bytes]
        return [*found, template.at(None)]

    def largest_rank(self, site: Site, template: LayerChoice) -> int:
        """Of all that the layer may become."""
        return max((choice.rank or 0 for choice in self.offered(site, template)), default=0)

    def cost(self, site: Site, choice: LayerChoice) -> float:
        """In the unit that the budget is counted in."""
        if self.numbers:
            rank = choice.rank
            return site.numbers if rank is None else factor_cost(site.shape, rank, choice.form)
        return stored_bytes(site, choice) + added_bias_bytes(site, choice)

    def budget(self, layers: Mapping[str, Site], rest: int) -> float:
        """What these layers may cost together; rest: bytes of everything else in the checkpoint."""
        if self.unit == "max_bytes":
            return self.limit - rest
        if self.unit == "bits_per_weight":
            return self.limit / 8.0 * sum(site.numbers for site in layers.values())
        if self.unit == "average_rank":
            template = self.backbones[0]
            ranked = [(site, min(int(self.limit), min(site.shape))) for site in layers.values()]
            return sum(self.cost(site, template.at(rank)) for site, rank in ranked)
        return self.limit * sum(site.numbers if self.numbers else site.dense_bytes for site in layers.values())

    def as_limit(self, cost: float, layers: Mapping[str, Site], rest: int) -> float:
        """The limit at which these layers may cost so much."""
        if self.unit == "max_bytes":
            return cost + rest
        return cost / max(self.budget(layers, rest), 1e-300) * self.limit

    def check(self) -> None:
        """UsageError for a limit that is none."""
        if self.unit == "kept_fraction" and not 0 < self.limit < 1:
            raise UsageError(
                f"Got `kept_fraction` {self.limit}; expected a number between 0 and 1, the fraction of the linear "
                "layers' parameters to keep (0.9 removes 10 %)."
            )
        if self.limit <= 0:
            raise UsageError(f"Got `{self.unit}` {self.limit:g}; expected a number above 0.")


Kind = tuple[tuple[int, int], torch.dtype, bool, bool]  # layers of one kind cost the same


class Menu:
    """The choices of all layers under one budget, priced; choices of layers of one kind are priced once."""

    def __init__(self, layers: Mapping[str, Site], template: LayerChoice, sized: Sized):
        self._by_kind: dict[Kind, tuple[list[LayerChoice], Tensor]] = {}
        self.choices: dict[str, list[LayerChoice]] = {}
        self._costs: dict[str, Tensor] = {}
        self._layers, self._sized = layers, sized
        for name, site in layers.items():
            kind = site.shape, site.dtype, site.bias, site.conv1d
            if kind not in self._by_kind:
                offered = sized.offered(site, template)
                costs = torch.tensor([sized.cost(site, choice) for choice in offered], dtype=torch.float64)
                self._by_kind[kind] = offered, costs
            self.choices[name], self._costs[name] = self._by_kind[kind]

    def table(self, measured: Mapping[str, Measured] | None) -> dict[str, Choices]:
        """What allocators see; of the layers that were measured, or of all without predictions."""
        names = list(self._layers) if measured is None else [name for name in self._layers if name in measured]
        found = {}
        for position, name in enumerate(names):
            site, choices = self._layers[name], self.choices[name]
            of_layer = None if measured is None else measured[name]
            nothing = torch.zeros(len(choices), dtype=torch.float64)
            found[name] = Choices(
                self._costs[name],
                float(self._costs[name][-1]),
                nothing if of_layer is None else of_layer.losses(choices),
                nothing if of_layer is None else of_layer.errors(choices),
                role_of(name, site.shape),
                position / max(len(names) - 1, 1),
                site.block,
            )
        return found
