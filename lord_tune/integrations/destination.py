"""What an output must not destroy: what a run reads, what that was made from, and what an adapter was trained on.

Every verb that writes asks here before it does any work, and before it makes a file or a lock. Folders are compared as
the file system knows them (os.path.samefile), so that links, another spelling of a name and a folder that is mounted
twice are seen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ..data.files import local_paths
from ..errors import UsageError
from .files import ADAPTER_FILE, RUN_FILE
from .sources import DEMO, candidates, weights_identity

_DECOMPOSITION = "decomposition.json"


def protect(
    out: Path,
    models: Iterable[str | None],  # as the verbs take them; names of the Hub and of `demo` are nothing here
    data: Iterable[str | None] = (),  # files and folders of text or rows, plans
    replaces: bool = False,  # whether what is in `out` goes (`overwrite`)
) -> None:
    """UsageError, with nothing touched, if writing the folder `out` would destroy something that is needed.

    That is: a model of `models` or what it was made from, in either direction of nesting; where `out` is replaced, also
    data inside it, and the base of an adapter that lies near it.
    """
    for path, what in _lineages(models):
        if _same(path, out):
            raise UsageError(f"{out} is the model {path}, {what}; choose another output.")
        if _inside(out, path):
            raise UsageError(f"{out} lies inside the model {path}, {what}; choose an output outside of it.")
        if any(_inside(part, out) for part in (path, *_parts(path))):
            raise UsageError(f"{out} holds the model {path}, {what}, or files of it; choose another output.")
    if not replaces or not out.is_dir():
        return
    for path in (path for name in data if name is not None for path in local_paths(name)):
        if _same(path, out) or _inside(path, out):
            raise UsageError(f"{out} holds {path}, which this run reads; choose another output, or move that away.")
    for adapter in _adapters_near(out):
        if _belongs(adapter, out):
            raise UsageError(
                f"{out} holds the base model of the adapter in {adapter}, which is worth nothing without it; choose "
                "another output, or remove that adapter first."
            )


def protect_file(
    path: str | None, models: Iterable[str | None], data: Iterable[str | None] = (), own_key: str | None = None
) -> None:
    """UsageError if the file `path` exists and is read by the run, or is a file of one of `models` or of its base.

    own_key: a key that only records of the verb have; such a record in a model's folder may be written anew.
    """
    if path is None or not Path(path).is_file():
        return
    found = Path(path)
    for other, what in () if own_key is not None and own_key in _record(found) else _lineages(models):
        if _same(found, other) or _inside(found, other) or any(_same(found, part) for part in _parts(other)):
            raise UsageError(f"{path} is a file of the model {other}, {what}; name another file.")
    for name in data:
        for other in local_paths(name) if name is not None else ():
            if _same(found, other) or _inside(found, other):
                raise UsageError(f"{path} is read by this run; name another file.")


def _lineages(models: Iterable[str | None]) -> Iterator[tuple[Path, str]]:
    """Every local folder or file that a run reads as a model, and what those were made from, with words for each."""
    seen: set[Path] = set()
    named = [Path(name).expanduser() for name in models if name is not None and name != DEMO]
    waiting = [(path, "which this run reads") for path in named]
    while waiting:
        path, what = waiting.pop(0)
        if path.exists() and path.resolve() not in seen:
            seen.add(path.resolve())
            yield path, what
            waiting += [(base, f"from which {path} was made") for base in _bases(path)]


def _bases(folder: Path) -> list[Path]:
    """Where the base of an adapter, or the original of a decomposition, may be. Records that are damaged are told of
    by who needs them."""
    named: list[tuple[Any, Any]] = []
    if (folder / ADAPTER_FILE).is_file():
        named.append(
            (_record(folder / ADAPTER_FILE).get("base_model_name_or_path"), _run_of(folder).get("base_folder"))
        )
    if (folder / _DECOMPOSITION).is_file():
        known = _record(folder / _DECOMPOSITION)
        base = known.get("base")
        named.append((base.get("name") if isinstance(base, dict) else None, known.get("base_folder")))
    return [
        Path(place).expanduser()
        for name, relative in named
        if isinstance(name, str) and name != DEMO
        for start in (folder, folder.resolve().parent)  # a checkpoint's run is the folder that holds it
        for place in candidates(name, start, relative if isinstance(relative, str) else None)
    ]


def _run_of(adapter: Path) -> dict[str, Any]:
    """The record of the run that wrote an adapter, or one of its checkpoints."""
    return _record(adapter / RUN_FILE) or _record(adapter.resolve().parent / RUN_FILE)


def _record(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _adapters_near(out: Path) -> Iterator[Path]:
    """Folders with an adapter: inside `out`, beside it, and in the folders beside it and beside the one it is in."""
    real = out.resolve()
    starts = [real, real.parent, *([real.parent.parent] if real.parent.parent != Path(real.anchor) else [])]
    seen: set[Path] = set()
    for start in starts:
        for pattern in (ADAPTER_FILE, f"*/{ADAPTER_FILE}", f"*/*/{ADAPTER_FILE}"):
            for path in start.glob(pattern):
                hidden = any(part.startswith(".") for part in path.relative_to(start).parts)
                if not hidden and path.parent not in seen:
                    seen.add(path.parent)
                    yield path.parent


def _belongs(adapter: Path, out: Path) -> bool:
    """Whether the base of an adapter is `out`, or of one that lies elsewhere is something inside `out`.

    An adapter whose run knows other weights belongs to it no more.
    """
    for base in _bases(adapter):
        if not base.exists():
            continue
        if _same(base, out) and not _same(adapter, out):
            known = _run_of(adapter).get("base")
            return known is None or known == weights_identity(str(out))
        if _inside(base, out) and not _inside(adapter, out) and not _same(adapter, out):
            return True
    return False


def _parts(path: Path) -> list[Path]:
    """The files of a model folder, which may be links to elsewhere."""
    return list(path.iterdir()) if path.is_dir() else []


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them does not exist
        return one.resolve() == other.resolve()


def _inside(path: Path, folder: Path) -> bool:
    """Whether `path`, which need not exist, lies in `folder` at any depth, links resolved."""
    return folder.is_dir() and any(_same(parent, folder) for parent in path.resolve().parents if parent.exists())
