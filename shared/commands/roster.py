"""`fedge roster`: which sites a consortium has, drafted, signed and shown."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from datetime import UTC, date, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedge.shared.cli.command import Command

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from fedge.shared.roster.roster import Draft, Roster, RosterSite

#: An entry whose last day is at most this far away is shown as one that expires.
SOON: Final = 60

_EXAMPLE = (
    "example:\n"
    "  fedge roster new roster.toml --consortium 'Heart study'\n"
    "  fedge roster add roster.toml north --key signing.key.pub --expires 2027-11-30\n"
    "  fedge roster sign roster.toml --key consortium.key\n"
    "  fedge roster verify roster.json --trust consortium.key.pub"
)
_ACTIONS: Final = {
    "new": ("start a draft", "--consortium 'Heart study'"),
    "add": (
        "put a site into a draft, or give it another last day",
        "north --key signing.key.pub --expires 2027-11-30",
    ),
    "revoke": ("take a site's key back in a draft", "north"),
    "sign": ("sign a draft: the file that the sites install", "--key consortium.key"),
    "verify": ("check a signed roster, and show its sites", "--trust consortium.key.pub"),
}


def _arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = {}
    for name, (text, rest) in _ACTIONS.items():
        signed = name == "verify"
        file = "roster.json" if signed else "roster.toml"
        made[name] = actions.add_parser(
            name,
            help=text,
            description=f"{text[:1].upper()}{text[1:]}.",
            epilog=f"example:\n  fedge roster {name} {file} {rest}",
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        made[name].add_argument(
            "path",
            type=Path,
            metavar="ROSTER.json" if signed else "ROSTER.toml",
            help="the signed roster" if signed else "the draft",
        )
    made["new"].add_argument("--consortium", metavar="NAME", required=True, help="its name")
    for name in ("add", "revoke"):
        made[name].add_argument("site", metavar="SITE", help="the site's name")
    made["add"].add_argument(
        "--key", metavar="KEY.pub", type=Path, required=True, help="the site's signing.key.pub"
    )
    made["add"].add_argument(
        "--expires", metavar="DATE", type=_day, required=True,
        help="last day (UTC) on which the key is valid, as 2027-11-30",
    )  # fmt: skip
    made["sign"].add_argument(
        "--key", metavar="KEY", type=Path, required=True, help="the consortium's private key"
    )
    made["sign"].add_argument(
        "--out", metavar="FILE", type=Path, help="where to write (default: ROSTER.json)"
    )
    made["verify"].add_argument(
        "--trust", metavar="KEY.pub", type=Path, required=True, help="the consortium's public key"
    )
    for action in made.values():
        action.add_argument("--json", action="store_true", help="print one JSON object")


def _day(text: str) -> date:
    try:
        found = date.fromisoformat(text)
        if found.isoformat() == text:
            return found
    except ValueError:
        pass
    raise ArgumentTypeError(f"must be a date as 2027-11-30, got {text[:40]!r}")


def _run(arguments: Namespace) -> int:
    import json
    import sys

    today = datetime.now(UTC).date()
    match arguments.action:
        case "new":
            found = _new(arguments)
        case "add" | "revoke":
            found = _edit(arguments, today)
        case "sign":
            found = _sign(arguments)
        case _:
            found = _verify(arguments, today)
    text = json.dumps(found) if arguments.json else _text(found)
    sys.stdout.write(text + "\n")
    return 0


def _new(arguments: Namespace) -> dict[str, Any]:
    from fedge.shared.errors import ReleaseError
    from fedge.shared.roster import draft as roster_draft
    from fedge.shared.roster import roster

    path: Path = arguments.path
    if path.exists() or path.is_symlink():
        raise ReleaseError(
            605, f"{path}: must not exist yet; `fedge roster add` and `revoke` change a draft"
        )
    draft = roster.new(arguments.consortium)
    roster_draft.write_draft(path, draft)
    return _summary(path, draft)


def _edit(arguments: Namespace, today: date) -> dict[str, Any]:
    from fedge.shared.crypto.dsse import key_id, load_public
    from fedge.shared.errors import UsageError
    from fedge.shared.roster import draft as roster_draft
    from fedge.shared.roster import roster

    path: Path = arguments.path
    draft = roster_draft.read_draft(path)
    more: dict[str, Any] = {}
    if arguments.action == "revoke":
        draft = roster.revoke(draft, arguments.site)
    elif arguments.expires < today:
        raise UsageError(102, f"--expires: must be today or later, got {arguments.expires}")
    else:
        public = load_public(arguments.key)
        draft = roster.add(draft, arguments.site, public, arguments.expires)
        more = {"site": arguments.site, "key_id": key_id(public)}
    roster_draft.write_draft(path, draft)
    return {**_summary(path, draft), **more}


def _sign(arguments: Namespace) -> dict[str, Any]:
    from fedge.shared.crypto.dsse import key_id, load_private
    from fedge.shared.errors import ReleaseError
    from fedge.shared.files import reason, write_atomically
    from fedge.shared.roster import draft as roster_draft
    from fedge.shared.roster import roster

    draft = roster_draft.read_draft(arguments.path)
    private = load_private(arguments.key)
    out: Path = arguments.out or arguments.path.with_suffix(".json")
    _check_newer(out, draft, private)
    roster.require_apart(draft, private.public_key())
    try:
        write_atomically(out, roster.sign(draft, private))
    except OSError as error:
        raise ReleaseError(606, f"{out}: cannot be written ({reason(error)})") from None
    return {**_summary(out, draft), "signed_by": key_id(private.public_key())}


def _check_newer(out: Path, draft: Draft, private: Ed25519PrivateKey) -> None:
    """Refuse to replace what is not an earlier version of the same roster.

    Raises:
        ReleaseError: 605.
    """
    from fedge.shared.errors import DeployError, ReleaseError
    from fedge.shared.files import read_bounded, reason
    from fedge.shared.roster.roster import MAX_FILE, content, open_roster

    try:
        before = open_roster(read_bounded(out, MAX_FILE), private.public_key())
    except FileNotFoundError:
        return
    except OSError as error:
        raise ReleaseError(605, f"{out}: cannot be read ({reason(error)})") from None
    except DeployError:
        raise ReleaseError(
            605,
            f"{out}: must be a roster that this key signed, or none; sign with the consortium's key, "
            "or choose another --out",
        ) from None
    if before.consortium != draft.consortium:
        raise ReleaseError(
            605,
            f"{out}: must be of {draft.consortium}, got {before.consortium}; choose another --out",
        )
    if before.version >= draft.version and content(before) != content(draft):
        raise ReleaseError(
            605,
            f"{out}: must be older than version {draft.version} of the draft, got version "
            f"{before.version} with other content; raise the draft's version",
        )


def _verify(arguments: Namespace, today: date) -> dict[str, Any]:
    from fedge.shared.crypto.dsse import key_id, load_public
    from fedge.shared.errors import DeployError
    from fedge.shared.files import read_bounded, reason
    from fedge.shared.roster.roster import MAX_FILE, open_roster

    trusted = load_public(arguments.trust)
    try:
        data = read_bounded(arguments.path, MAX_FILE)
    except OSError as error:
        raise DeployError(917, f"{arguments.path}: cannot be read ({reason(error)})") from None
    return {**shown(open_roster(data, trusted), today), "signed_by": key_id(trusted)}


def shown(roster: Roster, today: date) -> dict[str, Any]:
    """What `verify` prints of a roster, as plain values.

    Args:
        roster: signed.
        today: in UTC.
    """
    from fedge.shared.crypto.dsse import key_id

    return {
        "consortium": roster.consortium,
        "version": roster.version,
        "sha256": roster.digest,
        "sites": [
            {
                "site": site,
                "key": entry.raw.hex(),
                "key_id": key_id(entry.key),
                "expires": str(entry.expires),
                "days": (entry.expires - today).days,
                "revoked": entry.revoked,
                "state": _state(entry, today),
            }
            for site, entry in roster.sites.items()
        ],
    }


def _state(entry: RosterSite, today: date) -> str:
    days = (entry.expires - today).days
    if entry.revoked:
        return "revoked"
    if days < 0:
        return "expired"
    if days == 0:
        return "expires today"
    if days <= SOON:
        return f"expires in {days} day{'s' if days > 1 else ''}"
    return "valid"


def _summary(path: Path, draft: Draft) -> dict[str, Any]:
    return {
        "file": str(path),
        "consortium": draft.consortium,
        "version": draft.version,
        "sites": len(draft.sites),
    }


def _text(found: dict[str, Any]) -> str:
    sites = found["sites"]
    listed = isinstance(sites, list)
    head = {**found, "sites": len(sites)} if listed else found
    lines = [f"{name.replace('_', ' '):10}  {value}" for name, value in head.items()]
    if listed and sites:
        width = max(len(row["site"]) for row in sites)
        lines += ["", f"{'site':{width}}  {'last day':10}  {'key id':16}   state"]
        lines += [
            f"{row['site']:{width}}  {row['expires']}  {row['key_id'][:16]}…  {row['state']}"
            for row in sites
        ]
    return "\n".join(lines)


COMMAND = Command(
    summary="keep the signed list of a consortium's sites",
    extra="train",
    arguments=_arguments,
    run=_run,
    epilog=_EXAMPLE,
)
