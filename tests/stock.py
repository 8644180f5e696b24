"""The process that loads exports with stock libraries, cheaply: one imports them once and forks for every load.

It never sees lord_tune, as the program that it runs (STOCK_LOADER) checks. That a process of its own does the same is
tested in test_exports.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


class StockServer:
    """Stands for `run_stock_loader`; started at the first load."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, words: list[str]) -> tuple[int, str]:
        if self._process is None:
            command = [sys.executable, "-P", __file__]  # without the folder of this file, where a module is like ours
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._process = subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
        from lord_tune.exports.stock import STOCK_LOADER

        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([STOCK_LOADER, words]) + "\n")
        self._process.stdin.flush()
        code, said = json.loads(self._process.stdout.readline())
        return code, said

    def close(self) -> None:
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait()


def _child(program: str, words: list[str], log: str) -> None:
    code = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        sys.argv = ["-c", *words]
        exec(program, {"__name__": "__main__"})  # noqa: S102
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import peft  # noqa: F401
    import torch
    import transformers

    for name in ("bitsandbytes", "compressed_tensors.compressors"):
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            importlib.import_module(name)
    assert transformers.LlamaForCausalLM is not None  # imports what it needs
    assert "lord_tune" not in sys.modules
    torch.set_num_threads(1)
    for line in sys.stdin:
        program, words = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            log = f"{folder}/log"
            pid = os.fork()
            if not pid:
                _child(program, words, log)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            print(json.dumps([code, Path(log).read_text()]), flush=True)


if __name__ == "__main__":
    _serve()
