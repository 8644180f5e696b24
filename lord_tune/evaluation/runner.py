"""The process that execution.py starts: `python -I runner.py SECONDS MEMORY`, with a token and a program on stdin.

Limits itself, runs the program, and prints the token if it ended normally, else the error. It imports nothing of this
package, which would take longer than most programs run.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import sys

_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER, CLONE_NEWNET of linux/sched.h
_FILE_BYTES, _FILES, _PROCESSES = 16 << 20, 64, 256


def limit(seconds: float, memory: int) -> None:
    """Of this process; a limit that the system does not know, or that is lower already, is left."""
    whole = int(seconds) + 1
    wanted = [
        (resource.RLIMIT_CPU, whole),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, _FILE_BYTES),
        (resource.RLIMIT_NOFILE, _FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, _PROCESSES),
    ]
    for kind, most in wanted:
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):
            pass
    signal.setitimer(signal.ITIMER_REAL, seconds)  # its signal ends the process


def cut_network() -> bool:
    """Move into a network namespace without interfaces; where that is not allowed, take Python's sockets away. Whether
    the first was possible."""
    if sys.platform == "linux":
        unshare = getattr(ctypes.CDLL(None, use_errno=True), "unshare", None)
        if unshare is not None and (unshare(_NEW_NETWORK) == 0 or unshare(_NEW_USER | _NEW_NETWORK) == 0):
            return True

    def refused(*given: object, **options: object) -> None:
        raise OSError("no network here")

    for name in ("socket", "create_connection", "create_server", "socketpair", "getaddrinfo"):
        setattr(socket, name, refused)
    import _socket

    _socket.socket = refused  # type: ignore[assignment,misc]
    return False


def main() -> None:
    """See the top of this file."""
    verdict = os.fdopen(os.dup(1), "w")
    token, _, program = sys.stdin.read().partition("\n")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    cut_network()
    limit(float(sys.argv[1]), int(sys.argv[2]))
    said = token
    try:
        exec(compile(program, "program.py", "exec"), {"__name__": "program"})
    except BaseException as error:  # SystemExit too: a program that ends itself did not reach its last test
        said = f"{type(error).__name__}: {error}".replace("\n", " ")
    verdict.write(said)
    verdict.flush()
    os._exit(0)  # threads that the program left running do not keep it


if __name__ == "__main__":
    main()
