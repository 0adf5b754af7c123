"""The container of a bundle: an uncompressed POSIX ustar archive with exactly one spelling.

Every member has the same mode, owner and time, so the archive depends on names and contents only.
The header is packed here, as the standard library's differs between versions of Python in fields
that mean nothing.
"""

from __future__ import annotations

import re
from typing import BinaryIO, Final

from fedge.shared.errors import BundleError
from fedge.shared.files import read_exactly

BLOCK: Final = 512
#: Two empty blocks.
END: Final = bytes(2 * BLOCK)

_SIZE = re.compile(rb"[0-7]{11}\0")


def header(name: str, size: int) -> bytes:
    """The 512 bytes before a member: ASCII ``name`` of at most 100 bytes, ``size`` below 8 GiB."""
    mode, owner, group, time = b"0000644\0", b"0000000\0", b"0000000\0", b"00000000000\0"
    before = (
        name.encode("ascii").ljust(100, b"\0") + mode + owner + group + b"%011o\0" % size + time
    )
    regular_file, no_link, magic = b"0", bytes(100), b"ustar\x0000"
    after = (regular_file + no_link + magic).ljust(BLOCK - len(before) - 8, b"\0")
    checksum = sum(before) + sum(after) + 8 * ord(" ")
    return before + b"%06o\0 " % checksum + after


def padding(size: int) -> bytes:
    """The zeros that fill a member's last block."""
    return bytes(-size % BLOCK)


class ArchiveReader:
    """Reads an archive from its start; takes only what ``header``, ``padding``, ``END`` write.

    Args:
        file: open at the archive's first byte.
        size: of the file, in bytes.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size

    def announced_size(self, name: str, limit: int) -> int:
        """Read the header of a member whose size is not known yet.

        Raises:
            BundleError: 702, the header is not that of ``name``; 705, the size is above ``limit``.
        """
        block = self._take(BLOCK, f"archive header of {name}")
        field = block[124:136]
        if _SIZE.fullmatch(field) is None or block != header(name, int(field[:11], 8)):
            raise BundleError(
                702, f"archive header of {name}: differs from the only one that fedge writes"
            )
        size = int(field[:11], 8)
        if size > limit:
            raise BundleError(705, f"{name}: must be at most {limit} bytes, got {size}")
        return size

    def expect_header(self, name: str, size: int) -> None:
        """Read the header of a member whose size is known.

        Raises:
            BundleError: 702, the header is not that of ``name`` with ``size`` bytes.
        """
        if self._take(BLOCK, f"archive header of {name}") != header(name, size):
            raise BundleError(
                702, f"archive header of {name}: differs from the signed name and size"
            )

    def content(self, name: str, size: int) -> bytes:
        """Read a member's bytes, without its padding.

        Raises:
            BundleError: 702, the archive ends too early.
        """
        return self._take(size, name)

    def expect_padding(self, name: str, size: int) -> None:
        """Read the zeros after a member of ``size`` bytes.

        Raises:
            BundleError: 702, they are not zeros, or missing.
        """
        where = f"archive padding after {name}"
        zeros = padding(size)
        if self._take(len(zeros), where) != zeros:
            raise BundleError(702, f"{where}: must be zero")

    def expect_end(self) -> None:
        """Read the two empty blocks at the end.

        Raises:
            BundleError: 702, they are not empty, or missing, or something follows.
        """
        if self._take(len(END), "archive end") != END:
            raise BundleError(702, "archive end: must be two empty blocks")
        if self._left or self._file.read(1):
            raise BundleError(702, "archive end: must be the end of the file, got more bytes")

    def _take(self, count: int, where: str) -> bytes:
        # Compared with the file's size first, so that nothing is allocated for bytes which are not
        # there.
        if count > self._left:
            raise BundleError(702, f"{where}: the file ends after {self._left} of {count} bytes")
        try:
            data = read_exactly(self._file, count)
        except OSError as error:
            raise BundleError(701, f"{where}: cannot be read ({error.strerror})") from None
        if len(data) != count:
            raise BundleError(702, f"{where}: the file ends after {len(data)} of {count} bytes")
        self._left -= count
        return data
