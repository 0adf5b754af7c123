"""Processor seconds until a federation's first round, and of small commands: what a start costs, on any machine.

    python benchmarks/startup.py [--against DIR] [--runs N]

runs `fedge up` of examples/digits.toml with four sites until the first line of rounds.jsonl, which the coordinator
writes once round 1 is committed: that round's training and evaluation of four sites are in the figure, and everything
before them. Then `fedge --help`, `fedge simulate` of one round, and `fedge-edge verify`, each from start to end.
Counted are user and system time of all processes, the ended ones too, not the time on the clock, which says more of
what else the machine does. With --against, the same is measured of another checkout, turn by turn, with the same Python
and packages.

Prints the medians and where the seconds of `up` went, writes benchmarks/results/startup.json, and exits with 1 where
`up` takes more than half of the other checkout's.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from edge_process import cpu_name

RESULTS = Path(__file__).resolve().parent / "results"
HERE = Path(__file__).resolve().parents[1]
SITES = 4
#: Most that `up` may take of the other checkout's processor seconds.
GOAL = 0.5
#: Seconds until round 1 after which something is broken, however busy the machine.
WITHIN = 600.0
_TICKS = os.sysconf("SC_CLK_TCK")
_PR_SET_CHILD_SUBREAPER = 36
_EDGE = "import sys; from fedge.edge.cli import main; sys.exit(main())"
_FEDGE = "import sys; from fedge.shared.cli.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Process:
    """The entry of a process in /proc: its parent, its own time, that of children it has waited for, its title."""

    parent: int
    own: float
    ended: float
    title: str


def processes() -> dict[int, Process]:
    """All processes of this machine."""
    by_id = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text(errors="replace").rpartition(")")[2].split()
            title = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        user, system, child_user, child_system = (int(field) / _TICKS for field in fields[11:15])
        by_id[int(path.name)] = Process(
            int(fields[1]), user + system, child_user + child_system, title.strip()
        )
    return by_id


def below(root: int, by_id: dict[int, Process]) -> set[int]:
    """A process and all that descend from it."""
    tree, grown = {root}, True
    while grown:
        new = {pid for pid, process in by_id.items() if process.parent in tree} - tree
        tree, grown = tree | new, bool(new)
    return tree


def kind(title: str) -> str:
    """Role of a process of the federation, by its title."""
    words = title.split()
    if words[:1] == ["fedge"] and len(words) > 1:
        return f"fedge {'site' if words[1].startswith('site-') else words[1]}"
    if "fedge.client.worker.process" in title:
        return "fedge worker"
    if any(word in title for word in (_FEDGE, "import json, os, socket")):
        return "fedge up" if _FEDGE in title else "launcher"
    return Path(words[0]).name + (f" {words[1]}" if words[0] == "flwr" else "") if words else ""


class Side:
    """A checkout that is measured.

    Args:
        checkout: whose .src is imported.
    """

    def __init__(self, checkout: Path) -> None:
        self.environment = {**os.environ, "PYTHONPATH": str(checkout / ".src")}
        self.figures: dict[str, list[float]] = {}
        self.kinds: list[Counter[str]] = []
        output = subprocess.run(
            [sys.executable, "-c", "import fedge.shared as s; print(s.__file__)"],
            env=self.environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        if Path(output.stdout.strip()).resolve().parent != (checkout / "shared").resolve():
            raise ValueError(
                f"{checkout}: must be what Python imports, got {output.stdout.strip()}"
            )

    def command(self, name: str, program: str, *arguments: str) -> None:
        """Measure a command from start to end."""
        child = self._start(program, arguments, subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise RuntimeError(f"{name}: exited with {child.returncode}")
        self.figures.setdefault(name, []).append(used.ru_utime + used.ru_stime)

    def up(self, folder: Path) -> None:
        """Measure a federation until its first round, and end it."""
        out, log = folder / "run", (folder / "up.log").open("w")
        arguments = ["up", "--sites", str(SITES), "--config", str(HERE / "examples/digits.toml")]
        child = self._start(_FEDGE, [*arguments, "--out", str(out)], log)
        seen: dict[int, tuple[str, float]] = {}
        deadline = time.monotonic() + WITHIN
        try:
            while True:
                done = (out / "rounds.jsonl").exists() and (out / "rounds.jsonl").stat().st_size
                running = processes()
                tree = below(os.getpid(), running) - {os.getpid()}
                for pid in tree:
                    # A zombie has its times, and no title any more.
                    name = kind(running[pid].title) or seen.get(pid, ("",))[0]
                    seen[pid] = name or "too short to be seen", running[pid].own
                if done:
                    break
                if child.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((folder / "up.log").read_text()[-2000:])
                time.sleep(0.05)
        finally:
            child.terminate()
            child.wait()
            log.close()
        # What an ended process used is counted by its waiting parent; orphans come to this process, the subreaper.
        total = sum(running[pid].own + running[pid].ended for pid in tree)
        kinds: Counter[str] = Counter()
        for name, own in seen.values():
            kinds[name] += own
        kinds["too short to be seen"] += max(total - sum(kinds.values()), 0.0)
        self.kinds.append(kinds)
        self.figures.setdefault("up", []).append(total)

    def _start(self, program: str, arguments: Sequence[str], output: Any) -> subprocess.Popen[Any]:
        return subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=self.environment, stdout=output, stderr=output,
        )  # fmt: skip

    def result(self) -> dict[str, Any]:
        """The medians, and all figures."""
        names = sorted({name for kinds in self.kinds for name in kinds})
        return {
            "seconds": {name: statistics.median(all_) for name, all_ in self.figures.items()},
            "all": self.figures,
            "up_by_process": {n: statistics.median(k[n] for k in self.kinds) for n in names},
        }


def bundle(folder: Path) -> list[str]:
    """Arguments that verify a signed bundle, which is made here."""
    from edge_model import write

    write(folder)
    return ["verify", str(folder / "model.fedge"), "--trust", str(folder / "key.pub")]


def measure(sides: dict[str, Side], runs: int) -> dict[str, Any]:
    """Every side in turn, as often as is asked."""
    with tempfile.TemporaryDirectory(prefix="fedge-startup-") as name:
        verify = bundle(Path(name))
        for number in range(runs):
            for label, side in sides.items():
                folder = Path(name) / f"{label}-{number}"
                folder.mkdir()
                side.up(folder)
                side.command("--help", _FEDGE, "--help")
                side.command(
                    "simulate", _FEDGE, "simulate", str(HERE / "examples/digits.toml"), "--quiet",
                    "--set", "run.rounds=1", "--out", str(folder / "simulated"),
                )  # fmt: skip
                side.command("fedge-edge verify", _EDGE, *verify)
                print(f"{label}: {side.figures['up'][-1]:.1f} s", file=sys.stderr, flush=True)
    results = {label: side.result() for label, side in sides.items()}
    ratio = None
    if len(results) == 2:
        ratio = results["here"]["seconds"]["up"] / results["against"]["seconds"]["up"]
    return {
        "table": "startup", "sites": SITES, "runs": runs, "sides": results, "ratio": ratio,
        "goal": GOAL, "passed": None if ratio is None else ratio <= GOAL,
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "load": list(os.getloadavg())},
        "versions": {name: version(name) for name in ("fedge", "flwr", "torch")},
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """The table for people."""
    sides = result["sides"]
    lines = [f"{'processor seconds, median':32}" + "".join(f"{label:>10}" for label in sides)]
    for part in ("seconds", "up_by_process"):
        names = {name: None for side in sides.values() for name in side[part]}
        for name in names:
            cells = "".join(f"{side[part].get(name, 0.0):10.2f}" for side in sides.values())
            lines.append(f"{'' if part == 'seconds' else '  of up: '}{name}".ljust(32) + cells)
    if result["ratio"] is not None:
        word = "reached" if result["passed"] else "MISSED"
        lines.append(f"up: {result['ratio']:.2f} of the other's; the goal of {GOAL:g} is {word}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and return the exit status: 0 passed or nothing to compare with, 1 missed or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3, help="of each side (default: 3)")
    parser.add_argument("--against", type=Path, metavar="DIR", help="another checkout of fedge")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args(argv)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sides = {"here": Side(HERE)}
    if arguments.against:
        sides = {"against": Side(arguments.against.resolve()), **sides}
    result = measure(sides, arguments.runs)
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "startup.json").write_text(text)
    print(text if arguments.json else table(result))
    return 1 if result["passed"] is False else 0


if __name__ == "__main__":
    raise SystemExit(main())
