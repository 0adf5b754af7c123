from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedge.shared.files import open_regular, read_bounded, read_exactly


def test_a_file_within_the_bound_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    assert read_bounded(tmp_path / "f", 5) == b"12345"
    with pytest.raises(OSError, match="at most 4 bytes"):
        read_bounded(tmp_path / "f", 4)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (
        tmp_path,
        tmp_path / "pipe",
        tmp_path / "missing",
        Path("a\0b"),
        Path("/dev/zero"),
    ):
        with pytest.raises(OSError):
            open_regular(path)


def test_short_reads_are_completed(tmp_path: Path) -> None:
    import io

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 0, 3))

    assert read_exactly(Slow(b"0123456789"), 8) == b"01234567"
    assert read_exactly(Slow(b"0123"), 8) == b"0123"
