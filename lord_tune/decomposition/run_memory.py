"""What a run holds, from shapes.

Peak memory above what the process holds already is the largest of

    start        weights outside the blocks without the output head + one block + one window's activations
    check        weights outside the blocks + 3 float32 copies of a short window's logits
    calibrating  block + 8 in^2 per distinct input + held-out statistics + one window's activations
                 + the layer at hand + bases of the block's layers (float32), or factors of those that are done
    sensitivity  weights outside the blocks + 5 float32 copies of a window's logits; or
                 block + bases + one window's activations with gradients
    measuring    of whole models: weights outside the blocks + a window's logits, float32 and as computed, + 3 copies of
                 LOGIT_ROWS of them (and what writing needs; the layers of the other plans of a block are left out)
    writing      block + bases + factors + one layer's truncation (and what calibrating needs, if it happens here)
    rest         weights outside the blocks; of an embedding that is stored in another format its rounding beside it,
                 a few rows at a time (embedding.rounding_bytes)
    recovering   block + factors + 20 bytes per number of L and R + three times one window's activations

On a CPU each has _LIBRARIES more, and whatever reads the weights outside the blocks READ_AT_ONCE numbers of them, as
pages of the file.

Methods that weigh the outputs by gradients (two_sided) hold 12 out^2 per layer of a block in the sensitivity pass, 4 of
them where the block is factorized, and keep 4 out^2 per layer of the model on disk: on the shapes of Llama-2 7B 3.9 GB,
1.3 GB and 42 GB, which `plan` says and nothing refuses. Where they share a budget out, in^2 adds to each out^2: 6.6 GB,
2.2 GB and 70 GB.

Where the blocks do not only hand their hidden states on (calibration/replay.py), the weights outside the blocks without
the output head stay in memory from calibrating on.

The layer at hand: layer_memory.py. The activations of a window are smaller than what glibc gives back to the system, so
they are added. Measured against estimated on Llamas (CPU) of hidden size 512, 1024 and 2048: tests/test_plan.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..allocation import break_even
from ..calibration.task import LOGIT_ROWS
from ..memory import READ_AT_ONCE
from ..plans import LayerChoice, Plan, TablePlan
from ..sites import Site
from .base import CHECKED_TOKENS
from .choices import Sized
from .decide import Request
from .embedding import planned_tables, rounding_bytes
from .head_inputs import head_table, windows_read
from .layer_memory import MAPPED, together, truncation_parts, working_parts
from .sizes import stored_bytes
from .survey import Survey
from .timing import Rates, TextSize, run_seconds, tables_seconds

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# code of torch and others that is read when it first runs, buffers of theirs, and pieces that blocks leave: measured 33
# to 62 MiB on SmolLM2-135M after its blocks are released, more than before the run
_LIBRARIES = 48 << 20


@dataclass(frozen=True)
class Run:
    """See the top. The block that is looked at is the largest."""

    model: PreTrainedModel
    survey: Survey
    request: Request
    plan: Plan | None
    text: TextSize | None
    groups: list[set[str]]
    on_cpu: bool

    # --- the model ---

    @cached_property
    def tables(self) -> Mapping[str, TablePlan]:
        return planned_tables(self.model, self.survey, self.request)

    @cached_property
    def tensors(self) -> dict[str, torch.Tensor]:
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        return {n: t for n, t in self.model.state_dict().items() if n not in tied}

    @cached_property
    def size(self) -> dict[str, int]:
        """Tensor -> bytes."""
        return {name: t.numel() * t.element_size() for name, t in self.tensors.items()}

    @property
    def element(self) -> int:
        return next(iter(self.tensors.values())).element_size()

    @property
    def count(self) -> int:
        return len(self.survey.blocks.modules)

    @cached_property
    def in_blocks(self) -> list[list[str]]:
        return [[n for n in self.tensors if self.survey.blocks.holds(i, n)] for i in range(self.count)]

    @cached_property
    def outside(self) -> list[str]:
        """The tensors that no block has."""
        inside = {name for names in self.in_blocks for name in names}
        return [name for name in self.tensors if name not in inside]

    @cached_property
    def rest_bytes(self) -> int:
        return sum(self.size[name] for name in self.outside)

    @cached_property
    def pages(self) -> int:
        """Of a file, while the largest tensor outside the blocks is read."""
        if not self.on_cpu:
            return 0
        by_rows = self.element * READ_AT_ONCE  # tables are read so
        parts = (min(self.size[n], by_rows) if self.tensors[n].dim() == 2 else self.size[n] for n in self.outside)
        return max(parts, default=0)

    @cached_property
    def vocabulary(self) -> int:
        return max((t.shape[0] for n in self.outside if (t := self.tensors[n]).dim() == 2), default=0)

    @cached_property
    def head_bytes(self) -> int:
        """Of an output head of its own."""
        head = self.model.get_output_embeddings()
        if head is None:
            return 0
        own = {id(p) for p in head.parameters()} - {id(p) for p in self.model.get_input_embeddings().parameters()}
        return sum(p.numel() * p.element_size() for p in self.model.parameters() if id(p) in own)

    # --- its layers ---

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        return {name: site.shape for name, site in self.survey.layers.items()}

    @cached_property
    def choices(self) -> Mapping[str, LayerChoice]:
        """Where the plan is not known, the last format that is offered for all."""
        return self.plan.layers if self.plan is not None else dict.fromkeys(self.shapes, self.request.templates()[-1])

    @cached_property
    def ranks(self) -> dict[str, int | None] | None:
        return None if self.plan is None else self.plan.ranks()

    @cached_property
    def block_bytes(self) -> int:
        return sum(self.size[name] for name in self.in_blocks[self.widest])

    @cached_property
    def widest(self) -> int:
        sums = [sum(self.size[n] for n in names) for names in self.in_blocks]
        return max(range(self.count), key=lambda i: (sums[i], -i))

    @cached_property
    def members(self) -> Mapping[str, Site]:
        """The layers of that block."""
        return self.survey.members(self.widest)

    @cached_property
    def inputs(self) -> list[int]:
        return _distinct_inputs(self.groups, self.members, self.shapes)

    @cached_property
    def kept_ranks(self) -> dict[str, int]:
        if self.ranks is None:
            return {name: _rank_bound(site, self.request) for name, site in self.members.items()}
        return {name: self.ranks.get(name) or 0 for name in self.members}

    @cached_property
    def noticed(self) -> set[str]:
        """Layers whose outputs are weighed by gradients."""
        return {n for n, choice in self.choices.items() if "output_gram" in choice.factorization().needs}

    @cached_property
    def kept_bases(self) -> dict[str, int]:
        return _kept_bases(self.shapes, self.noticed, self.choices) if self.ranks is None else {}

    @cached_property
    def gradient_bytes(self) -> dict[str, int]:
        return {n: _gradient_bytes(self.shapes[n], self.request.weighs_noise) for n in self.shapes if n in self.noticed}

    @property
    def weighted(self) -> bool:
        """Whether there is a backward pass."""
        return self.request.by_loss or self.request.gradients_first

    @cached_property
    def rounds(self) -> bool:
        offered = any(template.backbone != "none" for template in self.request.templates())
        return offered or any(choice.rounds_factors for choice in self.choices.values())

    @property
    def checked_tokens(self) -> int:
        return 0 if self.text is None or self.survey.blocks.whole else min(CHECKED_TOKENS, self.text.length)

    # --- memory ---

    @cached_property
    def window(self) -> int:
        """The activations of one, in a block."""
        if self.text is None:
            return 0
        numbers = sum(self.shapes[n][0] for n in self.members) + 4 * max(self.inputs, default=0)
        return self.text.length * numbers * max(self.element, 4)

    def phases(self) -> dict[str, int]:
        """Phase -> bytes above what the process holds already."""
        text, request, block, rest = self.text, self.request, self.block_bytes, self.rest_bytes
        mapped = MAPPED if self.on_cpu else 0  # an accelerator's allocator counts what is alive
        bases = sum(self.kept_bases.get(n, 0) for n in self.members)
        grams = sum(self.gradient_bytes.get(n, 0) for n in self.members)
        stored = (
            {} if self.plan is None else {n: stored_bytes(site, self.choices[n]) for n, site in self.members.items()}
        )
        factors = sum(stored.values()) if stored else block
        # of the parts outside the blocks, while blocks are calibrated
        resident = rest - self.head_bytes if text is not None and self.survey.follows else 0
        work = resident + block + self._statistics() + grams + self._at_hand(bases, factors, mapped)
        found = {}
        if text is not None:
            found["start"] = rest - self.head_bytes + block + self.window + self.pages
        if self.ranks is None:
            found["calibrating"] = work
        if self.checked_tokens:
            found["check"] = rest + max(self.pages, 3 * 4 * self.checked_tokens * self.vocabulary)
        if self.weighted and text is not None:
            share = text.sensitivity_length / max(text.length, 1)
            found["sensitivity"] = max(
                rest + max(self.pages, 5 * 4 * text.sensitivity_length * self.vocabulary),
                resident + block + (bases if request.by_loss else 3 * grams) + int(3 * share * self.window),
            )
        if request.measures and text is not None:
            logits = (4 if self.element >= 4 else 4 + self.element) * text.length * self.vocabulary
            found["measuring"] = rest + max(self.pages, logits + 3 * 4 * LOGIT_ROWS * self.vocabulary)
        cut = [truncation_parts(self.shapes[n], self.kept_ranks[n], self.choices[n].form) for n in self.members]
        again = (
            self.ranks is not None or request.propagate == "sequential" or self.rounds
        )  # the writing pass calibrates
        found["writing"] = work if again else resident + block + bases + factors + together(cut, mapped)
        head = head_table(self.model, self.tables) if text is not None else None
        found["rest"] = _rest(self.size, rest, self.tables, head, self.on_cpu)
        if head is not None:
            found["head"] = rest + max(self.pages, 8 * self.tables[head].shape[1] ** 2)
        if text is not None and text.validation:
            # both models' logits, their logarithms and what is summed of them; a block with plain L R, and its bases
            logits = 8 * 4 * text.sensitivity_length * self.vocabulary
            plain = sum(4 * min(self.shapes[n]) * sum(self.shapes[n]) for n in self.members)
            trial = resident + block + bases + plain + together(cut, mapped) + self.window
            found["searching"] = max(rest + logits, trial)
        if request.recovery is not None:
            # beside the block: float32 L and R, gradients, Adam's moments, the best so far; activations with gradients
            tuned = sum(20 * self.kept_ranks[n] * sum(self.shapes[n]) for n in self.members)
            found["recovering"] = resident + block + factors + tuned + 3 * self.window
        return {phase: needed + (_LIBRARIES if self.on_cpu else 0) for phase, needed in found.items()}

    def _statistics(self) -> int:
        """Gram matrices and held-out rows of a block's inputs."""
        if self.text is None:
            return 0
        held = 4 * self.text.heldout
        return sum(8 * width * width + min(held * width, 8 * width * width) for width in self.inputs)

    def _at_hand(self, bases: int, factors: int, mapped: int) -> int:
        """The layer that is factorized, and what is kept of those before it."""
        noise = self.request.weighs_noise
        parts = [
            working_parts(self.shapes[n], self.kept_ranks[n], self.text, self.choices[n], noise) for n in self.members
        ]
        found = together(parts, mapped) + (bases if self.ranks is None else factors)
        widths = [width for n in self.members for width in self.shapes[n]]
        if self.text is not None and 4 * self.text.length * max(widths, default=0) >= mapped:
            return max(self.window, found)  # the activations are gone by then
        return found + self.window

    # --- disk and time ---

    def scratch(self) -> int:
        """Bytes beside the checkpoint."""
        text = self.text
        if text is None:
            return 0
        hidden = min((min(self.shapes[n]) for n in self.members), default=0)
        width = max(hidden, min(self.inputs, default=0)) * self.element
        streams = 1 if self.request.recovery is None else 2
        found = 3 * streams * (text.tokens + text.heldout) * width + 5 * text.validation * width
        found += self.checked_tokens * ((self.count + 2) * width + 4 * self.vocabulary)
        if self.weighted:
            found += (self.count + 2) * text.sensitivity * width + sum(self.kept_bases.values())
            for name, shape in self.shapes.items():
                found += self.gradient_bytes.get(name, 0 if self.request.by_loss else 8 * sum(shape))
        return found

    def seconds(self, rates: Rates, forward_flops: float) -> float:
        """Of one process."""
        request, text = self.request, self.text
        again = self.ranks is None and (request.propagate == "sequential" or self.rounds)
        walks = 2 if again else 1  # in each, blocks run, layers are factorized
        looks = len(request.templates()) if self.ranks is None else 1  # at every layer, by the calibrating pass
        layers, weighted = self.survey.layers, self.weighted
        found = run_seconds(
            *(layers, self.choices, request, self.inputs, self.count, text, forward_flops, rates),
            *(walks, weighted, looks),
        )
        head, read = head_table(self.model, self.tables), 0
        if text is not None and head is not None:
            read = min(text.tokens, windows_read(self.tables[head].shape[1], text.length) * text.length)
        return found + tables_seconds(self.tables, head, read, forward_flops, rates)


