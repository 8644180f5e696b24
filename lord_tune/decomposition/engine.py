"""The driver: decompose a checkpoint block by block, in memory bounded by its largest block.

Up to four passes over the blocks, and one for every whole model that is run. In each, a block's weights are loaded,
used and released; hidden states lie in files between blocks; a finished block is a file and a line in the journal.

    forward       (only for methods that weigh by gradients: what the next pass needs) runs the blocks
    sensitivity   (the same) gradients of the loss, from the last block to the first
    calibrating   (only when the allocator needs all spectra first) run the text through the block, factorize its layers
                  at every rank, keep basis and error curves in a file; dense outputs go on to the next block
    sensitivity   (only for allocators that weigh by the loss, where the method does not) gradients as above
    probing, searching   (only for allocators that run whole models) a pass per model over text held out for it
    writing       the factors of the chosen rank. With ranks known from the start this is the only pass and calibrates
                  too; `propagate: sequential` makes it calibrate on the outputs of the blocks already decomposed

Memory at the peak: one block's weights, the Gram matrices of its distinct inputs, 8 in^2 bytes each, the held-out rows,
and the float64 matrices of the layer at hand. run_memory.py has the model that `lord-tune plan` prints and every run
checks against its measured peak.

Processes: each runs its share of the windows; Gram matrices are summed over them; the layers of a block are dealt out.

Projection to one 24 GB GPU, on paper: `plan` on the shapes of Llama-2 7B and 70B, bfloat16, 128 windows of 2,048 tokens
(T = 262,144), LoRD with uniform ranks / NF4 with rank 64:

    time   = 2 P T / F16 + sum over distinct inputs of T (in + 192) in / F32
             + sum over layers of (2 k in^2 + 2 out k (in + k) + 6 k^3) / F64 + 13.5 k^3 / E64
    memory = p_block + sum over distinct inputs of 8 in^2 + held-out rows + work on the largest layer (run_memory.py)

P linear parameters, k = min(out, in), F the rates of matrix products, E64 that of eigh counted as 9 k^3. Measured on
the CPU this was developed on, 2 threads: F16 345, F32 161, F64 77, E64 30 GFLOP/s, which gives 8.5 hours for 7B and 114
for 70B. For an RTX 4090 rates are assumed, not measured: half of the data sheet's 165 (bf16) and 82.6 (fp32) TFLOP/s,
0.7 of its 1.29 (fp64), and eigh at the fraction of F64 measured above:

    7B    6.0 / 6.1 GB, 16 minutes
    70B   25 / 29 GB, 4.1 hours: more than 24 GB, because the 28,672 inputs of down_proj have a Gram matrix of 6.6 GB
          and NF4 holds up to 11 float64 copies of the layer (1.9 GB each); it needs a 32 GB card, or the CPU's memory

The float64 terms decide on consumer GPUs, whose float64 units are few; more processes divide them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..allocation import TILTS, Bolaco, Search
from ..calibration.task import Task
from ..errors import CalibrationError, LordError, LordWarning, UsageError
from ..plans import LayerPlan, Plan, TablePlan
from .base import GivenCodes, LayerRecord, Notify, Source, Windows
from .calibrating import calibrate
from .choices import Measured, Sized
from .decide import Request, decide_from
from .gradients import measure_gradients
from .head_inputs import measure_head
from .journal import Journal
from .measuring import measure, scored
from .passes import Passes
from .recovery import Recovered
from .searching import predictable, search
from .sharing import NEVER_RAN, control_of
from .steps import REST, Phase, of_block
from .survey import Survey
from .writing import write, write_rest

CORRECTED = "corrected"  # the plan of a correction, among those it is run beside
SOLUTION, CONTROL, DENSE = "solution", "control", "dense"  # plans that are measured, beside the tilts


@dataclass(frozen=True)
class Compared:
    """What the plan of a shared-out budget was compared with."""

    losses: dict[str, float] = field(default_factory=dict)  # plan -> nats per token of held-out text
    chosen: str = SOLUTION
    control: Plan | None = None  # the best plan without L R of the same bytes
    search: Search | None = None  # the models that the allocator ran

    def to_dict(self) -> dict[str, Any]:
        """What decomposition.json says of it; nothing where there was nothing."""
        found: dict[str, Any] = {}
        if self.losses:
            found["heldout_losses"] = self.losses
            found["refined"] = self.chosen
        if self.control is not None:
            found["control"] = {
                "kinds": self.control.kinds(),
                "predicted_loss": self.control.predicted_loss(),
                "plan": self.control.to_dict()["layers"],
            }
        if self.search is not None:
            found["search"] = self.search.to_dict()
        return found


@dataclass(frozen=True)
class Outcome:
    """What became of a model: the records of all eligible layers, the plans and the shards."""

    records: dict[str, LayerRecord]
    plan: Plan  # what was decided for every layer
    plans: dict[str, LayerPlan]  # how the decomposed ones are stored
    weight_map: dict[str, str]  # tensor -> file
    recovery: dict[str, Recovered]  # block -> held-out error before and after block-wise recovery, passes kept
    compared: Compared
    rounded: dict[str, Any]  # table -> how it was rounded, and its error


def decompose_checkpoint(
    source: Source,
    survey: Survey,
    request: Request,
    plan: Plan | None,  # None: the calibration decides it
    windows: Windows | None,
    task: Task,
    journal: Journal,
    notify: Notify = lambda step: None,
    rest: int = 0,  # bytes of everything in the checkpoint but the layers to decompose
    given: GivenCodes | None = None,
    tables: Mapping[str, TablePlan] | None = None,  # embedding and output head, where they are stored otherwise
) -> Outcome:
    """Write the shards of the decomposed checkpoint into the journal's folder."""
    if windows is None and request.needs_text():
        raise CalibrationError(
            f"Method '{request.template.method}' with this budget needs calibration text; pass `calibration` files."
        )
    costs = costs_of(request, plan) | ({Phase.HEAD: 0.05} if tables else {})
    if given is not None and task.scored is not None:
        costs |= {Phase.MEASURING: 1.3, Phase.WRITING: 0.05}
    run = Passes(source, survey, windows, task, journal, costs, notify, given)
    from_analysis, compared = False, Compared()
    if plan is None:
        plan, compared = decide_measured(run, request, rest)
        plain = all(choice.backbone == "none" for choice in plan.factored().values())
        from_analysis = request.propagate == "dense" and not request.template.rounds_factors and plain
    elif request.gradients_first:
        measure_gradients(run, {name: choice.factorization() for name, choice in plan.factored().items()}, False)
    plan = replace(plan, embeddings=dict(tables or {}))
    if not plan.changes():
        journal.discard()
        raise LordError("Every layer stays dense at this budget, so nothing is done; choose another budget.")
    if given is not None and task.scored is not None:
        compared = Compared(measure(run, given.compared(plan, survey.layers), analysed=False, kept=CORRECTED))
        from_analysis = True
    measure_head(run, plan.embeddings)
    write(run, plan, request, from_analysis)
    write_rest(run, plan.embeddings)
    return _outcome(run, plan, compared)


