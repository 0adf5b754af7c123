"""`fedge config`: the configuration's schema, a check of a file, and the names that it may hold."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path

from fedge.shared.cli.command import Command
from fedge.shared.errors import DataError


def _arguments(parser: ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("schema", help="print the JSON Schema of the configuration file")
    check = actions.add_parser("check", help="read a file and print it with every default")
    check.add_argument("file", type=Path, metavar="FILE", help="a TOML file")
    check.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="replace a value, for example run.rounds=3; may be repeated",
    )
    check.add_argument("--json", action="store_true", help="print JSON instead of TOML")
    for name, text in (
        ("tasks", "list what task.name may be"),
        ("strategies", "list what strategy.name may be"),
    ):
        listing = actions.add_parser(name, help=text)
        listing.add_argument("--json", action="store_true", help="print a JSON object")


def _run(arguments: Namespace) -> int:
    match arguments.action:
        case "schema":
            from fedge.shared.config.reader import schema

            _write(json.dumps(schema(), indent=2, ensure_ascii=False) + "\n")
        case "check":
            from fedge.shared.config.reader import dump, load
            from fedge.shared.tasks.registry import require_task

            config = load(arguments.file, arguments.overrides)
            require_task(config.task.name)
            if arguments.json:
                values = config.model_dump(mode="json", by_alias=True, exclude_none=True)
                _write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
            else:
                _write(dump(config))
        case "tasks":
            _write(_listed(_tasks(), as_json=arguments.json))
        case "strategies":
            from fedge.shared.config.reader import strategies

            _write(_listed(strategies(), as_json=arguments.json))
    return 0


def _tasks() -> dict[str, str]:
    from fedge.shared.tasks.registry import get_task, task_names

    lines = {}
    for name in task_names():
        try:
            lines[name] = get_task(name).summary
        except DataError as error:  # one broken package must not hide the tasks of the others
            lines[name] = error.message.removeprefix(f"task {name} ")
    return lines


def _listed(lines: Mapping[str, str], *, as_json: bool) -> str:
    if as_json:
        return json.dumps(lines, indent=2, ensure_ascii=False) + "\n"
    width = max((len(name) for name in lines), default=0)
    return "".join(f"{name:{width}}  {text}\n" for name, text in lines.items())


def _write(text: str) -> None:
    sys.stdout.write(text)


COMMAND = Command(
    summary="show, check and describe the configuration",
    extra="simulation",
    arguments=_arguments,
    run=_run,
    epilog="example:\n  fedge config check examples/digits.toml --set run.rounds=3",
)
