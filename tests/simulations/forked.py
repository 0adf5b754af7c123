"""A process that has imported what ``fedge simulate`` needs, and forks for each command: the program of ``forked``.

The imports take seconds of processor time, the runs of the tests hardly one. What a command must not share with the
one before it is not made here: no thread, no operation of torch, no data. Random state that is drawn at import is
drawn again by Python and OpenSSL when they are forked; the seed of ``hash`` is the same in all commands of a process.

Its arguments are the descriptor of a socket and the modules to import. JSON lines come and go there: a request with
``argv``, ``environment``, ``folder``, ``output`` (two paths) and ``seconds``, for each a ``status``, null where the
time was over.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any


def prepare(modules: Sequence[str]) -> None:
    """Import, under the environment in which the command line does.

    Raises:
        RuntimeError: an import has left a thread, which no fork would have.
    """
    from fedge.shared.cli import main as cli

    kept = dict(os.environ)
    for key, value in cli.FLOWER_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    for name in modules:
        importlib.import_module(name)
    os.environ.clear()
    os.environ.update(kept)
    # OpenBLAS ends its own threads before a fork, and starts them again where they are needed.
    if (pid := os.fork()) == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    if (tasks := sum(1 for _ in Path("/proc/self/task").iterdir())) != 1:
        raise RuntimeError(f"threads before a fork: must be 1, got {tasks}")
    gc.collect()
    gc.freeze()


def serve(channel: socket.socket) -> None:
    """Fork for each request; comes back in the children alone, as the process that was asked for."""
    with channel, channel.makefile("rb") as requests:
        for line in requests:
            request = json.loads(line)
            if (pid := os.fork()) == 0:
                break
            status = _ended(pid, channel, request["seconds"])
            with suppress(BrokenPipeError):
                channel.sendall(json.dumps({"status": status}).encode() + b"\n")
        else:
            sys.exit(0)
    _become(request)


def _ended(pid: int, channel: socket.socket, seconds: float) -> int | None:
    """Exit status of a child, negative for a signal; killed and None when the time is over, or the caller has ended."""
    child = os.pidfd_open(pid)
    ready, _, _ = select.select([child, channel], [], [], seconds)
    os.close(child)
    if not ready or channel in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) if ready else None


def _become(request: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    for descriptor, path in zip((1, 2), request["output"], strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        os.dup2(opened, descriptor)
        os.close(opened)
    sys.argv[1:] = request["argv"]


if __name__ == "__main__":
    # A process that gets its program by -c finds modules there, and not where this file is.
    sys.path[0] = ""
    # The tests' process ends this one, which it does by going.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as opened:
        modules, sys.argv[:] = sys.argv[2:], ["-c"]
        prepare(modules)
        serve(opened)
    from fedge.shared.cli.main import main

    sys.exit(main())
