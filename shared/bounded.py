"""Read files that somebody else wrote: regular files only, and never more than a bound."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> tuple[BinaryIO, int]:
    """Open a regular file for reading; a pipe, a device or a folder is refused, not waited for.

    Returns:
        The open file, unbuffered, and its size in bytes.

    Raises:
        OSError: the path does not name a readable regular file.
    """
    if "\0" in str(path):
        raise OSError(errno.EINVAL, "must be a file name, got one with a NUL in it")
    # Without O_NONBLOCK, opening a pipe that nobody writes to would wait for ever.
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
    """Read a whole regular file.

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