def look(run: Passes, request: Request) -> dict[str, Measured]:
    """All passes that a budget is shared out by."""
    if request.gradients_first:
        measure_gradients(run, dict.fromkeys(run.survey.layers, request.template.factorization()), request.weighs_noise)
    return calibrate(run, request)


def decide_measured(run: Passes, request: Request, rest: int) -> tuple[Plan, Compared]:
    """The plan of a budget that the calibration shares out, and what it was compared with."""
    layers = run.survey.layers
    if request.refine or request.measure_control:
        scored(run.task)  # refused now, not after the calibration
    sized, found = request.budget, None
    assert isinstance(sized, Sized), "other budgets are decided from shapes"
    rule = sized.allocator
    if isinstance(rule, Bolaco):
        predictable(run.task)
    measured = look(run, request)
    if isinstance(rule, Bolaco):
        found = search(run, request, measured, rest)
        sized = replace(sized, allocator=rule.at(found.trials[found.best].point))
        request = replace(request, budget=sized)
    plan = decide_from(layers, request, measured, rest)
    candidates = {SOLUTION: plan}
    for tilt in TILTS[: request.refine]:
        other = decide_from(layers, request, measured, rest, tilt)
        if other.choices() not in [known.choices() for known in candidates.values()]:
            candidates[tilt.name] = other
    control = control_of(layers, request.template, sized, measured, plan)
    if request.refine and control is not None and sized.includes_control and control.choices() != plan.choices():
        candidates[CONTROL] = control
    tried = dict(candidates) if request.refine else {}
    if request.measure_control:
        if control is None:
            raise UsageError(
                "There is no plan without L R of the same bytes to compare with; leave `measure_control` out."
            )
        tried |= {SOLUTION: plan, CONTROL: control, DENSE: plan.dense()}
    losses = measure(run, tried, analysed=True) if tried else {}
    best = min(candidates, key=lambda name: losses.get(name, 0.0 if name == SOLUTION else math.inf))
    plan = candidates[best]
    if control is not None:
        control = None if best == CONTROL else control_of(layers, request.template, sized, measured, plan)
    return plan, Compared(losses, best, control, found)