def _rest(
    size: Mapping[str, int],  # tensor -> bytes
    rest_bytes: int,
    tables: Mapping[str, TablePlan],
    head: str | None,  # of them the one that is rounded with feedback
    on_cpu: bool,
) -> int:
    """Bytes of writing what is outside the blocks; embeddings are loaded and rounded one after another."""
    dense = {name: size.get(f"{name}.weight", 0) for name in tables}
    stored = sum(table.stored_bytes for table in tables.values())
    work = [dense[name] + rounding_bytes(table, name == head, on_cpu) for name, table in tables.items()]
    gram = 0 if head is None else 8 * tables[head].shape[1] ** 2
    return rest_bytes - sum(dense.values()) + stored + gram + max(work, default=0)


def _gradient_bytes(shape: tuple[int, int], predicts: bool) -> int:
    """Of what the backward pass keeps of a layer for methods that weigh the outputs: G, and H_g where these foresee."""
    out, inputs = shape
    return 4 * (out**2 + inputs**2) if predicts else 4 * out**2


def _kept_bases(
    shapes: dict[str, tuple[int, int]], noticed: set[str], choices: Mapping[str, LayerChoice]
) -> dict[str, int]:
    """Bytes of what is kept of each layer until its rank is chosen: the whole basis, or basis and dual up to
    break-even where the energies are the loss already."""
    found = {}
    for name, (out, inputs) in shapes.items():
        limit = min(out, inputs)
        own = 2 * min(break_even((out, inputs), choices[name].form), limit) if name in noticed else limit
        found[name] = 4 * out * own
    return found


def _distinct_inputs(groups: list[set[str]], members: Iterable[str], shapes: dict[str, tuple[int, int]]) -> list[int]:
    """Widths of the inputs that have a Gram matrix each. The groups are the first block's; others are like it."""
    if all(name in shapes for group in groups for name in group):
        return [shapes[next(iter(group))][1] for group in groups]
    return [shapes[name][1] for name in members]


def _rank_bound(site: Site, request: Request) -> int:
    """The largest rank that the calibration may choose."""
    assert isinstance(request.budget, Sized), "other budgets are decided without calibration"
    return request.budget.largest_rank(site, request.template)
