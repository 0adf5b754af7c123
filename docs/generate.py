"""Write the pages of docs/reference that follow from the code: `.venv/bin/python docs/generate.py`.

A test holds that they are current.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from fedge.client.settings.disclosure import ABOUT_DATA, disclosed
from fedge.client.settings.policy import Policy
from fedge.client.settings.site_config import SiteFile
from fedge.edge.cli import parser as edge_parser
from fedge.server.deployment.server_config import ServerFile
from fedge.shared import error_catalogue
from fedge.shared.cli import command, main
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.config.reader import MAX_FILE, schema
from fedge.shared.secagg import messages

REFERENCE = Path(__file__).resolve().parent / "reference"
NOTE = "<!-- Written by docs/generate.py from the code. -->\n"
BLOCKS = {
    1: ("Command line", "UsageError"),
    2: ("Configuration and run directory", "ConfigError"),
    3: ("Data", "DataError"),
    4: ("Sites' replies", "SiteError"),
    5: ("The run", "RunError"),
    6: ("Release", "ReleaseError"),
    7: ("Bundles, on the device", "BundleError"),
    8: ("Inputs, on the device", "InputError"),
    9: ("Server and site", "DeployError"),
}
KINDS = {
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "string": "text",
}


def error_page() -> str:
    """docs/reference/errors.md."""
    lines = [
        NOTE,
        "# Errors\n",
        "A command that fails prints one line on stderr: the number, what happened, and what to do.",
        "With `FEDGE_DEBUG=1` the trace is printed before it.\n",
        f"Exit status: 0 success, {command.FAILED} failure, {command.WRONG_USAGE} wrong usage (FE-102), "
        f"{command.INTERRUPTED} interrupted, {command.STDOUT_CLOSED} the reader of the output is gone.\n",
        "A number means one situation for ever. Numbers 4xx also stand in rounds.jsonl and in the report, as the",
        "reason why a site's reply does not count.",
    ]
    for block, (title, name) in BLOCKS.items():
        lines += [f"\n## {block}xx {title}\n", f"Raised as `fedge.shared.errors.{name}`.\n"]
        lines += ["| number | what it means | what to do |", "|---|---|---|"]
        for code, entry in sorted(error_catalogue.CATALOGUE.items()):
            if code // 100 == block:
                lines.append(f"| FE-{code} | {_cell(entry.title)} | {_cell(entry.remedy)} |")
    return "\n".join(lines) + "\n"


def configuration_page() -> str:
    """docs/reference/configuration.md."""
    found = schema()
    lines = [
        NOTE,
        "# Configuration\n",
        f"One TOML file of at most {MAX_FILE // 1024} KiB describes a federation. `fedge config schema` prints its",
        "JSON Schema, `fedge config check FILE` the file with every default filled in. `--set section.key=VALUE`",
        "replaces a value: VALUE is TOML, and a bare word is text. Paths are relative to the working directory, in the",
        "file and in `--set` alike. A key that is not listed here is refused.",
    ]
    for name, reference in found["properties"].items():
        members = reference.get("discriminator", {}).get("mapping")
        if members is None:
            section = found["$defs"][reference["$ref"].rpartition("/")[2]]
            lines += [f"\n## [{name}]\n", section["description"] + "\n", *_table(section)]
            continue
        lines += [
            f"\n## [{name}]\n",
            f"`{name}.name` chooses one of these; it alone decides which further keys there are.",
        ]
        for tag, pointer in members.items():
            member = found["$defs"][pointer.rpartition("/")[2]]
            lines += [f"\n### {tag}\n", member["description"]]
            own = {key: value for key, value in member["properties"].items() if key != "name"}
            if own:
                lines += ["", *_table({**member, "properties": own})]
    return "\n".join(lines) + "\n"


def command_page() -> str:
    """docs/reference/command-line.md."""
    os.environ["COLUMNS"] = "80"
    lines = [
        NOTE,
        "# Command line\n",
        "`fedge` trains and releases; `fedge-edge` is what a device has. Both print results on stdout, and progress,",
        "log lines and errors on stderr; the exit statuses are in [errors](errors.md).",
    ]
    for name, entry in main.commands().items():
        for title, parser in _with_actions(main.parser_of(name, main.load(entry))):
            lines += [f"\n## {title}\n", "```text", parser.format_help().rstrip(), "```"]
    for title, parser in _with_actions(edge_parser()):
        lines += [f"\n## {title}\n", "```text", parser.format_help().rstrip(), "```"]
    return "\n".join(lines) + "\n"


def site_files_page() -> str:
    """docs/reference/site-files.md."""
    lines = [
        NOTE,
        "# policy.toml, site.toml, server.toml\n",
        "The files by which a site and a server are set up; [homes](homes.md) says where they lie. They are read as",
        "strictly as a configuration: a key that is not listed here is refused. Paths are relative to the home.",
        "\n## policy.toml\n",
        "What a site's worker serves. It is read again when it changes, and counts from the next request; while it is",
        "missing or broken, nothing is served (FE-418).\n",
        *_table(Policy.model_json_schema(by_alias=True)),
        *_tables(Policy.model_json_schema(by_alias=True)),
        "\n## site.toml\n",
        "Who a site is. Relay and worker read it when they start.",
        *_tables(SiteFile.model_json_schema(by_alias=True)),
        "\n## server.toml\n",
        "Where a server listens, and how many runs it plays. Read when it starts.",
        *_tables(ServerFile.model_json_schema(by_alias=True)),
    ]
    return "\n".join(lines) + "\n"


def disclosure_page() -> str:
    """docs/reference/what-leaves-a-site.md."""
    sections = {
        name: PrivacySection.model_validate(
            {"mechanism": name, "noise-multiplier": 1.0, **_NOISED} if name != "off" else {}
        )
        for name in get_args(PrivacySection.model_fields["mechanism"].annotation)
    }
    lines = [
        NOTE,
        "# What leaves a site\n",
        "What each message makes a site give out of its data, by mechanism. `policy.toml` is held against this table,",
        "not against what a message says of itself; a test asks real workers for all of it. Besides, every reply names",
        "site, run and round, and under a mechanism the epsilon that was spent and a digest of the ledger.\n",
        "- **update**: what training changed; without a mechanism the loss too.",
        "- **sizes**: the number of training examples.",
        "- **counts**: the task's counters over held-out examples, and how many there are.",
        "- **sums**: of each standardised column and of its squares, and over how many rows.",
        "- **ranges**: smallest and largest inputs and activations, and over how many rows.\n",
        "*clear*: exact, this site's alone. *masked*: exact, in a sum over sites only. *noised*: with noise that hides",
        "the mechanism's unit, charged. *trusted*: exact, to the server, which adds the noise; charged. *refused*: no",
        "worker serves it.",
    ]
    for masked in (False, True):
        lines.append(f"\n## {'Under secure aggregation' if masked else 'In clear'}\n")
        lines.append(f"| message | {' | '.join(f'`{name}`' for name in sections)} |")
        lines.append(f"|---|{'---|' * len(sections)}")
        for kind in ABOUT_DATA:
            cells = [_left(kind, section, masked=masked) for section in sections.values()]
            lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    lines += [
        '\nThis is with `privacy.metrics = "noised"` and `privacy.statistics = "off"`. With `metrics = "off"` nobody',
        'is asked for counts or ranges; with `"unprotected"` they leave exact, and registering tells how many examples',
        'are held out. With `statistics = "unprotected"` a site whose task standardises gives its sums when it',
        "registers in clear, where whole sites are hidden means in their place, or in a sum of their own. The later",
        "steps of a secure sum give keys, shares and signatures.",
    ]
    return "\n".join(lines) + "\n"


_NOISED = {"metrics": "noised", "metrics-noise-multiplier": 1.0}


def _left(kind: str, section: PrivacySection, *, masked: bool) -> str:
    found = disclosed(kind, section, masked=masked, standardise=True)
    if found is None or (kind == messages.STATISTICS and section.mechanism != "off"):
        return "refused"
    return ", ".join(f"{quantity} {form}" for quantity, form in found.items()) or "nothing"


PAGES = {
    "errors.md": error_page,
    "configuration.md": configuration_page,
    "command-line.md": command_page,
    "site-files.md": site_files_page,
    "what-leaves-a-site.md": disclosure_page,
}


def _tables(found: dict[str, Any]) -> Iterator[str]:
    """A file's sections, a table each."""
    for name, value in found["properties"].items():
        if "$ref" not in value:
            continue
        section = found["$defs"][value["$ref"].rpartition("/")[2]]
        yield from (f"\n### [{name}]\n", section["description"] + "\n", *_table(section))


