"""The verb `report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from ..config import ReportConfig
from ..console import human_bytes, say
from ..errors import UsageError
from ..keywords import documented
from ..signatures import ReportOptions
from ..storage import check_json_file, write_text
from .page import GENERATOR, page_of
from .runs import Run, read_run
from .themed_svg import SERIES


@documented(ReportConfig)
def report(runs: str | list[str], **options: Unpack[ReportOptions]) -> dict[str, Any]:
    """Write one self-contained HTML page about one or several results; returns what it shows.

    The checkpoint that an adapter was trained on gets a column of its own, before that of the adapter.
    """
    config = ReportConfig.build({"runs": runs, **options})
    out = Path(config.out)
    _check_out(out, config.overwrite)
    found = _labelled(_with_origins([read_run(name) for name in config.runs]))
    if len(found) > len(SERIES):
        raise UsageError(
            f"Got {len(found)} results, with the checkpoints that adapters were trained on; at most {len(SERIES)} "
            "stand side by side. Name fewer."
        )
    page, missing = page_of(found)
    check_json_file(str(out))  # makes its folder
    write_text(out, page)
    say(f"wrote {out}: {', '.join(run.label for run in found)} ({human_bytes(len(page))})")
    return {"out": str(out), "runs": [run.label for run in found], "bytes": len(page), "missing": missing}


def _check_out(out: Path, overwrite: bool) -> None:
    """Before any reading. Only the page of an earlier report is replaced."""
    if out.is_dir():
        raise UsageError(f"`out` {out} is a folder; name a file, like {out / 'report.html'}.")
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"{out} exists already; choose another file or pass `overwrite`.")
    with out.open("rb") as stream:
        if f'content="{GENERATOR}'.encode() not in stream.read(4096):
            raise UsageError(f"{out} is not the page of a report; `overwrite` will not replace it.")


def _with_origins(runs: Sequence[Run]) -> list[Run]:
    """Every run once, and before an adapter the checkpoint that it was trained on."""
    found: list[Run] = []

    def add(run: Run) -> None:
        if not any(known.path.resolve() == run.path.resolve() for known in found):
            found.append(run)

    named = {run.path.resolve() for run in runs}
    for run in runs:
        if run.origin is not None and run.origin.resolve() not in named:
            add(read_run(str(run.origin)))
        add(run)
    return found


def _labelled(runs: Sequence[Run]) -> list[Run]:
    """Names that tell the runs apart: that of the folder, else the path as it was given, else a number."""
    labels = [run.label for run in runs]
    paths = [str(run.path) for run in runs]
    found = []
    for index, run in enumerate(runs):
        label = run.label
        if labels.count(label) > 1:
            label = paths[index] if paths.count(paths[index]) == 1 else f"{paths[index]} ({index + 1})"
        found.append(replace(run, label=label))
    return found
