"""The driver: decompose a checkpoint block by block, in memory bounded by its largest block.

Longer than 400 lines because the passes are still one class.

Up to three passes over the blocks. In each, a block's weights are loaded, used and released; hidden states lie in
files between blocks; a finished block is a file and a line in the journal.

    calibrating   (only when the allocator needs all spectra first) run the text through the block, factorize its layers
                  at every rank, keep basis and error curves in a file; dense outputs go on to the next block
    sensitivity   (only for allocators that weigh by the loss, or methods that weigh by gradients: then the pass before
                  it only runs the blocks) gradients of the loss, from the last block to the first
    writing       the factors of the chosen rank. With ranks known from the start this is the only pass and calibrates
                  too; `propagate: sequential` makes it calibrate on the outputs of the blocks already decomposed

Memory at the peak: one block's weights, the Gram matrices of its distinct inputs, 8 in^2 bytes each, the held-out rows,
and the float64 matrices of the layer at hand. estimate.py has the model that `lord-tune plan` prints and every run
checks against its measured peak.

Processes: each runs its share of the windows; Gram matrices are summed over them; the layers of a block are dealt out.

Projection to one 24 GB GPU, on paper: `plan` on the shapes of Llama-2 7B and 70B, bfloat16, 128 windows of 2,048 tokens
(T = 262,144), LoRD with uniform ranks / NF4 with rank 64:

    time   = 2 P T / F16 + sum over distinct inputs of T (in + 192) in / F32
             + sum over layers of (2 k in^2 + 2 out k (in + k) + 6 k^3) / F64 + 13.5 k^3 / E64
    memory = p_block + sum over distinct inputs of 8 in^2 + held-out rows + work on the largest layer (estimate.py)

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

import dataclasses
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..allocation import LayerSpectrum, break_even
from ..calibration.collect import BlockWalk
from ..calibration.moments import InputStatistics, Moments
from ..calibration.sensitivity import fisher_means, output_sensitivity, whole_model_fisher, whole_model_sensitivity
from ..calibration.task import Task
from ..errors import CalibrationError, LordError, LordWarning, UsageError
from ..factorizations import Fisher, Projection
from ..layer_plan import LayerPlan
from ..layers import FactoredLinear, shape_of, weight_of
from ..parallel import share_out
from ..storage import write_tensors
from .base import LayerRecord, Notify, Progress, Settings, Source, Windows
from .budget import check_kept, known_ranks, needs_text
from .journal import Journal
from .layerwise import Analysis, Finished, analyse, install, left_dense, project_layer, split_layer
from .recovery import STUDENT, STUDENT_HELDOUT, tune_block
from .shards import Loaded, to_meta
from .survey import Survey
from .timing import layer_flops

_SENSITIVITY = "sensitivity"
_COST = {
    "calibrating": 1.0,
    "gradients": 0.05,
    "sensitivity": 0.4,
    "writing": 0.05,
}  # of a block, relative; for the remaining time


@dataclass(frozen=True)
class Outcome:
    """What became of a model: the records of all eligible layers, why others were left, the plans and the shards."""

    records: dict[str, LayerRecord]
    skipped: dict[str, str]
    plans: dict[str, LayerPlan]
    weight_map: dict[str, str]  # tensor -> file
    recovery: dict[str, dict[str, Any]]  # block -> held-out error before and after block-wise recovery, passes kept


def decompose_checkpoint(
    source: Source,
    found: Survey,
    settings: Settings,
    windows: Windows | None,
    task: Task,
    journal: Journal,
    notify: Notify = lambda step: None,
) -> Outcome:
    """Write the shards of the decomposed checkpoint into the journal's folder."""
    if windows is None and needs_text(settings):
        raise CalibrationError(
            f"Method '{settings.method.name}' with these ranks needs calibration text; pass --calibration FILE."
        )
    if settings.quantizer is None and not isinstance(settings.method, Projection):
        raise UsageError(f"Method '{settings.method.name}' needs a quantized backbone; pass --backbone nf4.")
    run = _Run(source, found, settings, windows, task, journal, notify)
    ranks = known_ranks(found.layers, settings)
    if ranks is None:
        run.calibrate()
        ranks = run.choose_ranks()
        stored = settings.propagate == "dense" and not settings.rounds_factors
    else:
        stored = False
        if "fisher" in settings.method.needs:
            run.measure_gradients()
    check_kept(found, ranks, settings)
    if all(rank is None for rank in ranks.values()):
        journal.discard()
        raise LordError("Every layer stays dense at this budget, so nothing is done; choose another --kept-fraction.")
    run.write(ranks, from_analysis=stored)
    run.write_rest()
    return run.outcome()