def _with_actions(parser: ArgumentParser) -> Iterator[tuple[str, ArgumentParser]]:
    """A parser, and those of its sub-commands that take arguments of their own."""
    yield parser.prog, parser
    for action in parser._actions:  # argparse has no public way to them
        if isinstance(action, _SubParsersAction):
            for sub in action.choices.values():
                if len(sub._actions) > 1:  # more than --help
                    yield sub.prog, sub


def _table(section: dict[str, Any]) -> list[str]:
    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    required = section.get("required", [])
    for key, value in section["properties"].items():
        if "$ref" in value:
            continue  # a section with a table of its own
        if key in required:
            default = "must be given"
        elif value.get("default") is None:
            default = "not set"
        else:
            default = f"`{_toml(value['default'])}`"
        text = _cell(value.get("description", ""))
        lines.append(f"| `{key}` | {_cell(_allowed(value))} | {default} | {text} |")
    return lines


def _allowed(value: dict[str, Any]) -> str:
    options = [option for option in value.get("anyOf", [value]) if option.get("type") != "null"]
    return " or ".join(_allowed_one(option) for option in options)


def _allowed_one(value: dict[str, Any]) -> str:
    if "enum" in value:
        return ", ".join(f"`{_toml(choice)}`" for choice in value["enum"])
    if value["type"] == "array":
        return "list of " + _allowed_one(value["items"])
    bounds = [
        f"{sign} {_number(value[name])}"
        for name, sign in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if name in value
    ]
    if "pattern" in value:
        bounds.append(f"matching `{value['pattern']}`")
    kind = "path" if value.get("format") == "path" else KINDS[value["type"]]
    return ", ".join([kind, *bounds])


def _number(value: float) -> str:
    """Grouped digits up to a billion, powers beyond."""
    if value == 2**53 or value == 2**63 - 1:
        return "2^53" if value == 2**53 else "2^63 - 1"
    return f"{value:,}" if isinstance(value, int) and value < 1e9 else f"{value:g}"


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    for file, page in PAGES.items():
        (REFERENCE / file).write_text(page(), encoding="utf-8")
