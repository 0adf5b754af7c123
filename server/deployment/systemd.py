"""The server's systemd unit and its user, as files for the operator to install."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedge.shared.daemon import systemd

UNIT: Final = "fedge-server.service"
USERS: Final = "fedge-server.conf"

_USERS_TEXT: Final = """\
# Written by fedge: put it into /etc/sysusers.d, then run systemd-sysusers.
u fedge-server - "fedge server" /var/lib/fedge-server -
"""


def texts(*, bin: Path) -> dict[str, str]:
    """The content of the unit and user files, by file name.

    Args:
        bin: the folder of the ``fedge`` command, absolute.

    Raises:
        ConfigError: 201, the path is not absolute, or has characters that a unit cannot hold.
    """
    return {UNIT: systemd.filled(__package__, UNIT, bin=bin), USERS: _USERS_TEXT}


def write(folder: Path, *, bin: Path) -> list[Path]:
    """Write the files of ``texts`` into a folder, over those of an earlier release.

    Raises:
        ConfigError: 201, as ``texts``.
        UsageError: 107, the folder cannot be written.
    """
    return systemd.write(folder, texts(bin=bin))


__all__ = ["UNIT", "USERS", "texts", "write"]
