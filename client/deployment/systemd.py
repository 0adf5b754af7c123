"""A site's systemd units and users, as files for the site's operator to install.

Two users, so that the kernel keeps the relay, which talks to the server, from the data, which the worker alone reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedge.shared.daemon import systemd

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
_HOMES: Final = tuple(Path(text) for text in ("/home", "/root", "/run/user"))


def texts(*, bin: Path, data: Path = DATA) -> dict[str, str]:
    """The text of each file, by file name.

    Args:
        bin: the folder of the ``fedge`` command, absolute.
        data: the site's data, which the worker reads and the relay cannot see; absolute.

    Raises:
        ConfigError: 201, a path is not absolute, or has characters that a unit cannot hold.
    """
    # Data in a user's home folder stays readable; all other homes do not become writable by it.
    words = {
        "PROTECT_HOME": "read-only" if any(data.is_relative_to(home) for home in _HOMES) else "yes"
    }
    units = {
        name: systemd.filled(__package__, name, words=words, bin=bin, data=data)
        for name in (RELAY, WORKER)
    }
    return {USERS: _USERS_TEXT, **units}


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
    return systemd.write(folder, texts(bin=bin, data=data))


__all__ = ["DATA", "RELAY", "USERS", "WORKER", "texts", "write"]
