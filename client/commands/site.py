"""``fedge site``: the daemon of a site that takes part in a federation."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedge.shared.cli.command import Command

if TYPE_CHECKING:
    from fedge.client.deployment.operations import Trust
    from fedge.client.settings.policy import SecurePolicy

_EXAMPLE = (
    "example:\n  fedge site init clinic-a --home site --task digits \\\n"
    "    --server fed.example.org:8443 --ca ca.crt\n"
    "  fedge site start --home site\n"
    "  fedge site status --home site"
)

_ACTIONS = {
    "init": "make a home: the site's key, its configuration, its policy",
    "start": "run the site's daemon in the foreground",
    "status": "show whether the site is connected, and what its worker does",
    "stop": "end the site's daemon",
    "units": "write the systemd units",
}


def _arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    parsers = {}
    for name, text in _ACTIONS.items():
        parsers[name] = actions.add_parser(
            name,
            help=text,
            description=f"{text[:1].upper()}{text[1:]}.",
            formatter_class=RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name != "units":
            parsers[name].add_argument(
                "--home", metavar="DIR", type=Path, default=Path("fedge-site"),
                help="the site's folder (default: fedge-site)",
            )  # fmt: skip
    new = parsers["init"]
    new.add_argument("name", metavar="NAME", help="the site's name, as the server admits it")
    new.add_argument("--task", required=True, help="the task that its worker serves")
    new.add_argument("--server", metavar="HOST:PORT", required=True, help="the server's address")
    new.add_argument(
        "--ca", metavar="CA.crt", type=Path, required=True, help="the server's authority"
    )
    new.add_argument("--data", metavar="PATH", type=Path, help="where the task finds its examples")
    new.add_argument(
        "--roster", metavar="roster.json", type=Path,
        help="install this roster, and have the policy require secure aggregation",
    )  # fmt: skip
    new.add_argument(
        "--consortium", metavar="KEY.pub", type=Path, help="the key that signed the roster"
    )
    new.add_argument(
        "--min-sites", metavar="N", type=int,
        help="fewest sites of a sum that this site takes part in (default: 5)",
    )  # fmt: skip
    parsers["start"].add_argument(
        "--only",
        choices=("relay", "worker"),
        help="one half only, where two users divide the site",
    )
    parsers["status"].add_argument("--json", action="store_true", help="print JSON")
    parsers["units"].add_argument("--out", metavar="DIR", type=Path, required=True, help="folder")
    parsers["units"].add_argument(
        "--bin", metavar="DIR", type=Path, default=Path("/opt/fedge/bin"), help="where fedge lies"
    )
    parsers["units"].add_argument(
        "--data", metavar="DIR", type=Path, default=Path("/srv/fedge-data"),
        help="that only the worker may read (default: /srv/fedge-data)",
    )  # fmt: skip


def _secure(arguments: Namespace) -> tuple[SecurePolicy | None, Trust | None]:
    """Terms of secure aggregation, and what to install for it.

    Raises:
        UsageError: 102, --roster and --consortium do not come together, or --min-sites comes without them.
        ConfigError: 201, --min-sites is not allowed.
    """
    from fedge.shared.errors import UsageError

    roster, consortium, min_sites = arguments.roster, arguments.consortium, arguments.min_sites
    if (roster is None) != (consortium is None):
        raise UsageError(102, "--roster and --consortium: must be given together, got one of them")
    if roster is None:
        if min_sites is not None:
            raise UsageError(102, "--min-sites: must come with --roster and --consortium")
        return None, None
    # Here, as it imports Flower.
    from fedge.client.deployment import operations
    from fedge.client.settings.policy import FILE, SecurePolicy
    from fedge.shared.config import home_files

    terms = {"required": True, **({} if min_sites is None else {"min-sites": min_sites})}
    return home_files.check(terms, SecurePolicy, FILE), operations.Trust(roster, consortium)


def _run(arguments: Namespace) -> int:
    import json
    import sys

    def say(value: Any, text: str) -> None:
        as_json = getattr(arguments, "json", False)
        sys.stdout.write((json.dumps(value) if as_json else text) + "\n")

    match arguments.action:
        case "start":
            from fedge.client.deployment import daemon

            return daemon.run(arguments.home, arguments.only or "both")
        case "init":
            from fedge.client.deployment import operations

            secure, trust = _secure(arguments)
            summary = operations.init(
                arguments.home,
                arguments.name,
                task=arguments.task,
                server=arguments.server,
                ca=arguments.ca,
                data=arguments.data,
                secure=secure,
                trust=trust,
            )
            say(None, summary)
        case "status":
            from fedge.client.deployment import operations

            status = operations.status(arguments.home)
            say(status, operations.status_text(status))
            return 0 if status["healthy"] else 1
        case "stop":
            from fedge.shared.daemon import home
            from fedge.shared.errors import DeployError

            if not home.held(arguments.home):
                raise DeployError(911, f"{arguments.home}: must be run by a daemon, got none")
            home.end(arguments.home)
        case "units":
            from fedge.client.deployment import systemd

            for path in systemd.write(arguments.out, bin=arguments.bin, data=arguments.data):
                say(None, str(path))
    return 0


COMMAND = Command(
    summary="run a site's daemon: Flower's node and the resident worker",
    extra="train",
    arguments=_arguments,
    run=_run,
    epilog=_EXAMPLE,
)
