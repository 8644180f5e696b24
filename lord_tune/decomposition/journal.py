"""The folder of a run in progress, and the line-by-line record of what is finished in it.

`OUT.partial/` becomes `OUT` by one rename at the end. Until then it holds the finished shards and `.work/`:
progress.jsonl, the hidden states in front of the next block, and what is kept of analysed layers. The first line of
progress.jsonl says what the run is (configuration, base weights, text, versions, processes); each further line is one
finished step with the sha256 of the file it wrote, appended and synced only after that file. So whatever moment a
process dies at, the lines are true, and a step without a line is done again: same inputs, same bytes.

Process 0 holds the lock of the output while it runs (storage.py), which ends with it however it ends.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from ..parallel import Workers
from ..storage import OutputLock, check_destination, named_write, sha256_files, sole_writer

_FORMAT = 1


class Journal:
    """Steps by name -> what they recorded. Process 0 writes; the others know the same steps."""

    def __init__(self, out: Path, workers: Workers | None = None):
        self.out = out.resolve()
        self.folder = self.out.with_name(self.out.name + ".partial")
        self.work = self.folder / ".work"
        self.workers = workers or Workers()
        self.steps: dict[str, dict[str, Any]] = {}
        self._path = self.work / "progress.jsonl"
        self._replaced = self.out.with_name(f".{self.out.name}.lord_tune_replaced")  # what --overwrite takes away
        self._lock = OutputLock(self.out)
        self._overwrite = False

    @property
    def writes(self) -> bool:
        """Whether this process writes the checkpoint."""
        return self.workers.rank == 0

    def check(self, resume: bool, overwrite: bool) -> None:
        """Refuse a destination before any work."""
        problem, self._overwrite = None, overwrite
        if self.writes:  # the others look no earlier than this one is through: it makes the folder soon
            try:
                with sole_writer(self.out):  # and let go: it is a while until `open`
                    self._check(resume)
            except Exception as error:  # of any kind: the others would wait for ever
                problem = error
        problem = self.workers.send(problem, 0)
        if problem is not None:
            raise problem

    def _check(self, resume: bool) -> None:
        self._tidy(resume)
        check_destination(self.out, self._overwrite)
        if self.folder.exists() and not self._path.is_file() and any(p != self.work for p in self.folder.iterdir()):
            raise UsageError(f"{self.folder} holds files that lord_tune did not write; move it away.")
        if self._begun and not resume and not self._overwrite:
            raise UsageError(
                f"{self.folder} holds an unfinished run; continue it with `resume`, or start over with `overwrite`."
            )

    @property
    def _begun(self) -> bool:
        return self._path.is_file() and b"\n" in self._path.read_bytes()

    def _tidy(self, resume: bool) -> None:
        """What --overwrite took away, of a run that died between its last renames: remove it, or put it back unless
        the run that takes its place is continued."""
        if self.out.exists() or not self._replaced.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
        elif not (resume and self._begun):
            os.replace(self._replaced, self.out)

    def open(self, identity: Mapping[str, object], resume: bool) -> bool:
        """Begin a run, or continue the one that is there; returns whether it continues. `identity` is compared key by
        key: UsageError names the first difference."""
        continued, problem = False, None
        steps: dict[str, dict[str, Any]] = {}
        if self.writes:
            try:
                continued, steps = self._open(identity, resume)
            except Exception as error:  # of any kind: the others would wait for ever
                self._lock.release()
                problem = error
        continued, self.steps, problem = self.workers.send((continued, steps, problem), 0)
        if problem is not None:
            raise problem
        return continued

    def _open(self, identity: Mapping[str, object], resume: bool) -> tuple[bool, dict[str, dict[str, Any]]]:
        self._lock.take()
        self._check(resume)  # again: another process may have come and gone
        if not (resume and self._begun):
            self._clear()
            self._append({"format": _FORMAT, "identity": identity})
            return False, {}
        steps = self._read(identity)
        for path in self.folder.glob(".*"):  # temporary files of a process that died
            if path.is_file():
                path.unlink()
        return True, steps

    def _clear(self) -> None:
        """Everything but the journal, which is emptied first: its lines are true at every moment."""
        self.work.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(b"")
        for path in [*self.folder.iterdir(), *self.work.iterdir()]:
            if path in (self.work, self._path):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()

    def _read(self, identity: Mapping[str, object]) -> dict[str, dict[str, Any]]:
        lines = []
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a process that died while writing leaves half a line
        if whole != content:
            os.truncate(self._path, len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{self._path} is damaged ({error}); start over with `overwrite`.") from error
        if not lines or lines[0].get("format") != _FORMAT:
            raise CheckpointError(f"{self._path} was written by another version; start over with `overwrite`.")
        difference = _first_difference(lines[0]["identity"], json.loads(json.dumps(identity)))
        if difference:
            raise UsageError(
                f"The unfinished run in {self.folder} cannot be continued: {difference}. Use the same command and "
                "weights, or start over with `overwrite`."
            )
        for line in lines[1:]:
            path = self.folder / line["file"] if line.get("file") else None
            if path is not None and line.get("kept", True) and not _is_intact(path, line["sha256"]):
                raise CheckpointError(f"{path} is missing or was changed since; start over with `overwrite`.")
        return {line["step"]: line for line in lines[1:]}

    def has(self, step: str) -> bool:
        return step in self.steps

    def shards(self) -> dict[str, str]:
        """file -> sha256 of every file of the checkpoint that is written. Called by all processes."""
        files = {line["file"]: line["sha256"] for line in self.steps.values() if line["file"]}
        return self.workers.send({name: files[name] for name in sorted(files) if "/" not in name}, 0)

    def commit(self, step: str, file: Path | None = None, sha256: str | None = None, **content: object) -> None:
        """Every process is done with `step`: record it. Called by all processes."""
        self.workers.wait()
        line = {"step": step, "file": None, **content}
        if file is not None:
            line |= {"file": str(file.relative_to(self.folder)), "sha256": sha256}
        self.steps[step] = line
        if self.writes:
            self._append(line)

    def _append(self, line: Mapping[str, object]) -> None:
        with named_write(self._path), self._path.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def finish(self) -> None:
        """Give the folder its name, then remove the working files."""
        self.workers.wait()
        if not self.writes:
            return
        if self.out.exists():
            shutil.rmtree(self._replaced, ignore_errors=True)
            os.replace(self.out, self._replaced)
        os.replace(self.folder, self.out)
        self.remove_work()
        self._lock.release()

    def remove_work(self) -> None:
        """What a finished OUT needs no more; a process that died in its last steps leaves some of it."""
        if self.writes:
            shutil.rmtree(self._replaced, ignore_errors=True)
            shutil.rmtree(self.out / self.work.name, ignore_errors=True)
            self._lock.sweep()

    def discard(self) -> None:
        """Remove everything: nothing of it is worth resuming."""
        self.steps = {}
        if self.writes:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.release()

    def abandon(self) -> bool:
        """Leave nothing behind if no block is finished; returns whether that was so."""
        if any("/" in step for step in self.steps):
            self._lock.release()
            return not self.folder.is_dir()
        self.discard()
        return True


def _is_intact(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_files([path]) == sha256


def _first_difference(before: object, now: object, name: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted({*before, *now}):
            found = _first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if before == now else f"{name} was {_short(before)}, now it is {_short(now)}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
