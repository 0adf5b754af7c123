"""`fedge keys`: the keys that sign bundles and rosters, and by which sites are known in a roster."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from fedge.shared.cli.command import Command

_EXAMPLE = "example:\n  fedge keys new release.key"
_SHOW_EXAMPLE = "example:\n  fedge keys show release.key.pub"


def _arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    new = actions.add_parser(
        "new",
        help="write PATH (private, mode 0600) and PATH.pub",
        description="Write a new Ed25519 key: PATH (private, mode 0600, no password) and PATH.pub.",
        epilog=_EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    new.add_argument("path", type=Path, metavar="PATH", help="of the private key; must not exist")
    show = actions.add_parser(
        "show",
        help="print the id of a public key",
        description="Print a public key's id, to compare with its owner by telephone.",
        epilog=_SHOW_EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    show.add_argument("path", type=Path, metavar="KEY.pub", help="a public key")
    for action in (new, show):
        action.add_argument("--json", action="store_true", help="print one JSON object")


def _run(arguments: Namespace) -> int:
    from fedge.shared.crypto.dsse import key_id, load_public, new_key, public_path

    path: Path = arguments.path
    if arguments.action == "show":
        found = {"public": str(path), "key_id": key_id(load_public(path))}
    else:
        found = {"private": str(path), "public": str(public_path(path)), "key_id": new_key(path)}
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        sys.stdout.write(
            "".join(f"{name.replace('_', ' '):8} {text}\n" for name, text in found.items())
        )
    return 0


COMMAND = Command(
    summary="make the keys that sign bundles and rosters, and show their ids",
    extra="edge",
    arguments=_arguments,
    run=_run,
    epilog=_EXAMPLE,
)
