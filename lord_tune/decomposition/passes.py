"""What the passes over a model's blocks share: the skeleton, the text, the journal, and a block's weights in memory.

The first pass that runs the model carries one short window of held-out text more, whose blocks' outputs and logits are
compared with those of an ordinary forward pass: the model whole, its weights loaded one block at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..calibration.collect import BlockWalk
from ..calibration.moments import InputStatistics
from ..calibration.reference import Reference
from ..calibration.task import Task
from ..console import human_bytes
from ..errors import CalibrationError, LordWarning
from ..factorizations import Factorization
from .base import CHECKED_TOKENS, GivenCodes, Notify, Source, Windows
from .clock import Clock
from .exchange import Result, dealt_out
from .journal import Journal
from .made import Made
from .shards import Loaded
from .steps import CHECKED, Phase, start_of
from .survey import Survey
from .timing import layer_flops

CALIBRATION, HELDOUT, SENSITIVITY = "calibration", "heldout", "sensitivity"  # streams of windows
CHECK = "check"  # one short window, compared with an ordinary forward pass
Statistics = Mapping[str, Mapping[str, InputStatistics]]  # stream -> layer -> of its input


class Passes:
    """One run over one checkpoint."""

    def __init__(
        self,
        source: Source,
        survey: Survey,
        windows: Windows | None,
        task: Task,
        journal: Journal,
        costs: dict[Phase, float],  # of one block, relative; for the remaining time
        notify: Notify,
        given: GivenCodes | None = None,
    ):
        self.source, self.survey, self.windows, self.task, self.journal = source, survey, windows, task, journal
        self.given, self.made = given, Made()
        self.model, self.blocks, self.workers = source.model, survey.blocks, journal.workers
        self.count = len(self.blocks.modules)
        self.shards = self.count + (0 if self.blocks.whole else 1)
        self.clock = Clock(self.count, costs, notify)
        self._tied: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        self.tensors = [name for name in self.model.state_dict() if name not in self._tied]
        inside = {n for n in self.tensors if any(self.blocks.holds(i, n) for i in range(self.count))}
        self.outside = [name for name in self.tensors if name not in inside]
        self._resident: Loaded | None = None  # the parts outside the blocks, where every block needs them
        self._reference: Reference | None = None

    @property
    def text(self) -> Windows:
        """The windows, where a pass cannot do without."""
        assert self.windows is not None, "decompose_checkpoint refuses to start without text"
        return self.windows

    def loaded(self, index: int) -> Loaded:
        """The weights of block `index` in memory, for the length of a `with`."""
        names = [n for n in self.tensors if self.blocks.holds(index, n)]
        tied = {origin for target, origin in self._tied.items() if self.blocks.holds(index, target)}
        elsewhere = sorted(tied - set(names) - set(self.outside))  # in another block, whose shard has it
        return Loaded(self.source, names, self.model, self.blocks.whole, elsewhere)

    def modules(self, index: int) -> dict[str, Any]:
        """The block's layers that are to be decomposed, as they are now."""
        return {name: site.module(self.model) for name, site in self.survey.members(index).items()}

    def prepared(self) -> Tensor:
        """The windows that the loss runs the model on."""
        return torch.cat([self.task.prepare(window[None]) for window in self.text.sensitivity])

    def walk(self, streams: dict[str, Tensor], phase: Phase, alike: bool = False) -> BlockWalk:
        """A walk with its first states written, by this or an earlier process."""
        folder = self.journal.work / f"states-{phase}"
        begun = self.journal.steps.get(start_of(phase))
        first = not any(self.journal.has(start_of(other)) for other in Phase)
        if first or (begun is not None and begun["checks"]):
            streams = streams | {CHECK: self.text.heldout[:1, :CHECKED_TOKENS]}
        walk = BlockWalk(self.model, self.blocks, streams, self.task.forward, folder, self.workers, alike)
        if not walk.streamed:
            return walk
        if CHECK in streams:
            self._reference = Reference(self.model, self.blocks, self.task, folder)
        head = self._head()
        rest = [name for name in self.outside if name not in head]
        with Loaded(self.source, head, self.model):
            pass  # its values are checked now, not after hours
        # of a walk before this one they may be in memory, and stay there
        with Loaded(self.source, rest if self._resident is None else [], self.model):
            with self.loaded(0):
                with self._valued():
                    if begun is None:
                        reason = walk.start()
                    else:
                        walk.resume(begun["follows"])
            if begun is None and self._reference is not None and len(walk.windows.get(CHECK, ())):
                with self._valued(), ExitStack() as held:

                    def load(index: int) -> None:
                        held.close()  # one block at a time
                        held.enter_context(
                            self.loaded(index) if index < self.count else Loaded(self.source, head, self.model)
                        )

                    self._reference.write(walk.windows[CHECK], load)
        if begun is None:
            self.journal.commit(start_of(phase), follows=reason, checks=CHECK in streams)
        if walk.whole_forward and self._resident is None:
            self._resident = Loaded(self.source, rest, self.model)
            self._resident.__enter__()
            if not self.survey.follows:
                size = sum(p.numel() * p.element_size() for p in self.model.parameters() if not p.is_meta)
                follows = self.journal.steps[start_of(phase)]["follows"]
                warnings.warn(
                    f"The blocks do not only hand their hidden states on ({follows}), so the model's own forward is "
                    f"followed: parts outside the blocks, {human_bytes(size)}, stay in memory beside what plan "
                    "foresees.",
                    LordWarning,
                    stacklevel=2,
                )
        return walk

    @contextmanager
    def _valued(self) -> Iterator[None]:
        """Forward passes of a model that is in memory in part."""
        try:
            yield
        except RuntimeError as error:  # NotImplementedError is one
            if "meta" not in str(error):  # torch's words for computing with a tensor that has no values
                raise
            raise CalibrationError(
                f"{type(self.model).__name__} computes with a tensor that is neither a parameter nor a buffer, so it "
                f"cannot be loaded block by block ({error})."
            ) from error

    @contextmanager
    def outside_loaded(self) -> Iterator[None]:
        """All parts outside the blocks in memory."""
        held = [] if self._resident is None else self._resident.names
        with Loaded(self.source, [name for name in self.outside if name not in held], self.model):
            yield

    def compare(self, walk: BlockWalk, index: int) -> None:
        """Stop the run if block `index`, which is in memory as the checkpoint has it, differs in the walk from what it
        does in an ordinary forward pass."""
        if CHECK in walk.windows and walk.streamed:
            assert self._reference is not None
            walk.advance(index, CHECK)
            self._agreed([self._reference.of_block(walk, index, CHECK)] if len(walk.windows[CHECK]) else [])

    def compare_result(self, walk: BlockWalk) -> None:
        """The same for what the model returns, after the last block."""
        if CHECK in walk.windows and walk.streamed and not self.journal.has(CHECKED):
            assert self._reference is not None
            found = []
            if len(walk.windows[CHECK]):
                with self.outside_loaded():
                    found = [self._reference.of_result(walk, CHECK)]
            self._agreed(found)
            self.journal.commit(CHECKED)

    def _agreed(self, problems: list[str | None]) -> None:
        for of_process in self.workers.gather(problems):
            for problem in of_process:
                if problem is not None:
                    raise CalibrationError(problem)

    def _head(self) -> list[str]:
        """The output head's own tensors, which nothing in front of the blocks needs."""
        head = self.model.get_output_embeddings()
        shared = {id(p) for p in self.model.get_input_embeddings().parameters()}
        own = set() if head is None else {id(p) for p in head.parameters()} - shared
        return [name for name, p in self.model.named_parameters() if id(p) in own and name in self.outside]

    def deal(self, index: int, methods: Mapping[str, Factorization], do: Callable[[str], Result]) -> dict[str, Result]:
        """layer -> do(layer) for those layers of a block that have a method here, each by one process, the results on
        all."""
        members = {name: site for name, site in self.survey.members(index).items() if name in methods}
        work = {name: layer_flops(site.shape, methods[name]) for name, site in members.items()}
        device = torch.device("cpu")
        if members:
            device = next(iter(members.values())).module(self.model).get_parameter("weight").device
        return dealt_out(work, do, self.workers, device)

    def read(self, name: str, *wanted: str) -> dict[str, Tensor]:
        """A working file of process 0, or its tensors with one of `wanted` in their names, on every process."""
        tensors = None
        if self.journal.writes:
            with safe_open(self.journal.work / name, framework="pt") as file:
                # copies: a tensor of the file would keep all of its pages
                kept = [key for key in file.keys() if not wanted or any(part in key for part in wanted)]
                tensors = {key: file.get_tensor(key).clone() for key in kept}
        return self.workers.send_tensors(tensors, 0, torch.device("cpu")) if self.workers.size > 1 else tensors or {}
