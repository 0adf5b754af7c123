from __future__ import annotations

import io
import shutil
import subprocess
import tarfile

import pytest

from fedge.shared.bundle import ustar
from fedge.shared.bundle.ustar import ArchiveReader
from fedge.shared.errors import BundleError

CONTENT = b"hello world"
WHOLE = ustar.header("a.txt", len(CONTENT)) + CONTENT + ustar.padding(len(CONTENT)) + ustar.END


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 8**11 - 1])
def test_headers_are_those_that_tar_reads(size: int) -> None:
    found = tarfile.TarInfo.frombuf(ustar.header("model.onnx", size), "ascii", "strict")
    assert (found.name, found.size, found.mode) == ("model.onnx", size, 0o644)
    assert (found.uid, found.gid, found.mtime, found.uname, found.gname) == (0, 0, 0, "", "")
    assert found.isreg()
    assert len(ustar.header("model.onnx", size)) == 512


def test_tar_lists_the_archive() -> None:
    with tarfile.open(fileobj=io.BytesIO(WHOLE)) as opened:
        assert opened.getnames() == ["a.txt"]
        member = opened.extractfile("a.txt")
        assert member is not None
        assert member.read() == CONTENT
    if tar := shutil.which("tar"):
        done = subprocess.run([tar, "tf", "-"], input=WHOLE, capture_output=True, check=True)
        assert (done.stdout, done.stderr) == (b"a.txt\n", b"")


def _read(data: bytes) -> bytes:
    reader = ArchiveReader(io.BytesIO(data), len(data))
    size = reader.announced_size("a.txt", limit=100)
    content = reader.content("a.txt", size)
    reader.expect_padding("a.txt", size)
    reader.expect_end()
    return content


def test_reader_returns_what_was_written() -> None:
    assert _read(WHOLE) == CONTENT


def test_reader_bounds_the_announced_size_before_it_reads() -> None:
    class Untouchable(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert size <= 512
            return super().read(size)

    data = ustar.header("a.txt", 8**11 - 1)
    with pytest.raises(BundleError) as error:
        ArchiveReader(Untouchable(data), 2**40).announced_size("a.txt", limit=100)
    assert error.value.code == 705
    with pytest.raises(BundleError) as error:
        ArchiveReader(Untouchable(b""), 10).content("a.txt", 2**40)
    assert error.value.code == 702


@pytest.mark.parametrize(
    "field",
    [b"\x80" + b"\xff" * 11, b" 0000000013\0", b"00000000013 ", b"-0000000013\0", b"\0" * 12],
)
def test_other_spellings_of_the_size_are_refused(field: bytes) -> None:
    data = bytearray(WHOLE)
    data[124:136] = field
    checksum = sum(data[:148]) + 8 * 32 + sum(data[156:512])
    data[148:156] = b"%06o\0 " % checksum
    with pytest.raises(BundleError) as error:
        _read(bytes(data))
    assert error.value.code == 702
    assert error.value.message.startswith("archive header of a.txt: ")


def test_a_file_that_shrinks_is_noticed() -> None:
    reader = ArchiveReader(io.BytesIO(WHOLE[:515]), len(WHOLE))
    size = reader.announced_size("a.txt", limit=100)
    with pytest.raises(BundleError) as error:
        reader.content("a.txt", size)
    assert error.value.message == "a.txt: the file ends after 3 of 11 bytes"


def test_a_file_that_grows_is_noticed() -> None:
    with pytest.raises(BundleError) as error:
        ArchiveReader(io.BytesIO(ustar.END + b"x"), len(ustar.END)).expect_end()
    assert error.value.message.startswith("archive end: ")
