"""What the passes over a model's blocks share: the skeleton, the text, the journal, and a block's weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..calibration.collect import BlockWalk
from ..calibration.moments import InputStatistics
from ..calibration.task import Task
from ..factorizations import Factorization
from .base import Notify, Source, Windows
from .clock import Clock
from .exchange import Result, dealt_out
from .journal import Journal
from .shards import Loaded
from .steps import Phase, start_of
from .survey import Survey
from .timing import layer_flops

CALIBRATION, HELDOUT, SENSITIVITY = "calibration", "heldout", "sensitivity"  # streams of windows
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
    ):
        self.source, self.survey, self.windows, self.task, self.journal = source, survey, windows, task, journal
        self.model, self.blocks, self.workers = source.model, survey.blocks, journal.workers
        self.count = len(self.blocks.modules)
        self.shards = self.count + (1 if self.blocks.prefix else 0)
        self.clock = Clock(self.count, costs, notify)
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        self.tensors = [name for name in self.model.state_dict() if name not in tied]
        inside = {n for n in self.tensors if any(self.blocks.holds(i, n) for i in range(self.count))}
        self.outside = [name for name in self.tensors if name not in inside]

    @property
    def text(self) -> Windows:
        """The windows, where a pass cannot do without."""
        assert self.windows is not None, "decompose_checkpoint refuses to start without text"
        return self.windows

    def loaded(self, index: int) -> Loaded:
        """The weights of block `index` in memory, for the length of a `with`."""
        return Loaded(self.source, [n for n in self.tensors if self.blocks.holds(index, n)], self.model)

    def modules(self, index: int) -> dict[str, Any]:
        """The block's layers that are to be decomposed, as they are now."""
        return {name: site.module(self.model) for name, site in self.survey.members(index).items()}

    def prepared(self) -> Tensor:
        """The windows that the loss runs the model on."""
        return torch.cat([self.task.prepare(window[None]) for window in self.text.sensitivity])

    def walk(self, streams: dict[str, Tensor], phase: Phase) -> BlockWalk:
        """A walk with its first states written, by this or an earlier process."""
        folder = self.journal.work / f"states-{phase}"
        walk = BlockWalk(self.model, self.blocks, streams, self.task.forward, folder, self.workers)
        if walk.streamed:
            head = self._head()
            with Loaded(self.source, head, self.model):
                pass  # its values are checked now, not after hours
            with Loaded(self.source, [n for n in self.outside if n not in head], self.model), self.loaded(0):
                walk.record()
                if not self.journal.has(start_of(phase)):
                    walk.start()
            if not self.journal.has(start_of(phase)):
                self.journal.commit(start_of(phase))
        return walk

    def _head(self) -> list[str]:
        """The output head's own tensors, which nothing in front of the blocks needs."""
        head = self.model.get_output_embeddings()
        shared = {id(p) for p in self.model.get_input_embeddings().parameters()}
        own = set() if head is None else {id(p) for p in head.parameters()} - shared
        return [name for name, p in self.model.named_parameters() if id(p) in own and name in self.outside]

    def deal(self, index: int, methods: Mapping[str, Factorization], do: Callable[[str], Result]) -> dict[str, Result]:
        """layer -> do(layer) for the layers of a block, each by one process, the results on all."""
        members = self.survey.members(index)
        work = {name: layer_flops(site.shape, methods[name]) for name, site in members.items()}
        device = torch.device("cpu")
        if members:
            device = next(iter(members.values())).module(self.model).get_parameter("weight").device
        return dealt_out(work, do, self.workers, device)

    def read(self, name: str, ending: str = "") -> dict[str, Tensor]:
        """A working file of process 0, or its tensors of this ending, on every process."""
        tensors = None
        if self.journal.writes:
            with safe_open(self.journal.work / name, framework="pt") as file:
                # copies: a tensor of the file would keep all of its pages
                tensors = {key: file.get_tensor(key).clone() for key in file.keys() if key.endswith(ending)}
        return self.workers.send_tensors(tensors, 0, torch.device("cpu")) if self.workers.size > 1 else tensors or {}