def costs_of(request: Request, plan: Plan | None) -> dict[Phase, float]:
    """Of one block in each pass, relative to running and analysing it; in their order."""
    epochs = 0 if request.recovery is None else request.recovery.epochs
    again = request.propagate == "sequential" or request.template.rounds_factors or plan is not None
    again |= any(template.backbone != "none" for template in request.templates())
    measuring = 0.1 * request.refine + (0.2 if request.measure_control else 0.0)
    calibrating = {Phase.CALIBRATING: 1.0 if plan is None else 0.0}
    rule = request.budget.allocator if isinstance(request.budget, Sized) else None
    probes, trials = (rule.probes, rule.trials) if isinstance(rule, Bolaco) else (0, 0)
    backward = {Phase.SENSITIVITY: 0.4 if request.by_loss or request.gradients_first else 0.0}
    return {
        Phase.FORWARD: 0.05 if request.gradients_first else 0.0,
        **(backward | calibrating if request.gradients_first else calibrating | backward),
        Phase.MEASURING: measuring,
        Phase.PROBING: 0.4 * probes,
        Phase.SEARCHING: 0.2 * trials,
        # a pass of recovery runs the block forward and backward; before it, both blocks' outputs are made
        Phase.WRITING: (1.0 if again else 0.05) + (1.0 + 1.5 * epochs if epochs else 0.0),
    }


def _outcome(run: Passes, plan: Plan, compared: Compared) -> Outcome:
    """From the journal, so that a resumed run tells the same as an uninterrupted one."""
    records: dict[str, LayerRecord] = {}
    plans: dict[str, LayerPlan] = {}
    weight_map: dict[str, str] = {}
    recovery: dict[str, Recovered] = {}
    rounded: dict[str, Any] = {}
    for index in range(run.count):
        line = run.journal.steps[of_block(Phase.WRITING, index)]
        if line["recovery"]:
            recovery[str(index)] = line["recovery"]
        for name, content in line["layers"].items():
            records[name] = LayerRecord(**(content | {"shape": tuple(content["shape"])}))
        plans |= {name: LayerPlan.from_dict(name, content) for name, content in line["plans"].items()}
        weight_map |= dict.fromkeys(line["tensors"], line["file"])
    if run.journal.has(REST):
        line = run.journal.steps[REST]
        rounded = line.get("rounded", {})
        weight_map |= dict.fromkeys(line["tensors"], line["file"])
    for name, record in records.items():
        reason = plan.layers[name].reason
        said = None if reason == NEVER_RAN else f"left dense: {reason}"  # when the plan was made
        for text in record.warnings:
            if text != said:
                warnings.warn(f"{name}: {text}", LordWarning, stacklevel=2)
    ordered = {name: records[name] for name in run.survey.layers}
    return Outcome(ordered, plan, plans, weight_map, recovery, compared, rounded)
