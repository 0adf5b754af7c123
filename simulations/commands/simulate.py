"""``fedge simulate``: a federation in one process."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.shared.cli.command import Command

if TYPE_CHECKING:
    from fedge.server.runs.directory import RunDirectory
    from fedge.shared.config.federation import Config


def _arguments(parser: ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="what to run")
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


def settled(path: Path, overrides: list[str], out: Path, *, resume: bool) -> Config:
    """Load and check a configuration without importing the task's own code.

    Args:
        path: of the configuration file.
        overrides: ``KEY=VALUE`` texts.
        out: the run directory.
        resume: whether the run directory may hold an unfinished run.

    Raises:
        ConfigError: 201 to 211, the configuration or the run directory.
        DataError: 304, there is no such task.
    """
    from fedge.server.runs.directory import require_free
    from fedge.shared.config.reader import load
    from fedge.shared.tasks.registry import require_task

    config = load(path, overrides)
    require_task(config.task.name)
    require_free(out, resume=resume)
    return config


def show(directory: RunDirectory, *, as_json: bool) -> None:
    """Print the results of a finished run."""
    import json
    import sys

    from fedge.simulations.terminal.summary import summary_table

    metrics = directory.metrics.read_text(encoding="utf-8")
    if as_json:
        sys.stdout.write(metrics)
    else:
        lines = [
            json.loads(line) for line in directory.rounds.read_text(encoding="utf-8").splitlines()
        ]
        unit = directory.load_config().privacy.unit
        sys.stdout.write(summary_table(json.loads(metrics), lines, unit) + "\n")
        sys.stdout.write(f"{directory.report}\n")


def _run(arguments: Namespace) -> int:
    config = settled(arguments.config, arguments.set, arguments.out, resume=arguments.resume)
    # Imported here, as these import torch and Flower, and invalid input is refused at once.
    from fedge.simulations.engine import simulate
    from fedge.simulations.terminal.progress import Progress

    with Progress(quiet=arguments.quiet) as progress:
        directory = simulate(config, arguments.out, resume=arguments.resume, listener=progress)
    show(directory, as_json=arguments.json)
    return 0


COMMAND = Command(
    summary="run a federation in one process, from data to model and report",
    extra="simulation",
    arguments=_arguments,
    run=_run,
    epilog="example:\n  fedge simulate examples/digits.toml --set run.rounds=5 --out runs/digits",
)
