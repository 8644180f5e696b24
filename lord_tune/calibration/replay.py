"""Blocks of any model, one at a time, by the model's own forward: whatever it does between, beside and around them.

For every window and every block the model's forward runs again from its start. Blocks that ran before are answered with
what they returned then, from files; the block at hand runs for real; then the pass is ended. So arguments that depend
on the window (per-layer inputs, encoder states), layers between blocks, and states that blocks leave to later ones in a
list or mapping (shared keys and values) are what the model makes of them. The price: the parts outside the blocks stay
in memory, but for the output head, and run again for every block.

Nothing is read that the model does not use: an answer is a tensor that loads its file when something computes with it
(`Kept`). A file is removed as soon as no forward pass holds its tensor any more.

On the way back, what a pass reads requires gradients: those of the block at hand are added to what later passes left.
Files of gradients carry the block whose pass wrote them, so that a pass that died is repeated from the sums before it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path as File
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..kept import Kept, plain
from ..storage import read_json, write_json
from .blocks import Forward, Stop, hidden_argument, hidden_of, replaced_forward
from .route import Answer, Ask, Ground, Loss
from .states import StateFile, StateWriter
from .trees import Path, at, containers, items, mapped, tensors

Leaf = tuple[int, int]  # (block, number of the tensor among what the block returned or left)
Json = dict[str, Any]
Result = TypeVar("Result")


@dataclass
class _Pass:
    """One forward pass over one window: which files it read, and what the block at hand did."""

    route: Replayed
    stream: str
    position: int
    hand: int  # the block at hand
    gradients: bool = False  # what is read requires gradients
    keep: bool = False  # what the block at hand gives will be written
    read: dict[Leaf, Tensor] = field(default_factory=dict)
    given: dict[Leaf, weakref.ref[Tensor]] = field(default_factory=dict)
    answered: dict[int, int] = field(default_factory=dict)  # block -> its calls so far
    tensors: list[Tensor] = field(default_factory=list)  # what the block at hand returned or left
    forms: list[Json] = field(default_factory=list)  # of its calls
    output: object = None  # of its last call
    surviving: set[int] = field(default_factory=set)  # which of these tensors the rest of the forward may use

    def kept(self, leaf: Leaf, form: Json) -> Kept:
        def read() -> Tensor:
            if leaf not in self.read:
                own = leaf[0] == self.hand
                value = self.tensors[leaf[1]] if own else self.route.load(self.stream, leaf, self.position)
                wanted = self.gradients and value.is_floating_point()
                self.read[leaf] = value.requires_grad_(True) if wanted else value
            return self.read[leaf]

        kept = Kept(form["shape"], getattr(torch, form["dtype"]), self.route.device(), read)
        self.given[leaf] = weakref.ref(kept)
        return kept

    def alive(self) -> set[Leaf]:
        """What the forward still holds."""
        return {leaf for leaf, reference in self.given.items() if reference() is not None}

    # --- what a block returns, as JSON with tensors in files ---

    def note(self, value: object, arguments: Mapping[int, Path], name: str) -> Json:
        """How to make `value` again; its tensors are appended to `tensors`. `arguments`: id of a tensor that the block
        was called with -> where it is."""
        if isinstance(value, Tensor):
            if id(value) in arguments:
                return {"argument": list(arguments[id(value)])}
            self.tensors.append(value)
            dtype = str(value.dtype).removeprefix("torch.")
            return {"tensor": len(self.tensors) - 1, "shape": list(value.shape), "dtype": dtype}
        if isinstance(value, tuple | list):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return {kind: [self.note(part, arguments, name) for part in value]}
        if type(value) is dict:
            return {"mapping": [[key, self.note(part, arguments, name)] for key, part in value.items()]}
        if value is None or isinstance(value, bool | int | float | str):
            return {"value": value}
        raise CalibrationError(
            f"{name} returns or leaves a {type(value).__name__}, which cannot be kept for later blocks; the model "
            "cannot be walked block by block."
        )

    def made(self, form: Json, index: int, arguments: object) -> object:
        """What `note` was told."""
        if "argument" in form:
            return at(arguments, tuple(form["argument"]))
        if "tensor" in form:
            return self.kept((index, form["tensor"]), form)
        if "mapping" in form:
            return {key: self.made(part, index, arguments) for key, part in form["mapping"]}
        for kind, build in (("tuple", tuple), ("list", list)):
            if kind in form:
                return build(self.made(part, index, arguments) for part in form[kind])
        return form["value"]


class Replayed:
    """The route for all other models."""

    whole_forward = True

    def __init__(self, ground: Ground):
        self._ground, self._blocks = ground, ground.blocks
        self._forms: dict[tuple[str, int], list[Json]] = {}  # (stream, block) -> one per call
        self._needed: dict[tuple[str, int], set[Leaf]] = {}  # what a pass through this block needs
        self._open: dict[File, StateFile] = {}

    def start(self) -> None:
        """Nothing is in front of block 0: its inputs are made again."""

    def resume(self) -> None:
        """What blocks returned is read when it is asked for."""

    def device(self) -> torch.device:
        return self._ground.device_outside()

    # --- files ---

    def _file(self, stream: str, leaf: Leaf, kind: str = "outputs", at: int | None = None) -> File:
        base = self._ground.file(kind, stream, leaf[0])
        return base.with_name(f"{base.stem}.{leaf[1]}{'' if at is None else f'.at{at:05d}'}.bin")

    def _form_file(self, stream: str, index: int) -> File:
        return self._ground.file("form", stream, index).with_suffix(".json")

    def _form(self, stream: str, index: int) -> list[Json]:
        if (stream, index) not in self._forms:
            self._forms[stream, index] = read_json(self._form_file(stream, index))["calls"]
        return self._forms[stream, index]

    def _from(self, path: File, position: int) -> Tensor:
        if path not in self._open:
            self._open[path] = StateFile(path)
        return self._open[path][position]

    def load(self, stream: str, leaf: Leaf, position: int) -> Tensor:
        return self._from(self._file(stream, leaf), position).to(self.device())

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Files stay open for the length of a pass over a stream."""
        try:
            yield
        finally:
            for file in self._open.values():
                file.close()
            self._open.clear()

    # --- passes ---

    @contextmanager
    def _replaced(self, run: _Pass, index: int) -> Iterator[None]:
        """Forward passes that are answered before block `index`, run it, and end after it."""
        blocks, paths = self._blocks, self._blocks.paths

        def make(number: int, original: Forward) -> Forward:
            def call(*args: object, **kwargs: object) -> object:
                done = run.answered.get(number, 0)
                ready = all(run.answered.get(i, 0) == blocks.runs(i) for i in range(number))
                if not ready or done == blocks.runs(number) or any(i > number for i in run.answered):
                    raise CalibrationError(
                        f"{paths[number]} ran out of order (the blocks are expected to run as {', '.join(paths[:3])}, "
                        "...); the model cannot be walked block by block."
                    )
                run.answered[number] = done + 1
                arguments = [list(args), kwargs]
                if number < index:
                    return self._answer(run, number, done, arguments)
                # what parts outside the blocks have read by now they will read in every later pass
                needed = run.alive() | run.read.keys()
                if number > index:  # the block at hand is done: what of it is needed?
                    run.surviving = {n for block, n in needed if block == index}
                    raise Stop
                if done == 0:
                    self._needed.setdefault((run.stream, index), set()).update(needed)
                return self._run_for_real(run, number, original, arguments)

            return call

        with replaced_forward(dict(enumerate(blocks.modules)), make):
            yield

    def _answer(
        self, run: _Pass, number: int, done: int, arguments: list[Any], forms: list[Json] | None = None
    ) -> object:
        form = (self._form(run.stream, number) if forms is None else forms)[done]
        for path, key, part in form["left"]:
            container: Any = at(arguments, tuple(path))
            container[key] = run.made(part, number, arguments)
        return run.made(form["returned"], number, arguments)

    def _run_for_real(self, run: _Pass, number: int, original: Forward, arguments: list[Any]) -> object:
        args, kwargs = arguments
        mapped(args, plain)
        mapped(kwargs, plain)
        if run.gradients:  # also of what nothing before the block requires gradients of
            hidden = hidden_argument(args, kwargs)
            leaf = hidden if hidden.requires_grad else hidden.detach().requires_grad_(True)
            for given_there in (args, kwargs):
                mapped(given_there, lambda tensor: leaf if tensor is hidden else tensor)
        given = {id(tensor): path for path, tensor in tensors(arguments)}
        # the lists and mappings that are the model's own, once each
        boxes = {id(box): (path, box, dict(items(box))) for path, box in containers(arguments) if len(path) > 1}
        output = original(*args, **kwargs)
        name = self._blocks.paths[number]
        left = []
        for path, box, held in boxes.values():
            for key, value in items(box):
                if key not in held or held[key] is not value:
                    left.append([list(path), key, run.note(value, given, name)])
        run.forms.append({"returned": run.note(output, given, name), "left": left})
        run.output = output
        if run.answered[number] < self._blocks.runs(number):
            return output
        if not run.keep or number == len(self._blocks.modules) - 1:  # after the last one comes the output head
            run.surviving = set(range(len(run.tensors)))
            raise Stop
        return self._answer(run, number, run.answered[number] - 1, arguments, run.forms)

    def _run(self, index: int, stream: str, position: int, gradients: bool = False, keep: bool = False) -> _Pass:
        """One window through block `index`."""
        run = _Pass(self, stream, position, index, gradients, keep)
        ended = False
        with self._replaced(run, index):
            try:
                self._ground.forward(self._ground.model, self._ground.windows[stream][position][None])
            except Stop:
                ended = True
        if not ended or run.answered.get(index, 0) != self._blocks.runs(index):
            raise CalibrationError(
                f"{self._blocks.paths[index]} ran {run.answered.get(index, 0)} times in a forward pass on the "
                f"calibration text, expected {self._blocks.runs(index)}; the model cannot be walked block by block."
            )
        return run

    @torch.no_grad()
    def advance(self, index: int, stream: str, keep: bool) -> None:
        with self._reading(), ExitStack() as stack:
            writers: dict[int, StateWriter] = {}
            surviving: set[int] = set()
            forms: list[Json] | None = None
            for position in range(len(self._ground.windows[stream])):
                run = self._run(index, stream, position, keep=keep)
                if not keep:
                    continue
                if forms is None:
                    forms = run.forms
                    surviving = run.surviving
                    paths = {number: self._file(stream, (index, number)) for number in surviving}
                    writers = {number: stack.enter_context(StateWriter(path)) for number, path in paths.items()}
                if run.forms != forms or run.surviving != surviving:
                    raise CalibrationError(
                        f"{self._blocks.paths[index]} returns another structure for some windows; the model cannot be "
                        "walked block by block."
                    )
                for number, writer in writers.items():
                    writer.append(run.tensors[number])
            if forms is not None:
                write_json(self._form_file(stream, index), {"calls": forms})
                self._forms[stream, index] = forms

    def output(self, index: int, stream: str, position: int) -> Tensor:
        with self._reading():
            return hidden_of(self._run(index, stream, position).output)

    def stored_output(self, index: int, stream: str, position: int) -> Tensor:
        form = self._form(stream, index)[-1]["returned"]
        for kind in ("tuple", "list"):
            form = form[kind][0] if kind in form else form
        if "tensor" not in form:
            raise CalibrationError(f"{self._blocks.paths[index]} returns no hidden states of its own.")
        with self._reading():
            return self._from(self._file(stream, (index, form["tensor"])), position)

    @torch.no_grad()
    def result(self, stream: str, position: int) -> object:
        window = self._ground.windows[stream][position][None]
        return self._whole(stream, position, partial(self._ground.forward, self._ground.model, window))

    def _whole(self, stream: str, position: int, do: Callable[[], Result]) -> Result:
        """A forward pass that is answered for every block."""
        count = len(self._blocks.modules)
        with self._reading(), self._replaced(_Pass(self, stream, position, count), count):
            return do()

    def answers(self, stream: str, ask: Ask[Answer]) -> Iterator[Answer]:
        for position, window in enumerate(self._ground.windows[stream]):
            with torch.no_grad():
                found = self._whole(stream, position, partial(ask, self._ground.model, window[None]))
            yield found

    # --- the way back ---

    def write_gradients(self, stream: str, loss: Loss) -> None:
        count = len(self._blocks.modules)
        windows = self._ground.windows[stream]

        def of_window(position: int) -> dict[Leaf, Tensor]:
            run = _Pass(self, stream, position, count, gradients=True)
            with self._replaced(run, count), torch.enable_grad():
                loss(self._ground.model, windows[position][None]).backward()
            return _gradients(run.read)

        with self._reading():
            self._add(stream, count, len(windows), of_window)

    def backward(self, index: int, stream: str) -> None:
        def of_window(position: int) -> dict[Leaf, Tensor]:
            with torch.enable_grad():
                run = self._run(index, stream, position, gradients=True)
                outputs: list[Tensor] = []
                above: list[Tensor] = []
                for number, tensor in enumerate(run.tensors):
                    gradient = self._sum_above(stream, (index, number), position, index)
                    if gradient is not None and tensor.requires_grad:
                        outputs.append(tensor)
                        above.append(gradient.to(tensor.device))
                if outputs:
                    torch.autograd.backward(outputs, above)
            return _gradients(run.read)

        with self._reading():
            self._add(stream, index, len(self._ground.windows[stream]), of_window)

    def _add(self, stream: str, step: int, count: int, of_window: Callable[[int], Mapping[Leaf, Tensor]]) -> None:
        """Write, for every tensor that a window's pass `step` used, the sum of its gradients so far."""
        with ExitStack() as stack:
            writers: dict[Leaf, StateWriter] = {}
            for position in range(count):
                found = of_window(position)
                if position == 0:
                    for leaf in found:
                        path = self._file(stream, leaf, "gradients", step)
                        writers[leaf] = stack.enter_context(StateWriter(path))
                if found.keys() != writers.keys():
                    raise CalibrationError("The loss depends on other blocks' outputs in some windows than in others.")
                for leaf, gradient in found.items():
                    before = self._sum_above(stream, leaf, position, step)
                    writers[leaf].append(gradient if before is None else gradient + before.to(gradient.device))

    def _sum_above(self, stream: str, leaf: Leaf, position: int, step: int) -> Tensor | None:
        """The gradient by one window's tensor that the passes after `step` added up."""
        path = self._latest(stream, leaf, step)
        return None if path is None else self._from(path, position)

    def _latest(self, stream: str, leaf: Leaf, step: int) -> File | None:
        later = (self._file(stream, leaf, "gradients", n) for n in range(step + 1, len(self._blocks.modules) + 1))
        return next((path for path in later if path.exists()), None)

    # --- what is needed no more ---

    def forget(self, index: int, stream: str) -> None:
        needed = self._needed.get((stream, index + 1))
        if needed is not None:
            self._remove("outputs", stream, lambda block, number: block < index and (block, number) not in needed)

    def forget_gradients(self, index: int, stream: str) -> None:
        for kind in ("outputs", "gradients"):
            self._remove(kind, stream, lambda block, number: block > index + 1)
        for path in self._ground.folder.glob(f"gradients-{stream}-[0-9]*-{self._ground.rank}.*.at*.bin"):
            block, number, step = _parts(path)
            newer = self._latest(stream, (block, number), index)
            if step > index + 2 and newer is not None and newer != path:
                path.unlink(missing_ok=True)

    def _remove(self, kind: str, stream: str, of: Callable[[int, int], bool]) -> None:
        for path in self._ground.folder.glob(f"{kind}-{stream}-[0-9]*-{self._ground.rank}.*.bin"):
            block, number, _ = _parts(path)
            if of(block, number):
                path.unlink(missing_ok=True)


def _gradients(read: Mapping[Leaf, Tensor]) -> dict[Leaf, Tensor]:
    return {leaf: tensor.grad for leaf, tensor in read.items() if tensor.grad is not None}


def _parts(path: File) -> tuple[int, int, int]:
    """(block, number, step) of the name that `_file` gave."""
    stem, number, *rest = path.name.removesuffix(".bin").split(".")
    return int(stem.split("-")[-2]), int(number), int(rest[0].removeprefix("at")) if rest else -1
