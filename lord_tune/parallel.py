"""The processes of one run, and the four things they do together.

`Workers()` is a single process and does nothing. Under `accelerate launch --num_processes N` every process runs the
same program: calibration windows are dealt out, sums are added up over the processes, layers are factorized one per
process and sent to the others. Only process 0 writes the checkpoint. Objects sent between processes are the run's own
tensors and records, never files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Workers:
    """This process (rank) among all (size)."""

    rank: int = 0
    size: int = 1

    @classmethod
    def launched(cls) -> Workers:
        """The processes of the initialised torch.distributed group, else this one alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def add_up(self, total: Tensor) -> None:
        """Replace `total` by its sum over the processes."""
        if self.size > 1:
            wire = _on_wire(total)
            dist.all_reduce(wire)
            if wire is not total:
                total.copy_(wire)

    def concatenate(self, rows: Tensor) -> Tensor:
        """(n, ...) of every process -> (sum of n, ...), in order of rank."""
        if self.size == 1:
            return rows
        counts = self.gather(len(rows))
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        padded = _on_wire(padded)
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.device)

    def gather(self, value: Value) -> list[Value]:
        """Small values of every process, in order of rank."""
        if self.size == 1:
            return [value]
        values = [value] * self.size
        dist.all_gather_object(values, value)
        return values

    def send(self, value: Value, owner: int) -> Value:
        """The owner's small value, on every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=owner)
        return box[0]

    def send_tensors(self, tensors: dict[str, Tensor] | None, owner: int, device: torch.device) -> dict[str, Tensor]:
        """The owner's tensors, on every process, one at a time so that memory holds a single copy."""
        if self.size == 1:
            assert tensors is not None
            return tensors
        shapes = None
        if self.rank == owner:
            assert tensors is not None
            shapes = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        received = {}
        shapes = self.send(shapes, owner)
        assert shapes is not None, "the owner has tensors"
        for name, (shape, dtype) in shapes.items():
            mine = tensors is not None and self.rank == owner
            tensor = tensors[name].contiguous() if mine and tensors is not None else torch.empty(shape, dtype=dtype)
            wire = _on_wire(tensor)
            if wire.numel():
                dist.broadcast(wire.view(-1).view(torch.uint8), src=owner)
            received[name] = wire.to(device)
        return received

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def _on_wire(tensor: Tensor) -> Tensor:
    """The tensor where the group can send it: NCCL, XCCL and the like send from their accelerator only."""
    devices = [part.partition(":")[0] for part in dist.get_backend_config().split(",")]  # "cpu:gloo,cuda:nccl"
    if tensor.device.type in devices:
        return tensor
    if devices[0] == "cpu":
        return tensor.cpu()
    return tensor.to(torch.device(devices[0], torch.accelerator.current_device_index()))


def share_out(costs: Mapping[str, float], size: int) -> dict[str, int]:
    """name -> rank: the longest job first, each to the process with the least work (Graham's LPT rule)."""
    load = [0.0] * size
    owners = {}
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += costs[name]
    return owners
