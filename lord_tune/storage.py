"""Files: outputs that appear whole or not at all, checksums, JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import LordError, LordWarning, UsageError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch import Tensor

    from .parallel import Workers

# An output folder may be replaced (`--overwrite`) only if one of these says that lord_tune wrote it.
OWN_FILES = ("decomposition.json", "export.json", "train_config.json", "report.json")


def check_destination(out: Path, overwrite: bool) -> None:
    """Refuse a destination that holds something; called before any work, so that a refusal costs nothing."""
    if out.is_dir() and (out.resolve() == Path.cwd() or os.path.ismount(out)):  # cannot be renamed over
        raise UsageError(f"{out} is the current folder or a mount point; name a folder inside it.")
    _check_parents(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        if out.is_symlink() and not out.exists():
            raise UsageError(f"{out} is a broken symbolic link; remove it or choose another folder.")
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; expected a folder. Choose another output.")
    if not overwrite:
        raise UsageError(f"{out} already holds files; choose an empty folder or pass `overwrite`.")
    if not any((out / name).exists() for name in OWN_FILES):
        raise UsageError(f"{out} holds files that lord_tune did not write; `overwrite` will not replace it.")
    for path in out.rglob(".*.lock"):  # of runs whose outputs lie inside
        OutputLock(path.with_name(path.name[1:].removesuffix(".lock"))).check()


def _check_parents(out: Path) -> None:
    ancestor = next(parent for parent in out.absolute().parents if parent.exists())
    if not ancestor.is_dir():
        raise UsageError(f"{ancestor} is a file; expected a folder to write {out.name} into. Choose another output.")


@contextlib.contextmanager
def atomic_directory(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling of `out` to write into, renamed to `out` at the end; removed if anything fails."""
    check_destination(out, overwrite)
    out = out.resolve()  # through links, so that what is written lies where the link points
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    os.chmod(temporary, 0o755)
    try:
        yield temporary
        if out.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
            os.replace(out, old / "content")
            os.replace(temporary, out)
            shutil.rmtree(old)
        else:
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def lock(stream: IO[bytes] | IO[str], wait: bool = False) -> bool:
    """Lock an open file until it is closed or this process ends; whether that was possible. `wait` until it is.

    Where the file system cannot lock: a warning, and True.
    """
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "this system has no flock")
        fcntl.flock(stream.fileno(), fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warnings.warn(
            f"{stream.name} cannot be locked ({error.strerror}); let only one run at a time use it.",
            LordWarning,
            stacklevel=2,
        )
    return True


class OutputLock:
    """The right to write an output folder, which one living process has at a time, whatever it writes there.

    It is a lock on the file `.NAME.lock` beside the folder, which names the process and is removed with the lock. A
    process that is killed leaves the file and no lock.
    """

    def __init__(self, out: Path):
        where = out.resolve()
        self._out, self._path = out, where.parent / f".{where.name}.lock"
        self._stream: IO[str] | None = None
        self._made: list[Path] = []  # folders above `out`, the innermost first

    def take(self) -> None:
        """UsageError, naming the process, if another one has it."""
        _check_parents(self._out)
        made = [parent for parent in self._path.parents if not parent.exists()]
        while self._stream is None:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                stream = self._path.open("a+")
            except OSError as error:
                reason = f"{self._path} cannot be made ({error.strerror or error})"
                warnings.warn(f"{reason}; let only one run at a time write {self._out}.", LordWarning, stacklevel=3)
                return
            try:
                self._lock(stream)
            except UsageError:
                stream.close()
                raise
            if self._path.is_file() and os.path.samestat(os.fstat(stream.fileno()), self._path.stat()):
                self._stream, self._made = stream, made
            else:  # the process that had it removed the file meanwhile
                stream.close()
        self._stream.truncate(0)
        self._stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._stream.flush()

    def check(self) -> None:
        """UsageError if another process has it; nothing is made or changed."""
        if self._path.is_file():
            with self._path.open() as stream:
                self._lock(stream)

    def sweep(self) -> None:
        """Remove the file that a killed process left."""
        if self._stream is None and self._path.is_file():
            with self._path.open("a+") as stream:
                if lock(stream):
                    self._path.unlink(missing_ok=True)

    def _lock(self, stream: IO[str]) -> None:
        if not lock(stream):
            stream.seek(0)
            owner = stream.read().strip() or "another process"
            raise UsageError(f"{self._out} is being written by {owner}; wait for it, end it, or name another output.")

    def release(self) -> None:
        """Nothing, if it was not taken. Folders that were made for it and stayed empty go."""
        if self._stream is None:
            return
        self._path.unlink(missing_ok=True)  # before the lock: whoever opened it meanwhile sees that it is gone
        self._stream.close()
        self._stream = None
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()


@contextlib.contextmanager
def sole_writer(out: Path, workers: Workers | None = None) -> Iterator[None]:
    """Hold the OutputLock of a folder. Of several processes the first holds it, and all of them hear of a refusal."""
    held, problem = OutputLock(out), None
    try:
        if workers is None or workers.rank == 0:
            held.take()
    except Exception as error:  # of any kind: the others would wait for ever
        problem = error
    problem = problem if workers is None else workers.send(problem, 0)
    if problem is not None:
        raise problem
    try:
        yield
    finally:
        held.release()


def check_json_file(path: str | None) -> None:
    """Refuse `--json` naming a folder, before any work; make the folder it goes into."""
    if path is None:
        return
    if Path(path).is_dir():
        raise UsageError(f"`json` {path} is a folder; name a file.")
    Path(path).parent.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def named_write(path: Path) -> Iterator[None]:
    """Writing to an open stream fails without saying which file it was: LordError with its name."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise LordError(f"{path} could not be written: {reason}; check disk space and permissions.") from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write a safetensors file, synced to disk, under a temporary name and rename it; returns its sha256.

    The whole file never is in memory a second time. On a full disk: LordError, and no file is left.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}.partial")
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, temporary, {"format": "pt"})
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        digest = sha256_files([temporary])
        os.replace(temporary, path)
    except SafetensorError as error:
        raise LordError(f"{path} could not be written: {error}; check disk space and permissions.") from error
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def write_json(path: Path, content: object) -> None:
    """A JSON file that appears whole."""
    write_text(path, json.dumps(content, indent=1, sort_keys=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside `path` and rename, so that readers never see half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Parse a JSON file, or say which file is not JSON."""
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UsageError(f"{path} is not valid JSON ({error}); repair or remove it.") from error


def sha256_files(paths: list[Path]) -> str:
    """One sha256 over the bytes of `paths`, in the order given."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
