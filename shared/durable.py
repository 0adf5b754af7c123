"""Files that survive a kill: whole or not at all, and on the disk when the call returns."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


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
    """Make the names in a folder durable, as a rename is not until then."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
