"""Mode basis: which singular values stay.

Basis Selection (Li et al. 2024, arXiv 2405.15877): in every layer the smallest set of singular values stays whose sum
is a share of the sum of all, which counts what is gone with the sizes it started with. After a first phase without
pruning, every n-th step takes away some, and the share falls exponentially from 1 to the one that is asked for. What is
gone stays gone.

A size is asked for instead by bisection: before each pruning, the largest share is found that would leave at most so
many numbers if it were taken at once; of it as much is taken as is due. So the last pruning meets the size from below,
by less than one component in each layer. Counted is what the exported checkpoint holds: the components that are left
and the new ones, merged, in the form that the layers are stored in.

All follows from the parameters and the number of the step, so a run that continues from a checkpoint prunes as it would
have: a pruned component is a w of 0.
"""

from __future__ import annotations

import math
import os
import warnings
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..adapters.basis import learnt
from ..allocation import factor_cost
from ..console import note, size_of
from ..errors import LordWarning, UsageError
from ..layers import factored_layers, plain_model
from ..layers.sizes import sizes

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from ..protocols import CausalModel, TrainerLike, TrlConfig
    from .arguments import TrainOptions

_BYTES = 4  # of a folded factor's number: float32
_HALVINGS = 60  # of the interval in which the share lies


@dataclass(frozen=True)
class Stored:
    """What the factors of a layer take, by their rank."""

    shape: tuple[int, int]  # (out, in)
    form: str
    new: int  # components that are never pruned

    def numbers(self, kept: int) -> int:
        """With so many of the old components."""
        return factor_cost(self.shape, min(kept + self.new, *self.shape), self.form)


def cumulated(values: Tensor) -> list[float]:
    """The sums of the largest 1, 2, ... of values >= 0 (rank,), without those that are 0, float64."""
    present = values[values > 0].double()
    found: list[float] = present.sort(descending=True).values.cumsum(0).tolist()
    return found


def count_of(sums: Sequence[float], share: float) -> int:
    """How many of the largest it takes for this share of the sum; all that are there for 1."""
    if not sums:
        return 0
    return len(sums) if share >= 1 else bisect_left(sums, share * sums[-1]) + 1


def largest(values: Tensor, count: int) -> Tensor:
    """(rank,) bool: the `count` largest, the first ones of equals."""
    found = torch.zeros_like(values, dtype=torch.bool)
    found[values.argsort(descending=True, stable=True)[:count]] = True
    return found


def share_within(layers: Mapping[str, Sequence[float]], stored: Mapping[str, Stored], limit: int) -> float:
    """The largest share of every layer's sum (cumulated) that leaves at most `limit` numbers, or 0 where none does."""

    def numbers(share: float) -> int:
        return sum(stored[name].numbers(count_of(sums, share)) for name, sums in layers.items())

    if numbers(1.0) <= limit:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if numbers(middle) <= limit else (low, middle)
    return low


def due(steps: int, start: float, every: int) -> list[int]:
    """The steps after which something is pruned: multiples of `every` after the share `start` of all."""
    return [step for step in range(every, steps + 1, every) if step > start * steps]


def steps_of(trainer: TrainerLike) -> int:
    """How many a run will make."""
    arguments = trainer.args
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches = len(trainer.get_train_dataloader())
    return math.ceil(arguments.num_train_epochs * max(1, math.ceil(batches / arguments.gradient_accumulation_steps)))


