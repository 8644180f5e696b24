"""Run a program that a model wrote, and say whether it ended normally.

Each program gets a Python process of its own, in an empty folder that is removed afterwards, without the environment
variables of this process, with limits on its time, its memory, and the size and number of its files, and without a
network: in a network namespace of its own where the system allows one (Linux), else with Python's sockets taken away.

This stops accidents: endless loops, memory that grows, files that are left, requests that are sent. It is not a sandbox
against malice. The program runs with the rights of this user and can read, and in places write, what the user can; run
code that may be hostile in a container or a virtual machine.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

SECONDS = 10.0  # of one program, wall-clock
MEMORY = 2 << 30  # bytes of address space
_RUNNER = Path(__file__).with_name("runner.py")
_WORKERS = 4


@dataclass(frozen=True)
class Outcome:
    """What became of a program."""

    passed: bool
    reason: str  # "passed", "timed out", or the first words of the error


def run_program(program: str, seconds: float = SECONDS, memory: int = MEMORY) -> Outcome:
    """Run it as the top of this file says. A program that ends itself early, by `sys.exit` say, has not passed."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="lord_tune_run_") as folder:
        words = [sys.executable, "-I", str(_RUNNER), str(seconds), str(memory)]
        environment = {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(f"{token}\n{program}".encode(), timeout=seconds + 5)
        except subprocess.TimeoutExpired:
            return Outcome(False, "timed out")
        finally:
            _end(process)
    verdict = said.decode(errors="replace").strip()
    if verdict == token:
        return Outcome(True, "passed")
    if process.returncode in (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM):
        return Outcome(False, "timed out")
    return Outcome(False, verdict[:200] or f"ended early (exit code {process.returncode})")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started in its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def run_programs(
    programs: list[str], progress: Callable[[str, int, int], None] = lambda what, done, total: None
) -> list[Outcome]:
    """Several, a few at a time."""
    found: list[Outcome] = []
    with ThreadPoolExecutor(min(_WORKERS, os.cpu_count() or 1)) as pool:
        for outcome in pool.map(run_program, programs):
            found.append(outcome)
            progress("running the tests", len(found), len(programs))
    return found
