"""Memory where a run needs it: on a CPU what the process has resident, of an accelerator what torch allocated there."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import psutil
import torch

READ_AT_ONCE = 2**24  # numbers of a table, of which the pages of its file are in memory meanwhile


def give_back() -> None:
    """Return freed memory to the system (glibc; elsewhere nothing happens).

    glibc keeps freed blocks below 32 MiB, in pieces that other sizes do not fit in: without this a run creeps up by
    some MB per block. Peak of a random Llama of 768 x 2048 with 64 blocks: 1.03 GiB without, 0.79 with; 4 blocks 0.74.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


_M_MMAP_THRESHOLD, _LARGE, _GLIBC_MOST = -3, 2**20, 2**25


@contextlib.contextmanager
def large_blocks_apart() -> Iterator[None]:
    """glibc maps each block of at least 1 MiB by itself and returns it once it is freed; elsewhere nothing happens.

    By itself glibc raises that limit to 32 MiB and cuts smaller blocks from its heap, where an aligned block, which
    torch's all are, does not fit into the hole that one of its size left. The activations of a training step then take
    almost twice their size: a step of SmolLM2-135M on 2,048 tokens 8.5 GB, with this 5.0 GB and 7 % more CPU time.
    """
    try:
        set_option = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        yield
        return
    set_option(_M_MMAP_THRESHOLD, _LARGE)
    try:
        yield
    finally:
        set_option(_M_MMAP_THRESHOLD, _GLIBC_MOST)  # where glibc would have come by itself


def peak_rss_bytes() -> int:
    """The process's largest resident memory so far. Linux: VmHWM; ru_maxrss starts at the size of the parent process.
    Elsewhere ru_maxrss, in bytes on macOS."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def settle() -> None:
    """Let go of what earlier work left, so that it does not count as memory of what comes."""
    gc.collect()
    give_back()


def held_bytes(device: torch.device) -> int:
    """What is held now, before the work that is to be foreseen."""
    settle()
    return psutil.Process().memory_info().rss if device.type == "cpu" else torch.accelerator.memory_allocated(device)


class PeakMemory:
    """The largest memory while a `with` block runs, `.bytes`: on a CPU resident memory of the process, of an
    accelerator what torch allocated there. Blocks may be nested.

    Linux forgets the process's peak when it is told to; where it is not, a peak above all earlier ones is known and a
    smaller one is sampled, 20 times a second.
    """

    _open: ClassVar[list[PeakMemory]] = []
    _sampler: threading.Thread | None
    _seen: int
    _reset: bool

    def __init__(self, device: torch.device):
        self._device = device

    def __enter__(self) -> PeakMemory:
        settle()
        on_cpu = self._device.type == "cpu"
        before = _peak(self._device)
        for outer in self._open:
            if outer._device == self._device:  # what it saw so far is about to be forgotten
                outer._seen = max(outer._seen, before if outer._reset else 0)
        self._seen, self._before = 0, before
        self._reset = _forget_peak() if on_cpu else True
        if not on_cpu:
            torch.accelerator.reset_peak_memory_stats(self._device)
        self._stop, self._sampler = threading.Event(), None
        if not self._reset:
            self._sampler = threading.Thread(target=self._watch, daemon=True)
            self._sampler.start()
        self._open.append(self)
        return self

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.05):
            self._seen = max(self._seen, process.memory_info().rss)

    def __exit__(self, *error: object) -> None:
        self._open.remove(self)
        peak = _peak(self._device)
        if self._sampler is not None:
            self._stop.set()
            self._sampler.join()
            self._seen = max(self._seen, psutil.Process().memory_info().rss)  # a short block has no sample yet
        self.bytes = max(self._seen, peak) if self._reset or peak > self._before else self._seen


def _peak(device: torch.device) -> int:
    return peak_rss_bytes() if device.type == "cpu" else torch.accelerator.max_memory_allocated(device)


def _forget_peak() -> bool:
    """Set VmHWM back to what is resident now; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return bool(peak_rss_bytes() < 1.01 * psutil.Process().memory_info().rss + 2**24)
