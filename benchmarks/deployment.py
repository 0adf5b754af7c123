"""Seconds a round of trivial training with four sites, and a site's memory: ours beside Flower's own.

    python benchmarks/deployment.py [--rounds N] [--evaluate] [--only flower]

starts one SuperLink, as `fedge server start` does, then Flower's four plain SuperNodes with FedAvg
and a torch client, and when these are stopped four of our sites. Both sides make the same exchanges.
Prints a table, writes benchmarks/results/deployment.json, and exits with 1 where ours is less than
three times as fast.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Beside this file; named here as a test loads this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

import flower_side
import memory

from fedge.shared.daemon import home as homes

RESULTS = Path(__file__).resolve().parent / "results"
SITES = 4
GOAL, MIN_RATIO = 5.0, 3.0
#: Seconds that nothing happens before memory at rest is read.
REST = 5.0

#: fedge's server starts no ServerApp but its own; to compare on one SuperLink, this one starts Flower's too.
OPEN_SERVER = """
import sys
from fedge.server.deployment import run_scheduler as coordinators
from fedge.shared.cli.main import main

own = coordinators.RunScheduler.launch

def launch(self, arguments):
    if any((run.flower_run or run.asked) and not run.pid for run in self._runs.values()):
        return own(self, arguments)
    self._supervisor.task("baseline", coordinators.Program(
        "flwr-serverapp", self._supervisor.log_of("baseline"),
        function=coordinators.script("flwr-serverapp", arguments), environment=self._environment))

coordinators.RunScheduler.launch = launch
sys.exit(main())
"""

Report = Callable[[str], None]


@dataclass(frozen=True)
class Side:
    """Measurements of one side.

    Attributes:
        seconds: of each round, the first included.
        idle: PSS of one site at rest, MiB, by part.
        peak: PSS of one site when it was largest during the run, MiB, by part.
    """

    seconds: list[float]
    idle: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds of the rounds after the first, which also fetches the app."""
        return statistics.median(self.seconds[1:])


def measure_flower(link: flower_side.Link, rounds: int, evaluate: bool, report: Report) -> Side:
    """Flower's own: plain SuperNodes, FedAvg, a torch client, on a SuperLink that runs."""
    nodes = []
    try:
        for number in range(SITES):
            name = f"flower-{number + 1}"
            private, public = flower_side.node_key(link.folder, name)
            link.operate("supernode", "register", str(public), "lab")
            nodes.append(flower_side.start_node(link, name, private))
        waited = flower_side.wait_online(link, SITES)
        report(f"Flower: {SITES} nodes online after {waited:.0f} s")
        time.sleep(REST)
        site = nodes[0].pid
        idle = memory.by_command([site])
        with memory.Peak(lambda: memory.by_command([site])) as peak:
            seconds = flower_side.run_baseline(link, SITES, rounds, evaluate)
        report(f"Flower: {' '.join(f'{s:.1f}' for s in seconds)} s")
        return Side(seconds, idle, peak.largest)
    finally:
        # Ended one by one with SIGTERM, each says good-bye, and the list of nodes is empty at once.
        for node in nodes:
            flower_side.stop(node)


def configuration(rounds: int, evaluate: bool) -> str:
    """Ours, of the same exchanges: one step of SGD, and an evaluation in each round or in the last only."""
    every = 1 if evaluate else rounds
    return f"""\
[task]
name = "breast-cancer"

[run]
rounds = {rounds}
evaluate-every = {every}

[sites]
count = {SITES}

[train]
local-steps = 1
batch-size = 32

[round]
min-sites = {SITES}
deadline = 120.0
"""


def measure_fedge(
    link: flower_side.Link, home: Path, rounds: int, evaluate: bool, report: Report
) -> Side:
    """Ours: four site daemons and a run that the server's daemon plays, on the same SuperLink."""
    # The last round is always evaluated, so where rounds only train it is one more and not counted.
    played = rounds if evaluate else rounds + 1
    path = link.folder / "ours.toml"
    path.write_text(configuration(played, evaluate))
    daemons = []
    try:
        for number in range(SITES):
            name = f"site-{number + 1}"
            site = link.folder / name
            fedge("site", "init", name, "--home", str(site), "--task", "breast-cancer",
                  "--server", link.address, "--ca", str(link.ca))  # fmt: skip
            fedge("server", "admit", name, str(site / "site.pub"), "--home", str(home))
            daemons.append(
                flower_side.start(
                    link.folder, name + "-daemon", "fedge", "site", "start", "--home", str(site)
                )
            )
        waited = flower_side.wait_online(link, SITES)
        report(f"fedge: {SITES} sites online after {waited:.0f} s")
        time.sleep(REST)
        first, root = link.folder / "site-1", daemons[0].pid

        def site_memory() -> dict[str, float]:
            found = (homes.status(first) or {}).get("services", {})
            sizes: dict[str, float] = memory.split(
                root, "worker", found.get("worker", {}).get("pid")
            )
            return sizes

        idle = site_memory()
        with memory.Peak(site_memory) as peak:
            fedge("server", "submit", str(path), "--home", str(home), "--name", "timed")
            seconds = watch_rounds(home / "runs" / "timed" / "rounds.jsonl", played)
        report(f"fedge: {' '.join(f'{s:.1f}' for s in seconds)} s")
        return Side(seconds[:rounds], idle, peak.largest)
    finally:
        for daemon in daemons:
            flower_side.stop(daemon)


