"""Hidden states between blocks, in files: what makes the memory of a run independent of the amount of text.

One file holds the states of one stream of windows in front of one block. It is written once, in order, and read back
in any order; the operating system's page cache keeps what fits in memory, so no limit has to be chosen. Plain reads and
writes rather than a memory map: on a full disk a map kills the process with SIGBUS, a write raises OSError.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..errors import CalibrationError, CheckpointError
from ..storage import named_write

_HEADER = 256  # bytes


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    values: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(values)


class StateWriter:
    """Appends tensors of one shape and dtype; the file appears under its name when the `with` block ends well."""

    def __init__(self, path: Path):
        self._path, self._temporary = path, path.with_name(path.name + ".partial")
        self._stream: BinaryIO | None = None
        self._shape: tuple[int, ...] | None = None
        self._dtype: torch.dtype | None = None
        self._count = 0

    def __enter__(self) -> StateWriter:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._stream = self._temporary.open("wb")
        self._stream.write(b" " * _HEADER)
        return self

    def append(self, tensor: Tensor) -> None:
        assert self._stream is not None
        if tensor.is_meta:
            raise CalibrationError(
                "The hidden states have no values: a part of the model that they need was not loaded."
            )
        value = tensor.detach().cpu().contiguous()
        if self._shape is None:
            self._shape, self._dtype = tuple(value.shape), value.dtype
        if (tuple(value.shape), value.dtype) != (self._shape, self._dtype):
            raise CalibrationError(
                f"A block returned {tuple(value.shape)} {value.dtype} for one window, {self._shape} {self._dtype} for "
                "another of the same length; such models cannot be walked block by block."
            )
        with named_write(self._path):
            self._stream.write(_bytes_of(value))
        self._count += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stream is not None
        try:
            if kind is None:
                with named_write(self._path), self._stream as stream:
                    dtype = str(self._dtype).removeprefix("torch.")
                    header = json.dumps({"count": self._count, "shape": self._shape, "dtype": dtype})
                    stream.seek(0)
                    stream.write(header.encode())
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(self._temporary, self._path)
            else:
                with contextlib.suppress(OSError):  # what is still buffered meets the same full disk
                    self._stream.close()
        finally:
            self._temporary.unlink(missing_ok=True)


class StateFile:
    """Reads what a StateWriter wrote."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._stream = path.open("rb", buffering=0)
            header = json.loads(self._stream.read(_HEADER))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"The hidden states in {path} cannot be read ({error}); start over with `overwrite`."
            ) from error
        self._count, self._shape = int(header["count"]), header["shape"]
        self._dtype = getattr(torch, header["dtype"]) if self._count else torch.float32

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Tensor:
        return self._into(torch.empty(self._shape, dtype=self._dtype, device="cpu"), index)

    def on(self, device: torch.device) -> Iterator[Tensor]:
        """Every tensor in order, on a device. An accelerator works on one while the next is read into pinned memory."""
        if device.type == "cpu":
            yield from (self[index] for index in range(len(self)))
            return
        with ThreadPoolExecutor(1) as reader:
            ahead: list[Future[Tensor]] = []
            for index in range(len(self) + 1):
                if index < len(self):
                    empty = torch.empty(self._shape, dtype=self._dtype, device="cpu", pin_memory=True)
                    ahead.append(reader.submit(self._into, empty, index))
                if index:
                    yield ahead.pop(0).result().to(device, non_blocking=True)

    def _into(self, tensor: Tensor, index: int) -> Tensor:
        target = _bytes_of(tensor)
        self._stream.seek(_HEADER + index * len(target))
        done = 0
        while done < len(target):
            step = self._stream.readinto(target[done:])
            if not step:
                raise CheckpointError(f"The hidden states in {self._path} are cut off; start over with `overwrite`.")
            done += step
        return tensor

    def close(self) -> None:
        self._stream.close()
