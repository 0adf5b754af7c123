"""``fedge server``: the coordinating side of a federation, and its operator's commands."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from fedge.shared.cli.command import Command

_EXAMPLE = (
    "example:\n  fedge server init --home fed --address fed.example.org:8443\n"
    "  fedge server admit clinic-a site.pub --home fed\n"
    "  fedge server submit examples/digits.toml --home fed"
)

#: Action, and one line of help.
_ACTIONS = {
    "init": "make a home: certificate authority, certificate, addresses",
    "start": "run the server in the foreground; it continues every unfinished run",
    "submit": "queue a run of a configuration",
    "status": "show processes, sites and runs",
    "runs": "list the runs",
    "resume": "let a stopped run go on",
    "stop": "end a run, or the server where none is named",
    "admit": "admit a site, by the public key that it made",
    "expel": "remove a site from the registry",
    "bundle": "print the SHA-256 of the Flower bundle that sites approve",
    "renew": "make a new server certificate from the same authority",
    "units": "write the systemd unit",
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
        if name not in ("bundle", "units"):
            parsers[name].add_argument(
                "--home", metavar="DIR", type=Path, default=Path("fedge-server"),
                help="the server's folder (default: fedge-server)",
            )  # fmt: skip
    new = parsers["init"]
    new.add_argument("--address", metavar="HOST:PORT", required=True, help="that the sites dial")
    new.add_argument(
        "--listen", metavar="IP:PORT", help="where this machine accepts sites, if not there"
    )
    new.add_argument(
        "--front", choices=("none", "nginx"), help="none is for loopback addresses only"
    )
    submit = parsers["submit"]
    submit.add_argument("config", metavar="CONFIG.toml", type=Path, help="what to run")
    submit.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key; repeatable"
    )
    submit.add_argument("--name", help="of the run (default: date, time and a number)")
    for name in ("stop", "resume"):
        parsers[name].add_argument(
            "run", metavar="RUN", nargs="?" if name == "stop" else None, help="name of a run"
        )
    parsers["admit"].add_argument("site", metavar="NAME", help="the site's name")
    parsers["admit"].add_argument(
        "key", metavar="SITE.pub", type=Path, help="as `site init` wrote it"
    )
    parsers["expel"].add_argument("site", metavar="NAME", help="the site's name")
    parsers["units"].add_argument("--out", metavar="DIR", type=Path, required=True, help="folder")
    parsers["units"].add_argument(
        "--bin", metavar="DIR", type=Path, default=Path("/opt/fedge/bin"), help="where fedge lies"
    )
    for name in ("status", "runs", "submit", "bundle"):
        parsers[name].add_argument("--json", action="store_true", help="print JSON")


def _run(arguments: Namespace) -> int:
    import json
    import sys

    from fedge.server.deployment import operations

    def say(value: Any, text: str) -> None:
        as_json = getattr(arguments, "json", False)
        sys.stdout.write((json.dumps(value) if as_json else text) + "\n")

    match arguments.action:
        case "start":
            from fedge.server.deployment import daemon

            return daemon.run(arguments.home)
        case "init":
            created = operations.init(
                arguments.home, arguments.address, arguments.listen, arguments.front
            )
            say(None, created)
        case "submit":
            name = operations.submit(
                arguments.home, arguments.config, arguments.set, arguments.name
            )
            say({"run": name}, name)
        case "status":
            status = operations.status(arguments.home)
            say(status, operations.status_text(status))
            # As `fedge site status` does, so that one monitor fits both.
            return 0 if status["healthy"] else 1
        case "runs":
            runs = operations.runs(arguments.home)
            say(runs, operations.runs_text(runs))
        case "resume":
            say(None, operations.resume(arguments.home, arguments.run))
        case "stop":
            say(None, operations.stop(arguments.home, arguments.run))
        case "admit" | "expel":
            from fedge.server.deployment import site_registry

            if arguments.action == "admit":
                site_registry.admit(arguments.home, arguments.site, arguments.key)
                say(None, f"{arguments.site} admitted; it may connect within half a minute")
            else:
                site_registry.expel(arguments.home, arguments.site)
                say(None, f"{arguments.site} expelled; its connection ends within half a minute")
        case "renew":
            from fedge.server.deployment import certificates

            certificates.renew(arguments.home)
            say(None, "new certificate written; it counts from the server's next start")
        case "bundle":
            from fedge.shared.flower import app_bundle

            digest = app_bundle.sha256()
            say({"sha256": digest}, digest)
        case "units":
            from fedge.server.deployment import systemd

            for path in systemd.write(arguments.out, bin=arguments.bin):
                say(None, str(path))
    return 0


COMMAND = Command(
    summary="run the server, admit sites, submit and watch runs",
    extra="train",
    arguments=_arguments,
    run=_run,
    epilog=_EXAMPLE,
)
