"""What the commands print: rich tables and progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .table_layout import fitted

_PLAIN_WIDTH = 160  # of tables written to a file or pipe


def is_main_process() -> bool:
    """True on the one process that prints (rank 0 under `accelerate launch`)."""
    return os.environ.get("RANK", "0") == "0"


def console() -> Console:
    """Standard output, wide enough for tables when it is not a terminal."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return Console(width=width, highlight=False, quiet=not is_main_process(), soft_wrap=not sys.stdout.isatty())


def say(text: str = "") -> None:
    console().print(text, markup=False)


def show_next(*words: object, then: str = "", launcher: Sequence[str] = ()) -> None:
    """A command that goes on from here, to be pasted into the same shell: names are quoted, and no line is wrapped.

    then: what else may come, in words. launcher: a program that starts Python modules, and its options.
    """
    shown = console()
    called = [*launcher, "-m", "lord_tune"] if launcher else _as_called()
    command = shlex.join([*called, *map(str, words)])
    shown.print(f"next: {command}" + (f"   ({then})" if then else ""), markup=False, soft_wrap=True)


def _as_called() -> list[str]:
    """How this shell reaches the command line: by its name if that is this installation's, else by this Python."""
    found = shutil.which("lord-tune")
    if found is not None and Path(found).parent == Path(sys.executable).parent:
        return ["lord-tune"]
    return [sys.executable, "-m", "lord_tune"]


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table whose first column is left-aligned, the others right-aligned."""
    shown = console()
    shown.print(fitted(title, columns, rows, shown.width))


def show_spans(title: str, spans: Sequence[tuple[str, bool]]) -> None:
    """Text whose marked spans stand out: coloured on a terminal, between ⟦ ⟧ elsewhere."""
    say(title)
    if sys.stdout.isatty():
        text = Text()
        for piece, marked in spans:
            text.append(piece, style="green" if marked else "dim")
        console().print(text)
    else:
        say("".join(f"⟦{piece}⟧" if marked else piece for piece, marked in spans))


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, done, total): a live bar on a terminal, a line per 10 % elsewhere, each with the time left."""
    if sys.stderr.isatty() and is_main_process():
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        tasks: dict[str, TaskID] = {}
        with bar:

            def update(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                bar.update(tasks[what], completed=done, total=total)

            yield update
        return
    start = time.monotonic()
    last: dict[str, int] = {}
    first: dict[str, tuple[float, int]] = {}  # what -> when it was heard of first, and how much was done then

    def line(what: str, done: int, total: int) -> None:
        step, now = done * 10 // max(total, 1), time.monotonic()
        begun, before = first.setdefault(what, (now, done))
        if is_main_process() and last.get(what) != step and (done or total > 1):
            last[what] = step
            left = (now - begun) / (done - before) * (total - done) if before < done < total else 0.0
            told = f", about {duration(left)} left" if left >= 1 else ""
            print(f"  {what}: {done}/{total} ({now - start:.0f} s{told})", file=sys.stderr, flush=True)

    yield line


class LiveTable:
    """Rows that arrive one by one under a status line: the last ones live on a terminal. Elsewhere only the status is
    printed, about once per tenth of a phase: the rows are in a file in the end."""

    _SHOWN, _NAME = 12, 22  # rows, and characters of the first column, in the live form

    def __init__(self, columns: Sequence[str], widths: Sequence[int]):
        self._columns, self._widths, self._rows = columns, widths, deque[Sequence[str]](maxlen=self._SHOWN)
        self._live: Live | None = None
        self._printed: dict[str, int] = {}  # phase -> tenths

    def __enter__(self) -> LiveTable:
        if sys.stderr.isatty() and is_main_process():
            self._live = Live(console=Console(stderr=True), refresh_per_second=4, transient=True)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def row(self, cells: Sequence[str]) -> None:
        self._rows.append(cells)

    def status(self, text: str, phase: str = "", done: int = 1, total: int = 1) -> None:
        if self._live is not None:
            table = Table(box=None, padding=(0, 1, 0, 0))
            for index, (column, width) in enumerate(zip(self._columns, self._widths, strict=True)):
                narrow = 1 if index == 0 else width
                table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True, min_width=narrow)
            for first, *rest in self._rows:
                name = (
                    first if len(first) <= self._NAME else "…" + first[1 - self._NAME :]
                )  # the end tells layers apart
                table.add_row(Text(name), *(Text(cell) for cell in rest))
            self._live.update(Group(table, Text(text, style="bold")) if self._rows else Text(text, style="bold"))
        elif is_main_process() and self._printed.get(phase) != (step := done * 10 // max(total, 1)):
            self._printed[phase] = step
            print(f"  {text}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def note(text: str) -> None:
    """A line for the user beside the output proper."""
    if is_main_process():
        print(text, file=sys.stderr, flush=True)


def human_bytes(count: float) -> str:
    """1234567 -> '1.2 MB' (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


_SIZE = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*", re.IGNORECASE)


def size_of(text: str) -> int | None:
    """'80MB' -> 80,000,000 and '80MiB' -> 83,886,080 bytes; None for what is no size above 0."""
    found = _SIZE.fullmatch(text)
    if found is None or (found[3] and not found[2]):
        return None
    base, power = (1024 if found[3] else 1000), " kmgt".index(found[2].lower() or " ")
    return int(float(found[1]) * base**power) or None
