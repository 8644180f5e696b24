"""Bolaco: Bayesian optimisation over the fractions that layers of one kind keep (Ji et al., EMNLP 2024 Findings,
arXiv 2405.10616).

    min over x of  perplexity(x) + kl_weight KL(x)    subject to  size(x) <= budget

x has a number per group of layers that share it: queries with keys, attention outputs, gates, up and down projections,
told by roles.py. Values stay dense: the paper finds that cutting them by less than 5 % hurts already. KL is the mean
over tokens of KL(compressed || original); the paper adds 1e-3 of its sum over 4,096 tokens, hence the default weight.

The paper accepts sizes of up to 0.1 below the budget. Here every point is moved onto the budget, from below: 1 - x is
scaled by one number for all groups until the size fits, and the last alignment step of a group is given to as many of
its layers as the budget allows. So all proposals are feasible and none is smaller than asked by more than a rank of one
layer. From 1 on x means dense; values give way only when everything else is at its cheapest.

What is measured on: of twice as many tokens of held-out text, the windows whose loss varies most over `probes` random
points (the paper: 100 of many, 20 points). The probes are known to the Gaussian process as well. The first two trials
are the paper's start (half of queries, keys and outputs, 0.8 of MLPs) and equal fractions. The process is fitted to
the logarithm of the objective, which has the same minimum and no outliers.

What it cannot do: see differences between layers of one group, or choose beside a backbone; its trials cut L R from
stored bases.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..declared import option
from ..errors import UsageError, unknown_name
from .base import Choices, check_budget
from .gaussian_process import proposal, require_optuna
from .roles import FUSED, OUTPUT, QUERY_KEY, ROLES, VALUE

LEAST, DENSE = 0.2, 1.1  # of a fraction: the paper's bounds, with more room for dense than its 1.001
_START = {QUERY_KEY: 0.5, OUTPUT: 0.5, FUSED: 0.65}  # others 0.8
_HALVINGS = 50


@dataclass(frozen=True)
class Score:
    """Of one window of text."""

    loss: float  # nats, summed over its tokens
    divergence: float  # KL(compressed || original), the same
    tokens: int


@dataclass(frozen=True)
class Trial:
    """One whole model that was run."""

    point: dict[str, float]  # group -> fraction, before it is moved onto the budget
    scores: list[Score]


Evaluate = Callable[[dict[str, float], list[int] | None], list[Score]]  # on these windows, or on all


@dataclass(frozen=True)
class Shares:
    """The choices at one point."""

    name: ClassVar[str] = "bolaco"
    needs: ClassVar[frozenset[str]] = frozenset({"spectra"})
    point: dict[str, float]  # group -> fraction
    groups: dict[str, str]  # role -> group; of others, layers stay dense

    def allocate(self, layers: Mapping[str, Choices], budget: float) -> dict[str, int]:
        check_budget(layers, budget)
        removed = {group: max(0.0, 1.0 - fraction) for group, fraction in self.point.items()}
        least = min((weight for weight in removed.values() if weight > 0), default=1.0)
        shared = {name: removed.get(self.groups.get(layer.role, "")) for name, layer in layers.items()}

        def choose(factor: float) -> dict[str, int]:
            # where all that give are at their cheapest, groups that the point has dense give way, then other layers
            last = factor - 1.0 / least
            chosen: dict[str, int] = {}
            alike: dict[tuple[int, float | None], int] = {}  # layers of one shape have one table of costs
            for name, layer in layers.items():
                weight = shared[name]
                if (id(layer.costs), weight) in alike:
                    chosen[name] = alike[id(layer.costs), weight]
                    continue
                gone = max(0.0, last - 1.0) if weight is None else factor * weight if weight else max(0.0, last)
                fits = layer.within((1.0 - gone) * layer.dense)
                chosen[name] = alike[id(layer.costs), weight] = layer.cheapest() if fits is None else fits
            return chosen

        def cost(choice: Mapping[str, int]) -> float:
            return sum(float(layers[name].costs[index]) for name, index in choice.items())

        low, high = 0.0, 1.0 / least + 2.0  # at `high` every layer takes its cheapest choice
        if cost(found := choose(low)) <= budget:
            return found
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if cost(choose(middle)) <= budget else (middle, high)
        found, above = choose(high), choose(low)
        left = budget - cost(found)
        for name, index in above.items():  # the group's last step, for as many of its layers as can have it
            extra = float(layers[name].costs[index] - layers[name].costs[found[name]])
            if 0 < extra <= left:
                found[name], left = index, left - extra
        return found


@dataclass(frozen=True)
class Bolaco:
    """The best of `trials` points; `allocate` alone, without a search, gives the paper's start."""

    name: ClassVar[str] = "bolaco"
    needs: ClassVar[frozenset[str]] = frozenset({"spectra"})
    trials: int = option(50, "whole models that the search runs", ge=1)
    probes: int = option(20, "random ones that are run before, to choose the windows it runs on", ge=2)
    validation_tokens: int = option(
        4096, "tokens of held-out text that a model is run on, of twice as many that are held out for it", gt=0
    )
    kl_weight: float = option(4.0, "w in perplexity + w KL(compressed || original), the mean over tokens", ge=0)
    searched: str | None = option(
        None,
        f"roles of the layers that are compressed, of {' '.join(ROLES)}: a comma between those with a fraction each, a "
        "plus between those that share one; all others stay dense; default: all but v, a fraction each",
    )

    def groups(self) -> dict[str, str]:
        """Role -> group; UsageError for what is no role, or is named twice."""
        if self.searched is None:
            return {role: role for role in ROLES if role != VALUE}
        found: dict[str, str] = {}
        for group in self.searched.split(","):
            for role in group.split("+"):
                if role not in ROLES:
                    raise unknown_name("role of `searched`", role, list(ROLES))
                if role in found:
                    raise UsageError(f"`searched` names the role {role} twice; name it once.")
                found[role] = group
        return found

    def at(self, point: Mapping[str, float]) -> Shares:
        """The allocator that carries a point out."""
        return Shares(dict(point), self.groups())

    def allocate(self, layers: Mapping[str, Choices], budget: float) -> dict[str, int]:
        """UsageError where a search could not run, or has nothing to search over."""
        require_optuna()
        return self.at(self.start(self.names(layers))).allocate(layers, budget)

    def names(self, layers: Mapping[str, Choices]) -> list[str]:
        """The groups that some layer with a choice is of; UsageError for none."""
        groups = self.groups()
        found = {groups[layer.role] for layer in layers.values() if layer.role in groups and len(layer.costs) > 1}
        if not found:
            raise UsageError(
                f"No layer has a role that `searched` {self.searched or 'leaves to its default'} names and a rank that "
                f"saves anything; the roles are {', '.join(sorted({layer.role for layer in layers.values()}))}."
            )
        return [name for name in dict.fromkeys(groups.values()) if name in found]

    def start(self, names: Sequence[str]) -> dict[str, float]:
        """Where the paper's search starts."""
        return {name: _START.get(name.partition("+")[0], 0.8) for name in names}

    def objective(self, scores: Sequence[Score]) -> float:
        """Of a model, from its scores on the windows."""
        return math.exp(self.log_perplexity(scores)) + self.kl_weight * self.divergence(scores)

    def log_perplexity(self, scores: Sequence[Score]) -> float:
        """At most 80, whose exponential is a number still."""
        found = sum(s.loss for s in scores) / max(sum(s.tokens for s in scores), 1)
        return min(found, 80.0) if found == found else 80.0

    def divergence(self, scores: Sequence[Score]) -> float:
        found = sum(s.divergence for s in scores) / max(sum(s.tokens for s in scores), 1)
        return min(found, 1e6) if found == found else 1e6

    def telling(self, probes: Sequence[Trial], count: int) -> list[int]:
        """The `count` windows whose mean loss varies most over the probes, in their order."""
        own = [[s.loss / max(s.tokens, 1) for s in trial.scores] for trial in probes]
        spread = []
        for losses in zip(*own, strict=True):
            mean = sum(losses) / len(losses)
            spread.append(sum((loss - mean) ** 2 for loss in losses))
        return sorted(sorted(range(len(spread)), key=lambda window: -spread[window])[:count])

    def search(
        self,
        names: Sequence[str],  # of the groups
        evaluate: Evaluate,
        count: int,  # windows that trials are run on
        seed: int,
        search: Search | None = None,  # what was run already, in an earlier process
        record: Callable[[str, Trial], None] = lambda kind, trial: None,
        agreed: Callable[[dict[str, float]], dict[str, float]] = lambda point: point,  # all processes' point
    ) -> Search:
        """Run `probes` and `trials` models; what was run already is not run again."""
        found = search or Search(self)
        while len(found.probes) < self.probes:
            rolls = random.Random(f"probe {len(found.probes)} of {seed}")
            point = agreed({name: rolls.uniform(LEAST, DENSE) for name in names})
            found.probes.append(Trial(point, evaluate(point, None)))
            record("probe", found.probes[-1])
        windows = self.telling(found.probes, count)
        found.windows[:] = windows
        while len(found.trials) < self.trials:
            point = agreed(self.next_point(names, found, seed))
            found.trials.append(Trial(point, evaluate(point, windows)))
            record("trial", found.trials[-1])
        return found

    def next_point(self, names: Sequence[str], found: Search, seed: int) -> dict[str, float]:
        number = len(found.trials)
        if number < 2:
            return self.start(names) if number == 0 else dict.fromkeys(names, 0.8)
        known = [(p.point, [p.scores[w] for w in found.windows]) for p in found.probes]
        known += [(t.point, t.scores) for t in found.trials]
        values = [(point, math.log(max(self.objective(scores), 1e-300))) for point, scores in known]
        return proposal(LEAST, DENSE, values, random.Random(f"trial {number} of {seed}").getrandbits(32))


@dataclass
class Search:
    """All models that were run."""

    rule: Bolaco
    probes: list[Trial] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    windows: list[int] = field(default_factory=list)  # that the trials were run on

    @property
    def best(self) -> int:
        """The number of the trial with the least objective; the first of equal ones."""
        return min(range(len(self.trials)), key=lambda number: self.rule.objective(self.trials[number].scores))

    def to_dict(self) -> dict[str, object]:
        """What decomposition.json says of it."""
        trials = [
            {
                "point": trial.point,
                "objective": self.rule.objective(trial.scores),
                "perplexity": math.exp(self.rule.log_perplexity(trial.scores)),
                "kl": self.rule.divergence(trial.scores),
            }
            for trial in self.trials
        ]
        return {"best": self.best, "trials": trials, "windows": self.windows}
