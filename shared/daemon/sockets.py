"""Unix stream sockets under paths of any length, with their permissions in force before a client can connect.

The kernel takes 107 bytes of path, and a home may lie deeper than that. So a socket is bound and reached as
``/proc/self/fd/N/name``, N being a descriptor of its folder.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fedge.shared.errors import DeployError

#: Longest name of a socket in its folder, in bytes; with the descriptor's path it stays within the kernel's 107.
MAX_NAME: Final = 64
BACKLOG: Final = 64


def listen(path: Path, *, mode: int = 0o600, group: int | None = None) -> socket.socket:
    """Listen at ``path``, replacing a socket that a dead process left there.

    The caller makes sure, by a lock, that no living process serves this path.

    Args:
        path: its folder must exist.
        mode: permissions; write permission allows to connect.
        group: id of the group that owns it, where not the process's own.

    Returns:
        The listening socket, blocking, closed on exec.

    Raises:
        DeployError: 904, the socket cannot be made there, or something else has its name.
    """
    if not 0 < len(os.fsencode(path.name)) <= MAX_NAME:
        raise DeployError(904, f"{path}: must have a name of at most {MAX_NAME} bytes, got another")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _folder(path.parent) as folder:
            _only_a_socket(path, folder)
            # Made ready under another name: a rename shows it with its permissions, or not at all.
            temporary = f".{path.name}.new"
            with suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            listener.bind(_within(folder, temporary))
            os.chmod(temporary, mode, dir_fd=folder)
            if group is not None:
                os.chown(temporary, -1, group, dir_fd=folder)
            listener.listen(BACKLOG)
            os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise DeployError(904, f"{path}: must be free for a socket, got {reason}") from None
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: Path, timeout: float) -> socket.socket:
    """Connect to the socket at ``path``.

    Args:
        path: of any length.
        timeout: seconds, of this call and of each one on the socket returned.

    Raises:
        OSError: no process listens there, or not for this user; TimeoutError, none accepts in time.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(timeout)
        with _folder(path.parent) as folder:
            connection.connect(_within(folder, path.name))
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _within(folder: int, name: str) -> str:
    return f"/proc/self/fd/{folder}/{name}"


def _only_a_socket(path: Path, folder: int) -> None:
    """Refuse to replace anything but a socket."""
    try:
        status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise DeployError(904, f"{path}: must be free for a socket, got a file of that name")
