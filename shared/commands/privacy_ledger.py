"""`fedge privacy ledger`: what a site's studies have spent of their privacy budgets, run by run."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from argparse import ArgumentParser, _SubParsersAction

    from fedge.shared.privacy.accounting.charges import Entry

#: Runs of a study and unit that are shown, the newest, unless all are asked for.
MAX_RUNS: Final = 30
BAR_WIDTH: Final = 30
NAME_WIDTH: Final = 24

_EXAMPLE: Final = "example:\n  fedge privacy ledger --home site --study heart --epsilon 8"
#: Columns of a row, of which a run has one for each purpose, in the order of the CSV file: its name and what a table
#: says above it.
_COLUMNS: Final = {
    "run_id": "run",
    "purpose": "purpose",
    "rounds": "rounds",
    "mechanism": "mechanism",
    "noise_multiplier": "noise",
    "sampling_rate": "sampling",
    "charges": "charges",
    "epsilon_consumers": "consumers",
    "epsilon_server": "server",
}
#: In a table, these are set to the left.
_TEXTS: Final = ("run_id", "purpose", "mechanism")
_SEVERAL: Final = "several"
#: With these a spreadsheet takes a cell for a formula.
_FORMULA: Final = ("=", "+", "-", "@")


def add(actions: _SubParsersAction[ArgumentParser]) -> None:
    """Add the action to those of `fedge privacy`."""
    parser = actions.add_parser(
        "ledger",
        help="show what a site has spent of its privacy budgets",
        description="Show what a site's studies have spent of their privacy budgets, run by run.",
        epilog=_EXAMPLE,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--home", metavar="HOME", type=Path, required=True, help="the site's home")
    parser.add_argument("--study", metavar="S", help="this study only")
    parser.add_argument("--unit", choices=("example", "site"), help="this unit of privacy only")
    parser.add_argument(
        "--epsilon", metavar="BUDGET", type=_epsilon, help="the budget that bars are drawn against"
    )
    parser.add_argument(
        "--delta", metavar="D", type=_delta,
        help="compute at this delta (default: the newest charge's)",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help=f"more than the newest {MAX_RUNS} runs")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument("--csv", action="store_true", help="print a line of CSV for each row")


def _epsilon(text: str) -> float:
    return _number(text, math.inf, "a number above 0")


def _delta(text: str) -> float:
    return _number(text, 1.0, "a number between 0 and 1")


def _number(text: str, below: float, wanted: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < below:
        raise ArgumentTypeError(f"must be {wanted}, got {text[:40]!r}")
    return number


def run(arguments: Namespace) -> int:
    """Print a home's ledger, once its chain is verified.

    Raises:
        UsageError: 102, ``--study`` was never charged.
        DeployError: 901, the home has no ledger and never had one.
        SiteError: 428, the ledger cannot be relied on.
    """
    import json
    import sys

    from fedge.shared.errors import UsageError
    from fedge.shared.privacy.ledger.ledger import FILE, Ledger

    path: Path = arguments.home / FILE
    # One reading for everything, so that a charge in between cannot make the parts differ.
    entries = Ledger(path).entries()
    charged = sorted({entry.charge.study for entry in entries})
    if arguments.study is not None and arguments.study not in charged:
        wanted = ", ".join(charged) or "none, as nothing was charged"
        raise UsageError(102, f"--study: must be one of {wanted}; got {arguments.study!r}")
    studies = _studies(entries, arguments)
    report = {
        "ledger": str(path),
        "charges": len(entries),
        "head": entries[-1].hash if entries else None,
        "verified": True,
        "studies": studies,
    }
    if arguments.csv:
        text = _csv(studies)
    elif arguments.json:
        text = json.dumps(_finite(report))
    else:
        text = _text(report)
    sys.stdout.write(text + "\n")
    return 0


def _studies(entries: Sequence[Entry], arguments: Namespace) -> list[dict[str, Any]]:
    groups: dict[tuple[str, str], list[Entry]] = {}
    by_study: dict[str, list[Entry]] = {}
    for entry in entries:
        by_study.setdefault(entry.charge.study, []).append(entry)
        groups.setdefault((entry.charge.study, entry.charge.unit), []).append(entry)
    max_runs = math.inf if arguments.all else MAX_RUNS
    return [
        _study(group, by_study[study], arguments.delta, arguments.epsilon, max_runs)
        for (study, unit), group in sorted(groups.items())
        if arguments.study in (None, study) and arguments.unit in (None, unit)
    ]


def _study(
    entries: Sequence[Entry],
    of_study: Sequence[Entry],
    delta: float | None,
    budget: float | None,
    max_runs: float,
) -> dict[str, Any]:
    """A privacy budget account (study) and unit as plain values.

    Args:
        entries: its charges, the oldest first; at least one.
        of_study: the charges of the study for either unit, the oldest first.
        delta: at which epsilon is computed; the newest entry's where None.
        budget: epsilon.
        max_runs: the number of runs to give, the newest ones.
    """
    from fedge.shared.privacy.accounting.adversaries import of_entries

    unit = entries[-1].charge.unit
    delta = entries[-1].epsilon_delta if delta is None else delta
    places: dict[str, dict[str, list[int]]] = {}
    for i, entry in enumerate(entries):
        charge = entry.charge
        places.setdefault(charge.run_id, {}).setdefault(charge.purpose, []).append(i)
    # Training and evaluation have noise of their own, so that one row could not tell of both.
    in_order = sorted(
        (sorted(purposes.values(), key=_last) for purposes in places.values()),
        key=lambda rows: _last(rows[-1]),
    )
    shown = in_order[-int(min(max_runs, len(in_order))) :]
    consumers, server = of_entries(of_study, unit, delta)
    return {
        "study": entries[-1].charge.study,
        "unit": unit,
        "delta": delta,
        "budget": budget,
        "epsilon_consumers": consumers,
        "epsilon_server": server,
        "charges": len(entries),
        "digest": entries[-1].hash,
        "runs_left_out": len(in_order) - len(shown),
        "runs": [
            _run(
                [entries[i] for i in where],
                of_entries([e for e in of_study if e.id <= entries[where[-1]].id], unit, delta),
            )
            for rows in shown
            for where in rows
        ],
    }


def _last(where: Sequence[int]) -> int:
    return where[-1]


def _run(entries: Sequence[Entry], after: tuple[float, float]) -> dict[str, Any]:
    charges = [entry.charge for entry in entries]
    rounds = [charge.server_round for charge in charges]
    return {
        "run_id": charges[0].run_id,
        "purpose": charges[0].purpose,
        "first_round": min(rounds),
        "last_round": max(rounds),
        "mechanism": _one([charge.mechanism for charge in charges]),
        "noise_multiplier": _one([charge.release.noise_multiplier for charge in charges]),
        "sampling_rate": _one([charge.release.sampling_rate for charge in charges]),
        "charges": len(charges),
        "epsilon_consumers": after[0],
        "epsilon_server": after[1],
    }


def _one(values: Sequence[Any]) -> Any:
    """The value that they all have, or a word that says that they differ."""
    return values[0] if len(set(values)) == 1 else _SEVERAL


def _finite(value: Any) -> Any:
    """JSON has no infinity; a text takes its place."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _csv(studies: Sequence[Mapping[str, Any]]) -> str:
    import csv
    import io

    file = io.StringIO()
    names = ["study", "unit", "delta", "run_id", "purpose", "first_round", "last_round"]
    names += list(_COLUMNS)[3:]
    writer = csv.DictWriter(file, names, lineterminator="\n")
    writer.writeheader()
    for study in studies:
        for row in study["runs"]:
            cells = {**row, **{name: study[name] for name in ("study", "unit", "delta")}}
            writer.writerow({name: _cell(value) for name, value in cells.items()})
    return file.getvalue().rstrip("\n")