def watch_rounds(path: Path, rounds: int) -> list[float]:
    """Each round's seconds, by when its end is in the run directory, as on Flower's side.

    The first round's are the run's own figure, as its beginning is not visible from outside.
    """
    ends: list[float] = []
    lines: list[str] = []
    deadline = time.monotonic() + flower_side.RUN_WITHIN
    while len(ends) < rounds:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{len(ends)} of {rounds} rounds in {path}")
        if path.is_file():
            lines = [
                line for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"
            ]
            ends += [time.monotonic()] * (len(lines) - len(ends))
        time.sleep(0.05)
    first = float(json.loads(lines[0])["seconds"])
    return [first, *(b - a for a, b in itertools.pairwise(ends))]


def fedge(*arguments: str) -> None:
    """Run a command of ours that ends by itself."""
    done = subprocess.run(
        [str(flower_side.BIN / "fedge"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if done.returncode != 0:
        raise RuntimeError(f"fedge {' '.join(arguments[:2])} failed: {done.stderr.strip()}")


def judge(flower: Side, ours: Side | None, exchanges: str) -> dict[str, Any]:
    """Hold the two sides against each other.

    Args:
        flower: Flower's side.
        ours: None where only Flower's was measured.
        exchanges: what a round consists of.

    Returns:
        The table as JSON values; ``passed`` is false where ours is less than ``MIN_RATIO`` times as
        fast, None where it was not measured.
    """
    ratio = flower.median / ours.median if ours else None
    return {
        "table": "deployment",
        "sites": SITES,
        "exchanges": exchanges,
        "sides": {
            name: {"median_seconds": side.median, **asdict(side)}
            for name, side in (("flower", flower), ("fedge", ours))
            if side
        },
        "ratio": ratio,
        "goal": GOAL,
        "least": MIN_RATIO,
        "goal_reached": None if ratio is None else ratio >= GOAL,
        "passed": None if ratio is None else ratio >= MIN_RATIO,
        "load": list(os.getloadavg()),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("fedge", "flwr", "torch")},
    }


def verdict(ratio: float) -> str:
    """The ratio in words, and what it reached."""
    if ratio >= GOAL:
        reached = f"the goal of {GOAL:g} is reached"
    elif ratio >= MIN_RATIO:
        reached = f"the least of {MIN_RATIO:g} is reached, the goal of {GOAL:g} is MISSED"
    else:
        reached = f"the least of {MIN_RATIO:g} is MISSED"
    return f"Ours is {ratio:.1f} times as fast: {reached}"


def table(result: dict[str, Any]) -> str:
    """The table for people."""
    head = ["", "s a round", "rounds", "idle MiB", "peak MiB"]
    lines = [head]
    notes = []
    for name, side in result["sides"].items():
        lines.append(
            [
                name,
                f"{side['median_seconds']:.2f}",
                " ".join(f"{s:.1f}" for s in side["seconds"]),
                f"{sum(side['idle'].values()):.0f}",
                f"{sum(side['peak'].values()):.0f}",
            ]
        )
        for when in ("idle", "peak"):
            parts = ", ".join(f"{part} {mib:.0f}" for part, mib in side[when].items() if mib >= 0.5)
            notes.append(f"{name}, one site {when}, PSS in MiB: {parts}")
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = [f"{result['sites']} sites, {result['exchanges']}, median without the first round"]
    text += [
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    text += notes
    if result["ratio"] is not None:
        text.append(verdict(result["ratio"]))
    return "\n".join(text)


def measure(folder: Path, rounds: int, evaluate: bool, only: str | None, report: Report) -> Any:
    """Both sides on one SuperLink, one after the other.

    Returns:
        As ``judge``.
    """
    home = folder / "server"
    address = f"127.0.0.1:{flower_side.free_port()}"
    fedge("server", "init", "--home", str(home), "--address", address)
    server = flower_side.start(
        folder, "server-daemon", "python", "-c", OPEN_SERVER, "server", "start", "--home", str(home)
    )
    try:
        link = flower_side.Link(address, home / "ca" / "ca.crt", folder)
        flower_side.wait_open(address, server)
        flower = measure_flower(link, rounds, evaluate, report)
        flower_side.wait_online(link, 0)
        ours = None if only else measure_fedge(link, home, rounds, evaluate, report)
    finally:
        flower_side.stop(server)
    return judge(flower, ours, "training and evaluation" if evaluate else "training only")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and return the exit status: 0 passed, 1 missed or failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5, help="of each side, the first not counted")
    parser.add_argument("--evaluate", action="store_true", help="train and evaluate in each round")
    parser.add_argument("--only", choices=["flower"], help="measure Flower's side; no verdict")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds: must be at least 2, got {arguments.rounds}")
    with tempfile.TemporaryDirectory(prefix="fedge-bench-") as folder:
        result = measure(
            Path(folder),
            arguments.rounds,
            arguments.evaluate,
            arguments.only,
            lambda line: print(line, file=sys.stderr, flush=True),
        )
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    if result["passed"] is not None:
        RESULTS.mkdir(exist_ok=True)
        name = "deployment-evaluate.json" if arguments.evaluate else "deployment.json"
        (RESULTS / name).write_text(text)
    print(text if arguments.json else table(result))
    return 1 if result["passed"] is False else 0


if __name__ == "__main__":
    raise SystemExit(main())