class _Run:
    """The passes; what they share is the model's skeleton, the journal and the clock."""

    def __init__(
        self,
        source: Source,
        found: Survey,
        settings: Settings,
        windows: Windows | None,
        task: Task,
        journal: Journal,
        notify: Notify,
    ):
        self.source, self.found, self.settings, self.windows = source, found, settings, windows
        self.task, self.journal, self.notify = task, journal, notify
        self.model, self.blocks, self.workers = source.model, found.blocks, journal.workers
        self.count = len(self.blocks.modules)
        self.shards = self.count + (1 if self.blocks.prefix else 0)
        self._tensors = [
            n for n in self.model.state_dict() if n not in getattr(self.model, "all_tied_weights_keys", {})
        ]
        inside = {n for n in self._tensors if any(self.blocks.holds(i, n) for i in range(self.count))}
        self._rest = [name for name in self._tensors if name not in inside]
        self._start = time.perf_counter()
        self._done_cost = 0.0
        two = known_ranks(found.layers, settings) is None
        self._fisher = "fisher" in settings.method.needs
        self._middle = self.count // 2  # where a layer of each shape is compared with feedback rounding alone
        tuned = 0 if settings.recovery is None else settings.recovery.epochs
        weighted = two and "loss_weights" in settings.allocator.needs
        again = settings.propagate == "sequential" or settings.rounds_factors or not two
        self._costs = {
            "calibrating": _COST["calibrating"] if two else _COST["gradients"] if self._fisher else 0.0,
            "sensitivity": _COST["sensitivity"] if weighted or self._fisher else 0.0,
            "writing": (1.0 if again else _COST["writing"]) + (1.0 + 1.5 * tuned if tuned else 0.0),
        }

    # --- the calibrating pass ---

    def calibrate(self) -> None:
        """Analyse every block; keep what the sensitivity pass needs on the way."""
        assert self.windows is not None
        weighted = "loss_weights" in self.settings.allocator.needs
        streams = {"calibration": self.windows.calibration, "heldout": self.windows.heldout}
        if weighted:
            streams[_SENSITIVITY] = self._prepared()
        walk = self._walk(streams, "calibrating")
        for index in range(self.count):
            step = f"calibrating/{index}"
            if self.journal.has(step):
                continue
            with self._loaded(index):
                analyses = self._analyse_block(walk, index)
                if weighted and walk.streamed:
                    walk.advance(index, _SENSITIVITY)
            path = self.journal.work / f"analysis-{index:05d}.safetensors"
            tensors = {f"{n}:{k}": t for n, a in analyses.items() if a is not None for k, t in a.tensors().items()}
            digest = write_tensors(path, tensors) if self.journal.writes else None
            facts = {name: None if a is None else a.facts for name, a in analyses.items()}
            del analyses, tensors  # not beside those of the next block
            self._commit(step, "calibrating", index, path, digest, layers=facts)
            # one step late: another process may die before process 0 has recorded this one
            walk.forget(index - 1, ["calibration", "heldout"])
        if weighted:
            self._measure_sensitivity(walk)

    def _prepared(self) -> Tensor:
        """The windows that the loss runs the model on."""
        assert self.windows is not None
        return torch.cat([self.task.prepare(window[None]) for window in self.windows.sensitivity])

    def measure_gradients(self) -> None:
        """Squared gradients by every weight, for methods that weigh with them."""
        walk = self._walk({_SENSITIVITY: self._prepared()}, "calibrating")
        for index in range(self.count if walk.streamed else 0):
            step = f"calibrating/{index}"
            if not self.journal.has(step):
                with self._loaded(index):
                    walk.advance(index, _SENSITIVITY)
                self.journal.commit(step)
                self._report("calibrating", index, {})
        self._measure_sensitivity(walk)

    def _walk(self, streams: dict[str, Tensor], phase: str) -> BlockWalk:
        """A walk with its first states written, by this or an earlier process."""
        folder = self.journal.work / f"states-{phase}"
        walk = BlockWalk(self.model, self.blocks, streams, self.task.forward, folder, self.workers)
        if walk.streamed:
            head = self._head()
            with Loaded(self.source, head, self.model):
                pass  # its values are checked now, not after hours
            with Loaded(self.source, [n for n in self._rest if n not in head], self.model), self._loaded(0):
                walk.record()
                if not self.journal.has(f"started-{phase}"):
                    walk.start()
            if not self.journal.has(f"started-{phase}"):
                self.journal.commit(f"started-{phase}")
        return walk

    def _head(self) -> list[str]:
        """The output head's own tensors, which nothing in front of the blocks needs."""
        head = self.model.get_output_embeddings()
        shared = {id(p) for p in self.model.get_input_embeddings().parameters()}
        own = set() if head is None else {id(p) for p in head.parameters()} - shared
        return [name for name, p in self.model.named_parameters() if id(p) in own and name in self._rest]

    def _loaded(self, index: int) -> Loaded:
        return Loaded(self.source, [n for n in self._tensors if self.blocks.holds(index, n)], self.model)

    def _collect(self, walk: BlockWalk | None, index: int, keep: bool) -> dict[str, dict[str, InputStatistics]]:
        if walk is None:
            return {}
        return walk.collect(index, self.found.members(index), keep, sampled=("heldout",))

    def _analyse(self, name: str, module: Any, statistics: dict[str, dict[str, InputStatistics]]) -> Analysis | None:
        calibration = statistics["calibration"].get(name)
        if calibration is None:  # it never ran
            return None
        assert isinstance(calibration, Moments)
        return analyse(weight_of(module), calibration, statistics["heldout"].get(name), self.settings)

    def _dealt_out(self, members: dict[str, nn.Module], work: Any) -> dict[str, Any]:
        """name -> work(name, module), each done by one process and sent to all."""
        owners = share_out({n: layer_flops(shape_of(m), self.settings) for n, m in members.items()}, self.workers.size)
        mine = {n: work(n, m) for n, m in members.items() if owners[n] == self.workers.rank}
        if self.workers.size == 1:
            return mine
        device = next(iter(members.values())).weight.device if members else torch.device("cpu")
        return {n: self._sent(mine.get(n), owners[n], device) for n in members}

    def _sent(self, value: Any, owner: int, device: Any) -> Any:
        """An Analysis, a Finished or None of its owner, on every process."""
        form: Any = None
        tensors: dict[str, Tensor] | None = None
        if isinstance(value, Analysis):
            form, tensors = ("analysis", value.facts, None), value.tensors()
        elif isinstance(value, Finished):
            plan = None if value.layer is None else value.layer.plan
            form, tensors = ("finished", value.record, plan), {} if value.layer is None else value.layer.state_dict()
        form = self.workers.send(form, owner)
        if form is None:
            return None
        tensors = self.workers.send_tensors(tensors, owner, device)
        kind, content, plan = form
        if kind == "analysis":
            return value if isinstance(value, Analysis) else Analysis.of(tensors, content)
        if isinstance(value, Finished):
            return value
        if plan is None:
            return Finished(content)
        layer = FactoredLinear(plan, device="meta")
        layer.load_state_dict(tensors, strict=True, assign=True)
        return Finished(content, layer.requires_grad_(False))

    def _commit(self, step: str, phase: str, index: int, path: Any, digest: str | None, **content: Any) -> None:
        self.journal.commit(step, path, digest, **content)
        self._report(phase, index, {})

    def _report(self, phase: str, index: int, layers: dict[str, LayerRecord]) -> None:
        done = index + 1 if phase != "sensitivity" else self.count - index
        self._done_cost += self._costs[phase]
        left = 0.0
        order = list(self._costs)
        for name, cost in self._costs.items():
            ahead = self.count if order.index(name) > order.index(phase) else self.count - done if name == phase else 0
            left += ahead * cost
        elapsed = time.perf_counter() - self._start
        remaining = elapsed / self._done_cost * left if self._done_cost else None
        self.notify(Progress(phase, done, self.count, remaining, layers))

    # --- the sensitivity pass ---

    def _measure_sensitivity(self, walk: BlockWalk) -> None:
        assert self.windows is not None
        tokens = self.windows.sensitivity.numel()
        if not walk.streamed:
            self._whole_sensitivity(walk, tokens)
            return
        if not self.journal.has("started-sensitivity"):
            # the corrupted ids of a masked model are drawn again by the loss itself: the same ones
            walk.windows[_SENSITIVITY] = self.windows.sensitivity[self.workers.rank :: self.workers.size]
            with Loaded(self.source, self._rest, self.model):
                walk.write_gradients(_SENSITIVITY, self.task.loss, self.model.get_input_embeddings().weight.device)
            self.journal.commit("started-sensitivity")
        for index in reversed(range(self.count)):
            step = f"sensitivity/{index}"
            if self.journal.has(step):
                continue
            with self._loaded(index):
                if self._fisher:
                    found = self._gradients(index, walk)
                else:
                    members, bases = self._bases(index)
                    found = output_sensitivity(walk, index, _SENSITIVITY, members, bases, tokens, self.workers)
            self._commit_sensitivity(step, index, found)
            walk.forget(index + 2, [_SENSITIVITY])
            walk.forget(index + 2, [_SENSITIVITY], "gradients")

    def _whole_sensitivity(self, walk: BlockWalk, tokens: int) -> None:
        if self.journal.has("sensitivity/0"):
            return
        assert self.windows is not None
        with self._loaded(0):
            own = self.windows.sensitivity[self.workers.rank :: self.workers.size]
            if self._fisher:
                found = self._gradients(0, own)
            else:
                members, bases = self._bases(0)
                found = whole_model_sensitivity(self.model, own, members, bases, self.task.loss, tokens, self.workers)
        self._commit_sensitivity("sensitivity/0", 0, found)

    def _gradients(self, index: int, source: BlockWalk | Tensor) -> dict[str, Tensor]:
        """Row and column means of the squared gradients by the block's weights."""
        assert self.windows is not None
        members, count = self.found.members(index), len(self.windows.sensitivity)
        shapes = {name: shape_of(module) for name, module in members.items()}
        if isinstance(source, BlockWalk):
            return fisher_means(source, index, _SENSITIVITY, members, shapes, count, self.workers)
        return whole_model_fisher(self.model, source, members, shapes, self.task.loss, count, self.workers)

    def _bases(self, index: int) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
        analyses = self._analyses(index)
        members = {name: module for name, module in self.found.members(index).items() if analyses[name] is not None}
        return members, {name: analyses[name].spectrum.basis for name in members}

    def _commit_sensitivity(self, step: str, index: int, found: dict[str, Tensor]) -> None:
        path = self.journal.work / f"sensitivity-{index:05d}.safetensors"
        digest = write_tensors(path, found) if self.journal.writes else None
        self._commit(step, "sensitivity", index, path, digest)

    def _read(self, name: str, ending: str = "") -> dict[str, Tensor]:
        """A working file of process 0, or its tensors of this ending, on every process."""
        tensors = None
        if self.journal.writes:
            with safe_open(self.journal.work / name, framework="pt") as file:
                # copies: a tensor of the file would keep all of its pages
                tensors = {key: file.get_tensor(key).clone() for key in file.keys() if key.endswith(ending)}
        return self.workers.send_tensors(tensors, 0, torch.device("cpu")) if self.workers.size > 1 else tensors or {}

    def _analyses(self, index: int) -> dict[str, Any]:
        tensors = self._read(f"analysis-{index:05d}.safetensors")
        by_layer: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(":")
            by_layer.setdefault(name, {})[part] = tensor
        facts = self.journal.steps[f"calibrating/{index}"]["layers"]
        return {n: None if f is None else Analysis.of(by_layer[n], f) for n, f in facts.items()}

    # --- ranks ---

    def choose_ranks(self) -> dict[str, int | None]:
        """Ask the allocator; None is dense. Layers that never ran are left out."""
        spectra = {}
        for index in range(self.count):
            weights = self._read(f"sensitivity-{index:05d}.safetensors") if self._costs["sensitivity"] else {}
            for key, energies in self._read(f"analysis-{index:05d}.safetensors", ":energies").items():
                name = key.removesuffix(":energies")
                weight = weights.get(name)
                shape = shape_of(self.found.layers[name])
                spectra[name] = LayerSpectrum(shape, energies.cpu(), None if weight is None else weight.cpu())
        assert self.settings.kept_fraction is not None
        return self.settings.allocator.allocate(spectra, self.settings.kept_fraction)

    # --- the writing pass ---

    def write(self, ranks: dict[str, int | None], from_analysis: bool) -> None:
        """Factorize at the chosen ranks and write one shard per block."""
        walk = None
        how = self.settings.recovery
        student = [STUDENT, STUDENT_HELDOUT] if how else ["calibration", "heldout"]
        handed_on = student if how or self.settings.propagate == "sequential" else []
        if self.windows is not None and (how or not from_analysis):
            streams = {"calibration": self.windows.calibration, "heldout": self.windows.heldout}
            if how:
                streams |= dict(zip(student, list(streams.values()), strict=True))
            walk = self._walk(streams, "writing")
            if how and not walk.streamed:
                raise UsageError("The model has no repeated blocks, so there is no block-wise recovery; leave it out.")
        for index in range(self.count):
            step = f"writing/{index}"
            if self.journal.has(step):
                self._show_plans(step)
                continue
            with self._loaded(index) as loaded:
                last = index + 1 == self.count
                done = self._factorize(walk, index, ranks, from_analysis)
                recovered = None
                for name, finished in done.items():
                    if finished.layer is not None:
                        self.model.set_submodule(name, finished.layer)
                if walk is not None and how:
                    layers = {name: f.layer for name, f in done.items() if f.layer is not None}
                    recovered = tune_block(walk, index, layers, how, self.workers)
                if walk is not None and not last:
                    for stream in handed_on:
                        walk.advance(index, stream)
                path = self.journal.folder / self._shard_name(index)
                tensors = self._shard(loaded, set(done))
                digest = write_tensors(path, tensors) if self.journal.writes else None
                content = {
                    "layers": {name: dataclasses.asdict(f.record) for name, f in done.items()},
                    "plans": {name: f.layer.plan.to_dict() for name, f in done.items() if f.layer is not None},
                    "tensors": list(tensors),
                    "recovery": recovered,
                }
                del tensors
                for name in done:
                    to_meta(self.model.get_submodule(name))
                    to_meta(self.found.layers[name])  # the dense layer it replaced, which the survey still knows
            self.journal.commit(step, path, digest, **content)
            self._report("writing", index, {name: f.record for name, f in done.items()})
            if walk is not None:
                walk.forget(index - 1, list(walk.windows))

    def _factorize(
        self, walk: BlockWalk | None, index: int, ranks: dict[str, int | None], from_analysis: bool
    ) -> dict[str, Finished]:
        """The layers of the block in memory; the statistics of their inputs are gone on return."""
        statistics = self._statistics(walk, index, from_analysis)
        analyses = self._analyses(index) if from_analysis else {}
        gradients = self._read(f"sensitivity-{index:05d}.safetensors") if self._fisher else {}

        members = self.found.members(index)
        first = {shape_of(module): name for name, module in reversed(members.items())}

        def finish(name: str, module: nn.Module) -> Finished:
            compare = index == self._middle and first[shape_of(module)] == name
            fisher = None
            if self._fisher:
                rows, columns = gradients[f"{name}:rows"].sqrt(), gradients[f"{name}:columns"].sqrt()
                fisher = Fisher(rows, columns)
            return self._finish(name, module, statistics, analyses, ranks, walk is not None, fisher, compare)

        return self._dealt_out(members, finish)

    def _statistics(
        self, walk: BlockWalk | None, index: int, from_analysis: bool
    ) -> dict[str, dict[str, InputStatistics]]:
        """Of the inputs that the writing pass calibrates on; the original block's outputs are written on the way where
        somebody needs them: the next block, or block-wise recovery."""
        how, sequential = self.settings.recovery, self.settings.propagate == "sequential"
        if walk is None:
            return {}
        if how is None:
            return self._collect(walk, index, keep=not (sequential or index + 1 == self.count))
        if sequential or from_analysis:
            for stream in ("calibration", "heldout"):
                walk.advance(index, stream)
        if from_analysis:
            return {}
        if not sequential:
            return self._collect(walk, index, keep=True)
        members, streams = self.found.members(index), (STUDENT, STUDENT_HELDOUT)
        found = walk.collect(index, members, False, (STUDENT_HELDOUT,), streams)
        return {"calibration": found[STUDENT], "heldout": found[STUDENT_HELDOUT]}

    def _analyse_block(self, walk: BlockWalk, index: int) -> dict[str, Analysis | None]:
        statistics = self._collect(walk, index, keep=index + 1 < self.count)

        def look(name: str, module: nn.Module) -> Analysis | None:
            return self._analyse(name, module, statistics)

        return self._dealt_out(self.found.members(index), look)

    def _show_plans(self, step: str) -> None:
        """Give the skeleton the layers of a block that an earlier process wrote."""
        for name, content in self.journal.steps[step]["plans"].items():
            plan = LayerPlan.from_dict(name, content)
            dtype: Any = self.found.layers[name].weight.dtype
            self.model.set_submodule(name, FactoredLinear(plan, device="meta", dtype=dtype))

    def _finish(
        self,
        name: str,
        module: Any,
        statistics: dict[str, dict[str, InputStatistics]],
        analyses: dict[str, Any],
        ranks: dict[str, int | None],
        walked: bool,
        fisher: Fisher | None,
        compare: bool,
    ) -> Finished:
        if analyses:
            if analyses[name] is None:
                return left_dense(module, 0.0, "it never ran on the calibration text")
            return install(module, analyses[name], ranks[name], self.settings)
        calibration = statistics.get("calibration", {}).get(name)
        heldout = statistics.get("heldout", {}).get(name)
        if walked and calibration is None or name not in ranks:
            return left_dense(module, 0.0, "it never ran on the calibration text")
        assert calibration is None or isinstance(calibration, Moments)
        rank = ranks[name]
        if self.settings.quantizer is not None:
            assert rank is not None
            return split_layer(module, calibration, heldout, rank, self.settings, fisher, compare and rank > 0)
        if rank is None and self.settings.rank is not None:
            limit = break_even(shape_of(module))
            return left_dense(module, 0.0, f"rank {self.settings.rank} is above its break-even {limit}")
        return project_layer(module, calibration, heldout, rank, self.settings)

    def _shard_name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.shards:05d}.safetensors"

    def _shard(self, loaded: Loaded, decomposed: set[str]) -> dict[str, Tensor]:
        """Tensors of a block: of decomposed layers as they are now, all others as the checkpoint stores them."""
        if not self.journal.writes:
            return {}
        tensors: dict[str, Tensor] = {}
        for prefix in decomposed:
            module = self.model.get_submodule(prefix)
            if isinstance(module, FactoredLinear):
                tensors |= {f"{prefix}.{key}": tensor for key, tensor in module.state_dict().items()}
        for name in loaded.names:
            owner = name.rpartition(".")[0]
            if not (owner in decomposed and isinstance(self.model.get_submodule(owner), FactoredLinear)):
                tensors[name] = self._untouched(name)
        return {name: tensors[name] for name in sorted(tensors)}

    def _untouched(self, name: str) -> Tensor:
        """As the checkpoint stores it; else, where transformers converts or --dtype casts, as it is in memory."""
        stored = self.source.stored(name)
        if stored is not None:
            return stored
        owner, _, leaf = name.rpartition(".")
        return self.model.get_submodule(owner).state_dict()[leaf]

    def write_rest(self) -> None:
        """The shard of everything outside the blocks."""
        if not self.blocks.prefix or self.journal.has("rest"):
            return
        path = self.journal.folder / self._shard_name(self.count)
        tensors: dict[str, Tensor] = {}
        digest = None
        if self.journal.writes:
            stored = {name: self.source.stored(name) for name in self._rest}
            with Loaded(self.source, [name for name, tensor in stored.items() if tensor is None], self.model):
                tensors = {n: self._untouched(n) if t is None else t for n, t in stored.items()}
                digest = write_tensors(path, tensors)
        self.journal.commit("rest", path, digest, tensors=list(tensors))

    def outcome(self) -> Outcome:
        """From the journal, so that a resumed run tells the same as an uninterrupted one."""
        records: dict[str, LayerRecord] = {}
        plans: dict[str, LayerPlan] = {}
        weight_map: dict[str, str] = {}
        recovery: dict[str, dict[str, Any]] = {}
        for index in range(self.count):
            line = self.journal.steps[f"writing/{index}"]
            if line["recovery"]:
                recovery[str(index)] = line["recovery"]
            for name, content in line["layers"].items():
                records[name] = LayerRecord(**(content | {"shape": tuple(content["shape"])}))
            plans |= {name: LayerPlan.from_dict(name, content) for name, content in line["plans"].items()}
            weight_map |= dict.fromkeys(line["tensors"], line["file"])
        if self.journal.has("rest"):
            line = self.journal.steps["rest"]
            weight_map |= dict.fromkeys(line["tensors"], line["file"])
        for name, record in records.items():
            for text in record.warnings:
                warnings.warn(f"{name}: {text}", LordWarning, stacklevel=2)
        return Outcome(
            {name: records[name] for name in self.found.layers}, self.found.skipped, plans, weight_map, recovery
        )
