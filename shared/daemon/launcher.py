"""Flower's own commands, started as forks of the daemon instead of as new interpreters.

Flower starts its child commands by bare name on PATH. A daemon puts a folder in front of PATH that holds a small
program of each such name; that program asks the daemon, over a Unix socket, to fork and run Flower's console
script with these arguments, and ends. So Flower's code runs unchanged, and the daemon knows when it dies.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from fedge.shared.daemon import sockets
from fedge.shared.daemon.supervisor import Supervisor

_log = logging.getLogger(__name__)

_MAX_REQUEST: Final = 64 * 1024

# -I -S: no site packages, no environment: it starts in some 15 ms. Folders may be deeper than a socket's path may be
# long, so it goes there first.
_STUB: Final = """\
#!/bin/sh
exec {python} -I -S -c '
import json, os, socket, sys
os.chdir(sys.argv[1])
s = socket.socket(socket.AF_UNIX)
s.settimeout(10)
s.connect("launch.sock")
s.sendall(json.dumps(sys.argv[2:]).encode() + b"\\n")
sys.exit(0 if s.recv(2) == b"ok" else 1)
' {home} {name} "$@"
"""


def install(
    supervisor: Supervisor, names: Sequence[str], launch: Callable[[str, list[str]], None]
) -> Path:
    """Write the programs and serve their requests.

    Args:
        supervisor: of the daemon, whose home takes ``bin/`` and ``launch.sock``.
        names: of the commands.
        launch: starts one, given its name and arguments.

    Returns:
        The folder to put in front of PATH.
    """
    folder = supervisor.home / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / name
        path.write_text(
            _STUB.format(
                python=shlex.quote(sys.executable),
                home=shlex.quote(str(supervisor.home.absolute())),
                name=name,
            ),
            encoding="utf-8",
        )
        path.chmod(0o700)

    def serve(connection: socket.socket) -> None:
        received = b""
        while not received.endswith(b"\n"):
            part = connection.recv(_MAX_REQUEST)
            received += part
            if not part or len(received) > _MAX_REQUEST:
                raise ValueError("a launch request must be one line of JSON")
        words = json.loads(received)
        if not isinstance(words, list) or not words or words[0] not in names:
            raise ValueError(f"a launch request must name one of {', '.join(names)}")
        launch(str(words[0]), [str(word) for word in words[1:]])
        connection.sendall(b"ok")

    supervisor.serve(sockets.listen(supervisor.home / "launch.sock"), serve)
    return folder


def path_with(folder: Path) -> str:
    """PATH with a folder in front, then this interpreter's, where Flower's other commands lie."""
    return os.pathsep.join(
        [
            str(folder.absolute()),
            str(Path(sys.executable).parent),
            os.environ.get("PATH", os.defpath),
        ]
    )
