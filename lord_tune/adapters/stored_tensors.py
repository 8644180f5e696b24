"""Tensors that stay in the checkpoint they were loaded from and are read again at each use.

A trained adapter needs the factors it started from whenever it is disabled (a reference model), which is seldom: a
copy in memory would cost what the factors cost, a file costs nothing. Given up: the checkpoint must stay where it is,
as it is, which is checked at each read.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import CheckpointError
from ..factorizations import pivoted_left
from ..integrations.files import weight_files

Stamp = tuple[int, int]  # nanoseconds of the last change, bytes


def _stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}, which the adapter started from, is gone; put it back.") from error
    return status.st_mtime_ns, status.st_size


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    path: Path
    key: str
    stamp: Stamp  # of the file when it was found
    dtype: torch.dtype  # that the loaded model keeps it in

    def read(self) -> Tensor:
        """The tensor, on the CPU; CheckpointError if the file changed."""
        if _stamp(self.path) != self.stamp:
            raise CheckpointError(
                f"{self.path} was written again since the adapter was attached, which started from it; load both again."
            )
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.key).to(self.dtype)


class StoredTensors:
    """Where the tensors of a loaded model are on disk."""

    def __init__(self, model: nn.Module):
        self._files: dict[str, Path] = {}
        name = getattr(model, "name_or_path", None)
        for path in weight_files(name) if name else ():
            with safe_open(path, framework="pt") as file:
                self._files |= dict.fromkeys(file.keys(), path.resolve())

    def keep(self, key: str, value: Tensor) -> StoredTensor | Tensor:
        """`value` as the file holds it under `key`, or a copy, if no file does (a model that was changed since)."""
        path = self._files.get(key)
        if path is not None:
            found = StoredTensor(path, key, _stamp(path), value.dtype)
            if torch.equal(found.read(), value.detach().cpu()):
                return found
        return value.detach().clone()


def value_of(kept: StoredTensor | Tensor) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.read()


@dataclasses.dataclass(frozen=True)
class StoredPivot:
    """L R in pivoted form (factorizations/pivoting.py)."""

    rest: StoredTensor | Tensor  # C
    rows: Tensor  # of L R that B holds
    right: StoredTensor | Tensor  # B

    def pair(self) -> tuple[Tensor, Tensor]:
        """P [I; C] (out, rank) and B (rank, in)."""
        rest, right = value_of(self.rest), value_of(self.right)
        return pivoted_left(rest, self.rows.to(rest.device)), right
