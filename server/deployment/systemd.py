"""The server's systemd unit and its user, as files for the operator to install."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Final

from fedge.shared.errors import ConfigError, UsageError
from fedge.shared.files import reason, write_atomically

UNIT: Final = "fedge-server.service"
USERS: Final = "fedge-server.conf"

_USERS_TEXT: Final = """\
# Written by fedge: put it into /etc/sysusers.d, then run systemd-sysusers.
u fedge-server - "fedge server" /var/lib/fedge-server -
"""
# Nothing that systemd would expand or split at.
_PLAIN_PATH: Final = re.compile(r"(/[A-Za-z0-9_.+@-]+)+/?")


def texts(*, bin: Path) -> dict[str, str]:
    """The content of the unit and user files, by file name.

    Args:
        bin: the folder of the ``fedge`` command, absolute.

    Raises:
        ConfigError: 201, the path is not absolute, or has characters that a unit cannot hold.
    """
    if _PLAIN_PATH.fullmatch(str(bin)) is None or ".." in bin.parts:
        raise ConfigError(
            201, f"bin: must be an absolute path of letters, digits and '_.+@-', got {str(bin)!r}"
        )
    text = files(__package__).joinpath(UNIT).read_text(encoding="utf-8")
    return {UNIT: text.replace("@BIN@", str(bin)), USERS: _USERS_TEXT}


def write(folder: Path, *, bin: Path) -> list[Path]:
    """Write the files of ``texts`` into a folder, over those of an earlier release.

    Raises:
        ConfigError: 201, as ``texts``.
        UsageError: 107, the folder cannot be written.
    """
    contents = texts(bin=bin)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            write_atomically(folder / name, text.encode())
            (folder / name).chmod(0o644)
    except OSError as error:
        raise UsageError(107, f"{folder}: cannot be written ({reason(error)})") from None
    return [folder / name for name in contents]


__all__ = ["UNIT", "USERS", "texts", "write"]
