"""What stands in a roster, and the draft of one: a TOML file that people read and review.

Signing, and what a signed roster is good for, is in ``fedge.shared.roster.roster``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import tomli_w
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from fedge.shared.errors import ConfigError, ReleaseError
from fedge.shared.files import read_bounded, reason, write_atomically
from fedge.shared.protocol import SITE_NAME

MAX_SITES: Final = 10_000
#: Of a draft and of a signed roster, in bytes; 10 000 sites with the longest names take 3.3 MB.
MAX_FILE: Final = 4 << 20
#: The largest whole number that every reader of JSON holds exactly.
HIGHEST_VERSION: Final = 2**53 - 1
MAX_NAME: Final = 100

_ROSTER_KEYS: Final = ("consortium", "sites", "version")
_SITE_KEYS: Final = ("expires", "key", "revoked")

_PRIME: Final = 2**255 - 19
# y of the points whose order divides 8: a signature that verifies under such a key takes no secret.
_ORDER_EIGHT: Final = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7
_SMALL_ORDER: Final = frozenset((0, 1, _PRIME - 1, _ORDER_EIGHT, _PRIME - _ORDER_EIGHT))

_HEAD: Final = """\
# The sites of a consortium. `fedge roster add` and `revoke` change this file and raise its version; nothing counts
# before it is signed with `fedge roster sign`. expires is the last day (UTC) on which a site's key is valid.
"""


@dataclass(frozen=True)
class RosterSite:
    """A site's entry.

    Attributes:
        key: verifies what the site signs.
        raw: the same key, 32 bytes.
        expires: the last day (UTC) on which the key is valid.
        revoked: whether the consortium took the key back.
    """

    key: Ed25519PublicKey = field(compare=False, repr=False)
    raw: bytes
    expires: date
    revoked: bool = False


@dataclass(frozen=True)
class Listing:
    """What a draft and a signed roster both hold; checked when made, then never changed."""

    consortium: str
    version: int
    sites: Mapping[str, RosterSite]

    def __post_init__(self) -> None:
        name = self.consortium
        if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or name != name.strip():
            raise ConfigError(
                201,
                f"consortium: must be 1 to {MAX_NAME} printable characters, got {name[:80]!r}",
            )
        if not 1 <= self.version <= HIGHEST_VERSION:
            # Not quoted: TOML's hexadecimal numbers may be longer than Python prints.
            raise ConfigError(201, "version: must be 1 to 2^53 - 1, got a number out of range")
        if len(self.sites) > MAX_SITES:
            raise ConfigError(201, f"sites: must be at most {MAX_SITES}, got {len(self.sites)}")
        holders: dict[bytes, str] = {}
        for site, entry in self.sites.items():
            check_name(site)
            other = holders.setdefault(entry.raw, site)
            if other != site:
                raise ConfigError(201, f"sites.{site}.key: must be its own, got that of {other}")
        object.__setattr__(self, "sites", MappingProxyType(dict(sorted(self.sites.items()))))


@dataclass(frozen=True)
class Draft(Listing):
    """A roster that nobody signed yet: it can be edited, and makes no site trusted."""


def entry_of(raw: bytes, expires: date, revoked: bool = False) -> RosterSite:
    """A site's entry from the 32 bytes of its Ed25519 public key (RFC 8032, section 5.1.2).

    Raises:
        ConfigError: 201, these are no key, or a key under which anybody can sign.
    """
    y = int.from_bytes(raw, "little") & (2**255 - 1)
    if len(raw) != 32 or y >= _PRIME or y in _SMALL_ORDER:
        raise ConfigError(201, "key: must be an Ed25519 public key, got bytes that are none")
    return RosterSite(Ed25519PublicKey.from_public_bytes(raw), raw, expires, revoked)


def tree_of(roster: Listing, date_of: Callable[[date], Any]) -> dict[str, Any]:
    """The roster as plain tables.

    Args:
        roster: signed or not.
        date_of: how a date is written.
    """
    return {
        "version": roster.version,
        "consortium": roster.consortium,
        "sites": {
            site: {
                "key": entry.raw.hex(),
                "expires": date_of(entry.expires),
                "revoked": entry.revoked,
            }
            for site, entry in roster.sites.items()
        },
    }


def parts_of(
    tree: Any, date_of: Callable[[Any, str], date]
) -> tuple[str, int, dict[str, RosterSite]]:
    """The inverse of ``tree_of``: consortium, version and sites.

    Args:
        tree: what a parser returned, of any form.
        date_of: reads a date; the text is the key's path, for messages.

    Raises:
        ConfigError: 201, a value is missing or not allowed; 202, a key is unknown.
    """
    table = _table(tree, "", _ROSTER_KEYS)
    consortium = _typed(table["consortium"], str, "consortium", "text")
    version = _typed(table["version"], int, "version", "a whole number")
    sites = _typed(table["sites"], dict, "sites", "a table")
    if len(sites) > MAX_SITES:
        raise ConfigError(201, f"sites: must be at most {MAX_SITES}, got {len(sites)}")
    return (
        consortium,
        version,
        {site: _entry(site, found, date_of) for site, found in sites.items()},
    )


def iso_date(value: Any, path: str) -> date:
    """A date as ``tree_of(roster, str)`` writes it, and in no other form.

    Args:
        value: of any type.
        path: of its key, for messages.

    Raises:
        ConfigError: 201, it is something else.
    """
    try:
        found = date.fromisoformat(_typed(value, str, path, "a date"))
        if found.isoformat() == value:
            return found
    except ValueError:
        pass
    raise ConfigError(201, f"{path}: must be a date like 2027-11-30, got {value[:40]!r}")


def check_name(site: str) -> None:
    """Refuse what is no site's name.

    Raises:
        ConfigError: 201.
    """
    if re.fullmatch(SITE_NAME, site) is None:
        raise ConfigError(201, f"site name: must match {SITE_NAME}, got {site[:80]!r}")


def read_draft(path: Path) -> Draft:
    """Read ``roster.toml``.

    Raises:
        ConfigError: 201 a value is missing or not allowed; 202 a key is unknown; 203 the file
            cannot be read; 204 it is not TOML.
    """
    try:
        text = read_bounded(path, MAX_FILE).decode("utf-8")
    except OSError as error:
        raise ConfigError(203, f"{path}: must be readable, got {reason(error)}") from None
    except UnicodeDecodeError:
        raise ConfigError(203, f"{path}: must be UTF-8, got other bytes") from None
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        first = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(204, f"{path}: must be TOML, got {first[:160]}") from None
    try:
        return Draft(*parts_of(tree, _toml_date))
    except ConfigError as error:
        raise ConfigError(error.code, f"{path.name}: {error.message}") from None


def write_draft(path: Path, draft: Draft) -> None:
    """Write ``roster.toml``, replacing what was there, comments too.

    Raises:
        ReleaseError: 606, it cannot be written.
    """
    try:
        write_atomically(path, (_HEAD + tomli_w.dumps(tree_of(draft, lambda day: day))).encode())
    except OSError as error:
        raise ReleaseError(606, f"{path}: cannot be written ({reason(error)})") from None


def _entry(site: str, found: Any, date_of: Callable[[Any, str], date]) -> RosterSite:
    check_name(site)
    path = f"sites.{site}."
    table = _table(found, path, _SITE_KEYS)
    key = _typed(table["key"], str, f"{path}key", "text")
    if re.fullmatch(r"[0-9a-f]{64}", key) is None:
        raise ConfigError(201, f"{path}key: must be 64 lower-case hexadecimal digits")
    revoked = _typed(table["revoked"], bool, f"{path}revoked", "true or false")
    expires = date_of(table["expires"], f"{path}expires")
    try:
        return entry_of(bytes.fromhex(key), expires, revoked)
    except ConfigError as error:
        raise ConfigError(201, f"{path}{error.message}") from None


def _table(found: Any, path: str, keys: tuple[str, ...]) -> dict[str, Any]:
    table: dict[str, Any] = _typed(found, dict, path.rstrip(".") or "content", "a table")
    for key in table:
        if key not in keys:
            known = ", ".join(keys)
            raise ConfigError(202, f"{path}{key[:60]!r}: must be a known key: {known}")
    for key in keys:
        if key not in table:
            raise ConfigError(201, f"{path}{key}: must be there, got none")
    return table


def _typed(value: Any, kind: type, path: str, words: str) -> Any:
    # Exactly that type: a bool is an int to Python.
    if type(value) is not kind:
        raise ConfigError(201, f"{path}: must be {words}, got {type(value).__name__}")
    return value


def _toml_date(value: Any, path: str) -> date:
    # A date with a time is a date to Python, too.
    found: date = _typed(value, date, path, "a date like 2027-11-30, without quotes")
    return found


__all__ = [
    "Draft",
    "MAX_FILE",
    "Listing",
    "MAX_SITES",
    "RosterSite",
    "check_name",
    "entry_of",
    "iso_date",
    "parts_of",
    "read_draft",
    "tree_of",
    "write_draft",
]
