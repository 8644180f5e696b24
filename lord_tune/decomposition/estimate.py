"""Memory, time and size of a run before any work, from shapes alone.

The skeleton runs once on the meta device, which tells the floating-point operations of a block and which layers share
an input (and so a Gram matrix). Where a model cannot run there (data-dependent control flow),
2 operations per weight and token and one Gram matrix per layer are assumed. Rates are measured by a probe of about a
second. Every run compares the estimated peak with the measured one and records both.

Peak memory above what the process holds already is the largest of

    start        weights outside the blocks without the output head + one block + one window's activations
    check        weights outside the blocks + 3 float32 copies of a short window's logits
    calibrating  block + 8 in^2 per distinct input + held-out statistics + one window's activations
                 + the layer at hand + bases of the block's layers (float32), or factors of those that are done
    sensitivity  weights outside the blocks + 5 float32 copies of a window's logits; or
                 block + bases + one window's activations with gradients
    measuring    of whole models: weights outside the blocks + a window's float32 logits
    writing      block + bases + factors + one layer's truncation (and what calibrating needs, if it happens here)
    rest         weights outside the blocks; of an embedding that is stored in another format its rounding beside it,
                 a few rows at a time (embedding.rounding_bytes)
    recovering   block + factors + 20 bytes per number of L and R + three times one window's activations

On a CPU each has _LIBRARIES more, and whatever reads the weights outside the blocks the largest of them once more: as
pages of its file, while it is copied.

Methods that weigh the outputs by gradients (two_sided) hold 12 out^2 per layer of a block in the sensitivity pass, 4 of
them where the block is factorized, and keep 4 out^2 per layer of the model on disk: on the shapes of Llama-2 7B 3.9 GB,
1.3 GB and 42 GB, which `plan` says and nothing refuses. Where they share a budget out, in^2 adds to each out^2: 6.6 GB,
2.2 GB and 70 GB.

Where the blocks do not only hand their hidden states on (calibration/replay.py), the weights outside the blocks without
the output head stay in memory from calibrating on.

The layer at hand, in float64 matrices that live together; m = out in, k = min(out, in), f = rank (out + in):

    solution     (wide: out <= in) W, then rows of its curves, 2.5 m + 6 k^2;  (tall) rotation and basis, 2 m + 8.5 k^2;
                 with output weights their moment, its root, the dual and products of the curves, out^2 + 4 k^2 more and
                 (tall) m; where they foresee noise H_g, in^2
    truncation   2 m + f, tall 3 m + f, while the solution is alive; pivoted factors: LU of L, where it is larger than B
    backbone     Q, W, W - Q and, for the error of a plain SVD beside them, the quantized W and two differences:
                 wide max(7 m, 5 m + 6 k^2), tall max(6 m + 7 k^2, 7 m + 4 k^2); one more Q with --shrinkage auto;
                 before, while Q is rounded with feedback, 1.5 m, four float32 matrices of the candidates side by side
                 (3 W, at most 2^24 weights), H rotated and as a root in the making, and a float32 root per damping
    caldera      W, Q, residuals and products of two iterates, 10 m + f, and five Gram matrices (rotated, down-dated,
                 two roots, one of them single and its diagonal)

glibc gives matrices of more than 32 MiB back to the system when they are freed. Smaller ones stay with the process, in
pieces that larger requests do not fit in: the activations of a window and the
largest sum of such matrices over the layers (`_together`) are added. Measured against
estimated on Llamas (CPU) of hidden size 512, 1024 and 2048: tests/test_plan.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..allocation import PIVOTED, break_even
from ..calibration.task import LOGIT_ROWS
from ..plans import LayerChoice, Plan, TablePlan
from ..quantizers.ldlq import DAMPINGS, STACKED, STRETCHES
from ..sites import Site
from .base import CHECKED_TOKENS
from .choices import Sized
from .decide import Request
from .embedding import parts_after, planned_tables, rounding_bytes, saved_bytes
from .head_inputs import head_table, windows_read
from .layerwise import COMPARED_INPUTS
from .sizes import added_bias_bytes, stored_bytes
from .survey import Survey
from .timing import Rates, TextSize, rounds_with_feedback, run_seconds, tables_seconds

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Estimate:
    """What `lord-tune plan` shows."""

    parameters: int
    linear_parameters: int
    blocks: int
    layers: int
    model_bytes: int
    model_bytes_after: int | None  # None: ranks are chosen from the calibration
    linear_bits_per_weight: float | None
    ranks: dict[str, int | None] | None  # layer -> rank, None for dense
    peak_bytes: int  # of the process, with `held_bytes`
    held_bytes: int  # of the process before the run
    scratch_bytes: int  # disk, beside the checkpoint
    seconds: float | None  # None: rates were not measured
    phases: dict[str, int]  # phase -> bytes above held_bytes
    bytes_by_part: dict[str, int] | None = None  # of model_bytes_after; the layers as they are where it is None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def estimate_run(
    model: PreTrainedModel,  # the skeleton
    survey: Survey,
    request: Request,
    plan: Plan | None,  # None where the calibration decides it
    text: TextSize | None,
    groups: list[set[str]],
    forward_flops: float,  # per token
    held_bytes: int,
    rates: Rates | None,
    processes: int = 1,
    device: torch.device | None = None,  # whose memory it is; the CPU
) -> Estimate:
    """See the top of this file for the model of the peak."""
    tables = planned_tables(model, survey, request)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    tensors = {n: t for n, t in model.state_dict().items() if n not in tied}
    size = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    count = len(survey.blocks.modules)
    blocks = [[n for n in tensors if survey.blocks.holds(i, n)] for i in range(count)]
    inside = {name for names in blocks for name in names}
    block_bytes = [sum(size[n] for n in names) for names in blocks]
    rest_bytes = sum(s for n, s in size.items() if n not in inside)
    shapes = {name: site.shape for name, site in survey.layers.items()}
    offered = request.templates()
    choices = plan.layers if plan is not None else dict.fromkeys(shapes, offered[-1])
    ranks = None if plan is None else plan.ranks()
    widest = max(range(count), key=lambda i: (block_bytes[i], -i))
    members = survey.members(widest)
    stored = {n: stored_bytes(site, choices[n]) for n, site in members.items()} if plan is not None else {}
    layers = list(members)
    inputs = _distinct_inputs(groups, members, shapes)
    element = next(iter(tensors.values())).element_size()

    calibrated = text is not None
    sequential = request.propagate == "sequential"
    by_loss = request.by_loss
    rounds = any(choice.rounds_factors for choice in choices.values())
    weighted = by_loss or request.gradients_first  # there is a backward pass
    noticed = {n for n, choice in choices.items() if "output_gram" in choice.factorization().needs}
    kept_bases = _kept_bases(shapes, noticed, choices) if ranks is None else {}
    bases = sum(kept_bases.get(n, 0) for n in layers)
    by_output = {n: _gradient_bytes(shape, request.weighs_noise) for n, shape in shapes.items() if n in noticed}
    output_grams = sum(by_output.get(n, 0) for n in layers)
    factors = sum(stored.values()) if stored else block_bytes[widest]
    kept_ranks = {n: _rank_bound(members[n], request) if ranks is None else ranks.get(n) or 0 for n in layers}
    on_cpu = device is None or device.type == "cpu"
    mapped = _MAPPED if on_cpu else 0  # an accelerator's allocator counts what is alive
    largest = _together(
        [_working_parts(shapes[n], kept_ranks[n], text, choices[n], request.weighs_noise) for n in layers], mapped
    )
    grams = window = 0
    if text is not None:
        grams = sum(8 * width * width + min(4 * text.heldout * width, 8 * width * width) for width in inputs)
        window = text.length * (sum(shapes[n][0] for n in layers) + 4 * max(inputs, default=0)) * max(element, 4)
    phases = {}
    pages = max((s for n, s in size.items() if n not in inside), default=0) if on_cpu else 0  # while it is read
    resident = 0  # of the parts outside the blocks, while blocks are calibrated
    if calibrated:
        head = model.get_output_embeddings()
        own = (
            set()
            if head is None
            else {id(p) for p in head.parameters()} - {id(p) for p in model.get_input_embeddings().parameters()}
        )
        head_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) in own)
        resident = rest_bytes - head_bytes if survey.follows else 0
        phases["start"] = rest_bytes - head_bytes + block_bytes[widest] + window
        phases["start"] += pages
    at_hand = largest + (bases if ranks is None else factors)
    widths = [width for n in layers for width in shapes[n]]
    if text is not None and 4 * text.length * max(widths, default=0) >= mapped:
        at_hand = max(window, at_hand)  # the activations are gone by then
    else:
        at_hand += window
    work = resident + block_bytes[widest] + grams + output_grams + at_hand
    if ranks is None:
        phases["calibrating"] = work
    vocabulary = max((t.shape[0] for n, t in tensors.items() if t.dim() == 2 and n not in inside), default=0)
    checked = 0 if text is None or survey.blocks.whole else min(CHECKED_TOKENS, text.length)
    if checked:
        phases["check"] = rest_bytes + max(pages, 3 * 4 * checked * vocabulary)
    if weighted and text is not None:
        share = text.sensitivity_length / max(text.length, 1)
        phases["sensitivity"] = max(
            rest_bytes + max(pages, 5 * 4 * text.sensitivity_length * vocabulary),
            resident + block_bytes[widest] + (bases if by_loss else 3 * output_grams) + int(3 * share * window),
        )
    if request.measures and text is not None:
        logits = (4 if element >= 4 else 4 + element) * text.length * vocabulary
        phases["measuring"] = rest_bytes + max(pages, logits + 3 * 4 * LOGIT_ROWS * vocabulary)
    cut = _together([_truncation_parts(shapes[n], kept_ranks[n], choices[n].form) for n in layers], mapped)
    rounds |= any(template.backbone != "none" for template in offered)
    again = ranks is not None or sequential or rounds  # the writing pass calibrates
    phases["writing"] = work if again else resident + block_bytes[widest] + bases + factors + cut
    head_name = head_table(model, tables)
    phases["rest"] = _rest(size, rest_bytes, tables, head_name if calibrated else None, on_cpu)
    if calibrated and head_name is not None:
        phases["head"] = rest_bytes + max(pages, 8 * tables[head_name].shape[1] ** 2)
    if text is not None and text.validation:
        # both models' logits, their logarithms and what is summed of them; a block with plain L R, and its bases
        logits = 8 * 4 * text.sensitivity_length * vocabulary
        plain = sum(4 * min(shapes[n]) * sum(shapes[n]) for n in layers)
        phases["searching"] = max(rest_bytes + logits, resident + block_bytes[widest] + bases + plain + cut + window)
    if request.recovery is not None:
        # beside the block: float32 L and R, gradients, Adam's moments, the best so far; activations with gradients
        tuned = sum(20 * kept_ranks[n] * sum(shapes[n]) for n in layers)
        phases["recovering"] = resident + block_bytes[widest] + factors + tuned + 3 * window
    if on_cpu:
        phases = {phase: needed + _LIBRARIES for phase, needed in phases.items()}

    scratch = 0
    hidden = min((min(shapes[n]) for n in layers), default=0)
    if text is not None:
        width = max(hidden, min(inputs, default=0))
        streams = 1 if request.recovery is None else 2
        scratch += 3 * streams * (text.tokens + text.heldout) * width * element
        scratch += 5 * text.validation * width * element
        scratch += checked * ((count + 2) * width * element + 4 * vocabulary)
        if weighted:
            scratch += (count + 2) * text.sensitivity * width * element
            scratch += sum(kept_bases.values())
            scratch += sum(by_output[n] if n in noticed else 0 if by_loss else 8 * sum(s) for n, s in shapes.items())
    after = None
    bits = None
    if ranks is not None:
        dense_linear = sum(site.dense_bytes for site in survey.layers.values())
        packed = sum(stored_bytes(site, choices[n]) for n, site in survey.layers.items())
        biases = sum(added_bias_bytes(site, choices[n]) for n, site in survey.layers.items())
        after = sum(size.values()) - dense_linear + packed + biases - saved_bytes(model, tables)
        bits = 8.0 * packed / sum(s[0] * s[1] for s in shapes.values())
    seconds = None
    if rates is not None:
        twice = ranks is None and (sequential or rounds)
        walks = 2 if twice else 1  # in each, blocks run, layers are factorized
        looks = len(offered) if ranks is None else 1  # at every layer, by the calibrating pass
        seconds = run_seconds(
            survey.layers, choices, request, inputs, count, text, forward_flops, rates, walks, weighted, looks
        )
        read = 0
        if text is not None and head_name is not None:
            read = min(text.tokens, windows_read(tables[head_name].shape[1], text.length) * text.length)
        seconds += tables_seconds(tables, head_name, read, forward_flops, rates)
        seconds /= processes
    return Estimate(
        parameters=sum(t.numel() for t in tensors.values()),
        linear_parameters=sum(s[0] * s[1] for s in shapes.values()),
        blocks=count,
        layers=len(shapes),
        model_bytes=sum(size.values()),
        model_bytes_after=after,
        linear_bits_per_weight=bits,
        ranks=ranks,
        peak_bytes=held_bytes + max(phases.values()),
        held_bytes=held_bytes,
        scratch_bytes=scratch,
        seconds=seconds,
        phases=phases,
        bytes_by_part=parts_after(model, survey, plan, tables),
    )


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


# code of torch and others that is read when it first runs, buffers of theirs, and pieces that blocks leave: measured 33
# to 62 MiB on SmolLM2-135M after its blocks are released, more than before the run
_LIBRARIES = 48 << 20
_MAPPED = 32 << 20  # glibc's largest DEFAULT_MMAP_THRESHOLD: freed blocks below it stay with the process
Parts = list[tuple[float, int]]  # (how many, bytes of one)


def _together(layers: list[Parts], limit: int) -> int:
    """The largest sum of the mapped blocks of a layer, and of the retained ones (below `limit`) of any."""
    mapped = max((sum(n * size for n, size in parts if size >= limit) for parts in layers), default=0)
    retained = max((sum(n * size for n, size in parts if size < limit) for parts in layers), default=0)
    return int(mapped + retained)


def _rank_bound(site: Site, request: Request) -> int:
    """The largest rank that the calibration may choose."""
    assert isinstance(request.budget, Sized), "other budgets are decided without calibration"
    return request.budget.largest_rank(site, request.template)


def _truncation_parts(shape: tuple[int, int], rank: int, form: str) -> Parts:
    out, inputs = shape
    return [(1.0, 8 * out * inputs), (2.0, 8 * rank * (out + inputs)), (1.0, _pivoting_bytes(shape, rank, form))]


def _pivoting_bytes(shape: tuple[int, int], rank: int, form: str) -> int:
    """What LU and C (2 out rank + rank^2) take beyond the balanced L and R of plain factors."""
    out, inputs = shape
    return 8 * rank * max(0, out + rank - inputs) if form == PIVOTED else 0


def _working_parts(
    shape: tuple[int, int], rank: int, text: TextSize | None, choice: LayerChoice, predicts: bool
) -> Parts:
    """Float64 matrices that live together while one layer is factorized; see the top of this file."""
    out, inputs = shape
    k, tall = min(shape), out > inputs
    m, square = 8 * out * inputs, 8 * k * k
    alternation: Parts = [(10.0, m), (5.0, 8 * inputs * inputs), (2.0, 8 * rank * (out + inputs))]
    method, backbone = choice.factorization(), choice.backbone != "none"
    if method.alternates:
        return alternation
    weighed: Parts = []
    if "output_gram" in method.needs:
        weighed = [
            (1.0, 8 * out * out),
            (4.0, square),
            (1.0 if tall else 0.0, m),
            (float(predicts), 8 * inputs * inputs),
        ]
    if backbone and text is not None:
        choices = [(6.0, 7.0), (7.0, 4.0)] if tall else [(7.0, 0.0), (5.0, 6.0)]
        extra = 1.0 if len(method.candidates()) > 1 else 0.0
        whole, squares = _larger(choices, m, square)
        own: Parts = [(whole + extra, m), (squares, square), *weighed]
        if rounds_with_feedback(choice):
            stacked = min(len(STRETCHES) * out * inputs, STACKED)
            rounded: Parts = [(1.5, m), (1.0, 16 * stacked), (len(DAMPINGS), 4 * inputs**2), (3.0, 8 * inputs**2)]
            own = max(own, rounded, key=_bytes)
        compared = rank > 0 and inputs <= COMPARED_INPUTS  # with feedback rounding alone
        alone: Parts = [(5.0, m), *alternation[1:]]  # one iterate: W twice, Q, what it leaves, and their products
        return max(own, alone if compared else own, key=_bytes)
    above = 2.0 if backbone else 0.0  # W and Q beside the residual's solution
    if text is None:
        choices = [(2.0, 7.0)] if tall else [(1.0, 6.0)]
        return [(above + choices[0][0], m), (choices[0][1], square)]
    return _solution_parts(shape, rank, text, choice.form) + weighed


def _solution_parts(shape: tuple[int, int], rank: int, text: TextSize, form: str) -> Parts:
    """Without a backbone, the larger of the solution with its curves and of the truncation."""
    out, inputs = shape
    k, tall = min(shape), out > inputs
    m, square = 8 * out * inputs, 8 * k * k
    rows_only = text.heldout <= 2 * inputs  # else a Gram matrix and two products with it
    measured = 2 * 8 * text.heldout * k if rows_only else 0
    choices = [(2.0, 8.5)] if tall else [(2.5 if rows_only else 4.0, 6.0)]
    parts = [(choices[0][0], m), (choices[0][1], square), (1.0, measured)]
    pivoting = 8 * rank * (out + inputs) + _pivoting_bytes(shape, rank, form) if form == PIVOTED else 0
    cut = [((3.0 if tall else 2.0), m), (3.0, square), (1.0, 8 * rank * (out + inputs)), (1.0, pivoting)]
    return max(parts, cut, key=_bytes)


def _bytes(parts: Parts) -> float:
    return sum(n * size for n, size in parts)


def _larger(choices: list[tuple[float, float]], m: int, square: int) -> tuple[float, float]:
    return max(choices, key=lambda choice: choice[0] * m + choice[1] * square)
