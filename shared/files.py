"""Files that survive a kill: whole or not at all, and on the disk when the call returns."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, data: bytes, halfway: Callable[[], None] = lambda: None) -> None:
    """Write to a temporary file beside ``path``, flush it to the disk, then rename it over ``path``.

    Args:
        path: the file; afterwards it holds ``data`` or what it held before, never a part.
        data: its new content.
        halfway: called after half of the bytes (a test's fail point).
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        halfway()
        file.write(data[len(data) // 2 :])
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, which makes a rename durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def take_lock(path: Path, *, mode: int = 0o600, timeout: float = 0.0) -> BinaryIO:
    """Take the lock of a file (flock) for this process alone; the file is made where it is missing.

    Args:
        path: of the lock file.
        mode: of a new file.
        timeout: seconds to wait for another process that holds it.

    Returns:
        The open file; closing it gives the lock back.

    Raises:
        BlockingIOError: another process still holds it.
        OSError: the file cannot be opened.
    """
    file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, mode), "r+b", buffering=0)
    deadline = time.monotonic() + timeout
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BaseException as error:
            if not isinstance(error, BlockingIOError) or time.monotonic() >= deadline:
                file.close()
                raise
        time.sleep(0.02)


def mode_for_others(path: Path) -> int:
    """The mode of a file that others than its owner may use; 0 where none of them may.

    Raises:
        OSError: there is no such file.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    return mode if mode & 0o077 else 0


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file for reading; a pipe, a device or a folder is refused, not waited for.

    Returns:
        The open file, unbuffered, and its size in bytes.

    Raises:
        OSError: the path does not name a readable regular file.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "must be a file name, got one with a NUL in it")
    # Without O_NONBLOCK, opening a pipe without a writer would block.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "must be a regular file")
        return os.fdopen(descriptor, "rb", buffering=0), status.st_size
    except BaseException:
        os.close(descriptor)
        raise


def read_exactly(file: BinaryIO, size: int) -> bytes:
    """Read ``size`` bytes, or fewer where the file ends first."""
    data = file.read(size)
    if len(data) == size or not data:
        return data
    # A single read of the operating system may stop early, at 2 GiB for example.
    parts, missing = [data], size - len(data)
    while missing and (data := file.read(missing)):
        parts.append(data)
        missing -= len(data)
    return b"".join(parts)


def read_bounded(path: Path, limit: int) -> bytes:
    """Read a whole regular file of at most ``limit`` bytes.

    Raises:
        OSError: it cannot be read, is not a regular file, or holds more than ``limit`` bytes.
    """
    file, _ = open_regular(path)
    with file:
        data = read_exactly(file, limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"must hold at most {limit} bytes")
    return data


def reason(error: OSError) -> str:
    """The error in a few words, without the path."""
    return error.strerror or type(error).__name__
