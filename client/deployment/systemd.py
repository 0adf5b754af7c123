"""A site's systemd units and users, as files for the site's operator to install.

Two users, so that the kernel keeps the relay, which talks to the server, from the data, which the worker alone reads.
"""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from typing import Final

from fedge.shared.errors import ConfigError, UsageError
from fedge.shared.files import reason, write_atomically

RELAY: Final = "fedge-site-relay.service"
WORKER: Final = "fedge-site-worker.service"
USERS: Final = "fedge-site.conf"
#: Default folder of the data.
DATA: Final = Path("/srv/fedge-data")

_USERS_TEXT: Final = """\
# Written by fedge: put it into /etc/sysusers.d, then run systemd-sysusers.
g fedge-site - -
u fedge-worker - "fedge site worker" /var/lib/fedge-worker -
u fedge-relay - "fedge site relay" /var/lib/fedge-relay -
m fedge-worker fedge-site
m fedge-relay fedge-site
"""
# Nothing that systemd would expand or split at.
_PLAIN_PATH: Final = re.compile(r"(/[A-Za-z0-9_.+@-]+)+/?")
_HOMES: Final = tuple(Path(text) for text in ("/home", "/root", "/run/user"))


def texts(*, bin: Path, data: Path = DATA) -> dict[str, str]:
    """The text of each file, by file name.

    Args:
        bin: the folder of the ``fedge`` command, absolute.
        data: the site's data, which the worker reads and the relay cannot see; absolute.

    Raises:
        ConfigError: 201, a path is not absolute, or has characters that a unit cannot hold.
    """
    for key, path in (("bin", bin), ("data", data)):
        if _PLAIN_PATH.fullmatch(str(path)) is None or ".." in path.parts:
            raise ConfigError(
                201,
                f"{key}: must be an absolute path of letters, digits and '_.+@-', got {str(path)!r}",
            )
    # Data in a user's home folder stays readable; all other homes do not become writable by it.
    protect_home = "read-only" if any(data.is_relative_to(home) for home in _HOMES) else "yes"
    contents = {USERS: _USERS_TEXT}
    for name in (RELAY, WORKER):
        text = files(__package__).joinpath(name).read_text(encoding="utf-8")
        for word, value in (
            ("@BIN@", str(bin)),
            ("@DATA@", str(data)),
            ("@PROTECT_HOME@", protect_home),
        ):
            text = text.replace(word, value)
        contents[name] = text
    return contents


def write(folder: Path, *, bin: Path, data: Path = DATA) -> list[Path]:
    """Write the files of ``texts`` into a folder, replacing those of an earlier release.

    Args:
        folder: created if missing.
        bin: see ``texts``.
        data: see ``texts``.

    Returns:
        The paths of the files.

    Raises:
        ConfigError: 201, as ``texts``.
        UsageError: 107, the folder cannot be written.
    """
    contents = texts(bin=bin, data=data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in contents.items():
            write_atomically(folder / name, text.encode())
            (folder / name).chmod(0o644)
    except OSError as error:
        raise UsageError(107, f"{folder}: cannot be written ({reason(error)})") from None
    return [folder / name for name in contents]


__all__ = ["DATA", "RELAY", "USERS", "WORKER", "texts", "write"]