def _cell(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value


def _text(report: Mapping[str, Any]) -> str:
    lines = [line for study in report["studies"] for line in (*_heading(study), *_table(study), "")]
    if not report["studies"]:
        lines = ["nothing was charged", ""]
    count = report["charges"]
    ending = f"head {report['head']}, " if count else ""
    lines.append(f"chain of {count} charge{'' if count == 1 else 's'}: {ending}verified")
    return "\n".join(lines)


def _heading(study: Mapping[str, Any]) -> list[str]:
    lines = [f"study {study['study']}, unit {study['unit']}, delta {study['delta']:g}"]
    for reader in ("consumers", "server"):
        epsilon, budget = study[f"epsilon_{reader}"], study["budget"]
        bar = "" if budget is None else f"{_bar(epsilon / budget)}  "
        share = "" if budget is None else f" of {budget:g} ({_percent(epsilon / budget)})"
        lines.append(f"  {reader:9}  {bar}epsilon {epsilon:.4f}{share}")
    return [*lines, ""]


def _bar(share: float) -> str:
    # Only a budget that is spent to the end may look so.
    full = BAR_WIDTH if share >= 1 else min(BAR_WIDTH - 1, round(share * BAR_WIDTH))
    return "█" * full + "░" * (BAR_WIDTH - full)


def _percent(share: float) -> str:
    return f"{math.ceil(100 * share)} %" if math.isfinite(share) else "without bound"


def _table(study: Mapping[str, Any]) -> list[str]:
    rows = [list(_COLUMNS.values()), *(_cells(row) for row in study["runs"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    left_out = study["runs_left_out"]
    lines = [f"  … {left_out} older run{'s' if left_out > 1 else ''}; --all shows all"] * bool(
        left_out
    )
    for row in rows:
        cells = [
            f"{cell:<{width}}" if name in _TEXTS else f"{cell:>{width}}"
            for name, cell, width in zip(_COLUMNS, row, widths, strict=True)
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    # The heading stays on top, whatever was left out.
    return [lines.pop(bool(left_out)), *lines]


def _cells(row: Mapping[str, Any]) -> list[str]:
    first, last = row["first_round"], row["last_round"]
    values_by_name = {
        **row,
        "run_id": _cut(row["run_id"]),
        "mechanism": _cut(row["mechanism"]),
        "rounds": f"{first}" if first == last else f"{first}–{last}",
    }
    return [
        f"{values_by_name[name]:.4f}"
        if name.startswith("epsilon")
        else _plain(values_by_name[name])
        for name in _COLUMNS
    ]


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cut(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else name[: NAME_WIDTH - 1] + "…"
