"""Runs of lord-tune that are killed at a chosen moment, cheaply: one process imports everything once and forks.

A forked run is a process of its own that dies by SIGKILL like any other; only the imports are shared. The server never
runs a backward pass itself, after which torch refuses to run one in a fork.

A moment is (what, name, when): the journal line of the step `name` ("line"; "start" is the first line), or the renaming
of a file or folder whose path ends in `name` to its place ("rename"), or the removal of such a folder ("remove"); the
process dies "before", "half" way through or "after" it. Of a training run also: the step `name` ("step"; before it), or
the writing of a checkpoint's file `name` by torch or PEFT ("save").
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Moment = tuple[str, str, str]


@dataclass(frozen=True)
class Ended:
    """How a run ended; code is negative for a signal."""

    codes: list[int]  # of every process
    stdout: str
    stderr: str

    @property
    def killed(self) -> bool:
        """The first process was; another may notice the broken connection before it is killed too."""
        return self.codes[0] == -signal.SIGKILL and 0 not in self.codes


class ForkServer:
    """Starts lord-tune runs, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, folder: Path, words: list[str], die: Moment | None = None, processes: int = 1) -> Ended:
        """lord-tune in `folder`, killed at `die`; of several processes the first dies there, then the rest."""
        assert self._process.stdin is not None and self._process.stdout is not None
        folder.mkdir(parents=True, exist_ok=True)
        request = {"folder": str(folder), "words": words, "die": die, "processes": processes}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(what: str, name: str, when: str) -> None:
    """Make this process die at a moment."""
    from lord_tune.decomposition.journal import Journal

    def step(line: dict[str, Any]) -> str:
        return line.get("step", "start")

    append, replace, remove = Journal._append, os.replace, shutil.rmtree

    def dying_append(self: Journal, line: dict[str, Any]) -> None:
        if step(line) != name:
            return append(self, line)
        if when == "half":
            text = json.dumps(line)
            with self._path.open("a") as stream:
                stream.write(text[: len(text) // 2])
        elif when == "after":
            append(self, line)
        _die()

    def dying_replace(source: Any, target: Any) -> None:
        if not str(target).endswith(name):
            return replace(source, target)
        if when == "half":  # as if the machine had stopped while the file was written
            os.truncate(source, os.path.getsize(source) // 2)
        elif when == "after":
            replace(source, target)
        _die()

    def dying_remove(path: Any, *rest: Any, **more: Any) -> None:
        if not str(path).endswith(name) or not os.path.isdir(path):
            return remove(path, *rest, **more)
        if when == "half":
            os.unlink(next(file for file in Path(path).rglob("*") if file.is_file()))
        elif when == "after":
            remove(path, *rest, **more)
        _die()

    def dying_save(write: Any, at: int) -> Any:
        def saving(*given: Any, **more: Any) -> None:
            if not str(given[at]).endswith(name):
                return write(*given, **more)
            if when != "before":
                write(*given, **more)
            if when == "half":
                os.truncate(given[at], os.path.getsize(given[at]) // 2)
            _die()

        return saving

    if what == "save":
        import peft.peft_model
        import torch

        torch.save = dying_save(torch.save, 1)
        peft.peft_model.safe_save_file = dying_save(peft.peft_model.safe_save_file, 1)
    elif what == "step":
        from transformers import Trainer

        step_of = Trainer.training_step

        def dying_step(self: Any, *given: Any, **more: Any) -> Any:
            if self.state.global_step == int(name):
                _die()
            return step_of(self, *given, **more)

        Trainer.training_step = dying_step  # type: ignore[method-assign]
    elif what == "line":
        Journal._append = dying_append  # type: ignore[method-assign]
    elif what == "rename":
        os.replace = dying_replace  # type: ignore[assignment]
    elif what == "remove":
        shutil.rmtree = dying_remove  # type: ignore[assignment]
    else:
        raise ValueError(what)


def _child(request: dict[str, Any], rank: int, port: int, log: str) -> None:
    code = 70
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.chdir(request["folder"])
        if request["processes"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(request["processes"])}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
        if request["die"] and rank == 0:
            _arm(*request["die"])
        from lord_tune.cli import main

        main(request["words"])
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _serve() -> None:
    import tempfile

    import datasets  # noqa: F401
    import torch

    import lord_tune.commands  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        if request["words"][0] == "train":
            import lord_tune.training.trainers  # noqa: F401  # trl: seconds, once
        with tempfile.TemporaryDirectory() as folder:
            log, port = f"{folder}/log", free_port()
            children = []
            for rank in range(request["processes"]):
                pid = os.fork()
                if not pid:
                    _child(request, rank, port, log)
                children.append(pid)
            codes: list[int] = []
            for pid in children:
                if codes and codes[0] == -signal.SIGKILL:  # the whole run is killed, not one of its processes
                    os.kill(pid, signal.SIGKILL)
                codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            texts = [Path(f"{log}.{name}").read_text() for name in ("stdout", "stderr")]
        print(json.dumps(asdict(Ended(codes, *texts))), flush=True)


if __name__ == "__main__":
    _serve()
