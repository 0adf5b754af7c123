"""Everything, also what takes too long for `make test`: each row a command of its own, all of them in one table.

Runs what `make test` runs, the tests marked ``soak`` (networks, hosts, audits at full size, the documents'
federations), the whole matrix of kills, and the unit tests on the other Python. Writes benchmarks/results/soak.json,
exits 1 where a row fails.

    python benchmarks/soak.py                 all rows, about an hour on two cores
    python benchmarks/soak.py chaos audit     those whose name contains one of these words; nothing is written
    python benchmarks/soak.py --age           how old the last results are, in one line
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "soak.json"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
UNIT = "not slow and not realtime and not soak"
#: Seconds that a row may take; a soak that hangs shall still print its table.
LIMIT = 3000
#: Lines of a failed row's output that are printed.
TAIL = 40


@dataclass
class Row:
    """One command.

    Attributes:
        name: in the table.
        commands: run one after the other, to the first that fails.
        why_not: says why it cannot run here; empty where it can.
        seconds: that it took, of wall time.
        outcome: "passed", "failed", "not run".
        said: its last line, or why it was not run.
    """

    name: str
    commands: Sequence[Sequence[str]] = field(repr=False)
    why_not: str = ""
    seconds: float = 0.0
    outcome: str = "not run"
    said: str = ""


def rows() -> list[Row]:
    """The rows to run, in order."""
    status, lines = run([*PYTEST, "--collect-only", "-m", "soak"], LIMIT)
    if status:
        sys.exit("\n".join(lines[-TAIL:]))
    files = dict.fromkeys(line.split("::")[0] for line in lines if "::" in line)
    parallel = ["-n", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    listed = [
        Row("make test, in parallel", [[*PYTEST, *parallel, "-m", "not realtime and not soak"]]),
        Row("make test, realtime", [[*PYTEST, "-m", "realtime and not soak"]]),
    ]
    listed += [Row(file, [[*PYTEST, "-m", "soak", file]]) for file in files]
    return [
        *listed,
        _other_python(),
        Row("benchmarks/chaos.py", [[sys.executable, "benchmarks/chaos.py"]]),
    ]


def _other_python() -> Row:
    """The unit tests on the Python that .venv has not; its environment stays below .bench."""
    version = "3.12" if sys.version_info[:2] == (3, 11) else "3.11"
    name, folder = f"unit tests on Python {version}", ROOT / ".bench" / f"python{version}"
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        return Row(name, [], f"there is no python{version} on PATH")
    own, constraints = str(folder / "bin" / "python"), f"constraints/python{version}.txt"
    pip = [own, "-m", "pip", "install", "--disable-pip-version-check", "-q", "-c", constraints]
    return Row(
        name,
        [
            [python, "-m", "venv", str(folder)],
            [*pip, "setuptools"],
            [*pip, "--no-build-isolation", "-e", ".[dev]"],
            [own, *PYTEST[1:], "-n", "2", "--dist", "loadfile", "-m", UNIT],
        ],
    )


def play(row: Row) -> None:
    """Run a row's commands and fill in what came of them."""
    if row.why_not:
        return
    started, lines = time.monotonic(), [""]
    row.outcome = "passed"
    for command in row.commands:
        status, lines = run(command, max(1.0, LIMIT - (time.monotonic() - started)))
        if status:
            row.outcome = "failed"
            print("\n".join(lines[-TAIL:]), file=sys.stderr, flush=True)
            break
    row.seconds = round(time.monotonic() - started, 1)
    row.said = lines[-1].strip("= ")


def run(command: Sequence[str], seconds: float) -> tuple[int, list[str]]:
    """Run a command, in CI's way: a skipped test fails; its status and what it said, the last line never missing.

    Whatever it has started ends with it, so that no row burdens the next one.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "CI": "true"}, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            status, late = process.wait(seconds), ""
        except subprocess.TimeoutExpired:
            status, late = 1, f"not within {seconds:.0f} s"
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    return status, [*lines, late] if late else lines or [""]


def line_of(row: Row) -> str:
    """A row of the table."""
    return f"{row.name:52} {row.seconds:7.0f} s  {row.outcome:8} {row.said[:60]}"


def age() -> str:
    """When the last soak was, and how it ended, in one line."""
    try:
        result = json.loads(RESULTS.read_text(encoding="utf-8"))
        days = (datetime.now(UTC) - datetime.fromisoformat(result["date"])).days
        ended = [row["outcome"] for row in result["rows"]]
        counts = ", ".join(f"{ended.count(word)} {word}" for word in dict.fromkeys(ended))
        return f"soak: {days} days ago, of commit {result['commit'][:9]}: {counts}"
    except (OSError, ValueError, KeyError, TypeError):
        return "soak: has not run here yet; `make soak`"


def main() -> int:
    """Run the rows that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the names of rows")
    parser.add_argument("--age", action="store_true", help="only tell how old the results are")
    arguments = parser.parse_args()
    if arguments.age:
        print(age())
        return 0
    chosen = [
        row for row in rows() if not arguments.words or any(w in row.name for w in arguments.words)
    ]
    started = datetime.now(UTC)
    for row in chosen:
        row.said = row.why_not or "the soak was ended before"
    for row in chosen:
        print(f"{row.name} ...", flush=True)
        play(row)
        print(line_of(row), flush=True)
        if not arguments.words:
            write(chosen, started)
    print("\n" + "\n".join(line_of(row) for row in chosen))
    return 1 if any(row.outcome == "failed" for row in chosen) else 0


def write(chosen: Sequence[Row], started: datetime) -> None:
    """Write what is known so far: an hour is long enough to be interrupted."""
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    result = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "commit": commit.stdout.strip(),
        "date": started.isoformat(timespec="seconds"),
        "passed": all(row.outcome == "passed" for row in chosen),
        "rows": [
            {k: v for k, v in asdict(row).items() if k not in ("commands", "why_not")}
            for row in chosen
        ],
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