class Pruning(TrainerCallback):
    """Sets singular values to 0 as the training goes on, and keeps them there."""

    def __init__(self, model: CausalModel, options: TrainOptions, steps: int):
        """UsageError for a schedule without a pruning, and a size that cannot be met."""
        self._share, self._start, self._every = options.basis_share, options.basis_start, options.basis_every
        self._roots = learnt(model)
        layers = factored_layers(plain_model(model))
        self._bases = {name: layers[name].host.get_base_layer() for name in self._roots}
        self._stored = {
            name: Stored(layers[name].plan.shape, layers[name].plan.form, options.basis_new) for name in self._roots
        }
        self._limit = None if self._share is not None else _limit(options, self._stored)
        self._due = due(steps, self._start, self._every)
        if not self._due:
            raise UsageError(
                f"basis_every: {self._every} with basis_start: {self._start:g} prunes after none of the {steps} steps; "
                f"train for more steps, or lower basis_every."
            )
        if self._limit is not None:
            self._check_limit(self._limit)

    def numbers(self) -> int:
        """That the factors of the trained layers will hold."""
        return sum(self._stored[name].numbers(int((root != 0).sum())) for name, root in self._roots.items())

    def results(self) -> dict[str, object]:
        """For train_results.json."""
        kept = {name: int((root != 0).sum()) for name, root in self._roots.items()}
        return {"prunings": self._due, "kept": kept, "numbers": self.numbers(), "limit": self._limit}

    def _check_limit(self, limit: int) -> None:
        least = sum(stored.numbers(1) for stored in self._stored.values())
        if limit < least:
            raise UsageError(
                f"The size that is asked for leaves {limit:,} numbers for the factors of the trained layers; one old "
                f"and the new components (basis_new) of each take {least:,}. Ask for more, or lower basis_new."
            )
        if self.numbers() <= limit:
            warnings.warn(
                f"All components and the new ones take {self.numbers():,} numbers, within the {limit:,} that are asked "
                "for, so mode: basis has nothing to prune.",
                LordWarning,
                stacklevel=2,
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._alive = {name: root != 0 for name, root in self._roots.items()}
        self._due = due(state.max_steps, self._start, self._every)

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        for name, root in self._roots.items():  # the optimizer's momentum has moved them
            root.masked_fill_(~self._alive[name], 0)
        if state.global_step in self._due:
            done = self._due.index(state.global_step) + 1
            within = None if self._limit is None else self._share_within(self._limit)
            for name, root in self._roots.items():
                values = root.square()
                if within is None:
                    share = self._share_of(name, values, done)
                else:
                    share = within ** (1 / (len(self._due) - done + 1))
                self._alive[name] &= largest(values, count_of(cumulated(values), share))
                root.masked_fill_(~self._alive[name], 0)
            if state.is_world_process_zero:
                there = sum(len(root) for root in self._roots.values())
                kept = sum(int(alive.sum()) for alive in self._alive.values())
                note(f"  {kept:,} of {there:,} components are left; {self.numbers():,} numbers with the new ones")

    def _share_of(self, name: str, values: Tensor, done: int) -> float:
        """Of what is there now, after the pruning number `done`; what is gone counts with the sizes it started with."""
        assert self._share is not None
        there, gone = float(values.double().sum()), float(self._bases[name].sizes[~self._alive[name]].double().sum())
        return min(1.0, self._share ** (done / len(self._due)) * (there + gone) / max(there, 1e-290))

    def _share_within(self, limit: int) -> float:
        """Of every layer's sum, that could stay if all were pruned now."""
        return share_within({n: cumulated(root.square()) for n, root in self._roots.items()}, self._stored, limit)


def _limit(options: TrainOptions, stored: Mapping[str, Stored]) -> int:
    """Numbers that the factors of the trained layers may hold together."""
    if options.basis_kept_fraction is not None:
        return int(options.basis_kept_fraction * sum(layer.shape[0] * layer.shape[1] for layer in stored.values()))
    from .forecast import factored_skeleton

    whole = factored_skeleton(options.model_name_or_path)  # in the dtype of the checkpoint, not in that of training
    layers = factored_layers(whole)
    sides = [layers[name].get_submodule(side) for name in stored for side in ("left", "right")]
    old = sum(p.numel() * p.element_size() for side in sides for p in side.parameters())
    allowed = size_of(options.basis_max_bytes or "")
    assert allowed is not None, "checked by the record"
    return max(0, int(allowed - sizes(whole)["model_bytes"] + old) // _BYTES)


def check_run(arguments: TrlConfig) -> None:
    """Refuse what a pruned run cannot be combined with."""
    if arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise UsageError("mode: basis looks at whole layers, which FSDP shards; use one process or DDP.")
    if arguments.load_best_model_at_end:
        raise UsageError(
            "load_best_model_at_end would give back a checkpoint from before the last pruning; leave it out in mode: "
            "basis."
        )
