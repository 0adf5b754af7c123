"""``fedge up``: a whole federation on this machine, with real processes."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from fedge.shared.cli.command import Command


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="CONFIG.toml", type=Path, required=True, help="what to run"
    )
    parser.add_argument(
        "--sites", metavar="N", type=int, help="number of sites, instead of the configuration's"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="run directory, new or empty"
    )
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key; repeatable"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in DIR, or start it"
    )
    parser.add_argument("--json", action="store_true", help="print metrics.json instead of a table")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _run(arguments: Namespace) -> int:
    from fedge.simulations.commands.simulate import settled, show

    overrides = list(arguments.set)
    if arguments.sites is not None:
        overrides.append(f"sites.count={arguments.sites}")
    config = settled(arguments.config, overrides, arguments.out, resume=arguments.resume)
    from fedge.simulations.federation import federate

    directory = federate(config, arguments.out, resume=arguments.resume, quiet=arguments.quiet)
    show(directory, as_json=arguments.json)
    return 0


COMMAND = Command(
    summary="run a federation here with real processes, site by site",
    extra="train",
    arguments=_arguments,
    run=_run,
    epilog="example:\n  fedge up --sites 4 --config examples/digits.toml --out runs/up",
)
