"""A bad line between one site and the server: is there always progress, or an error in words?

Every case starts a server and two sites as an operator would (TLS, daemons, workers) with a proxy between the server
and the second site, plays some rounds, and looks into the run's files: the longest time without an event, when the loss
of a site was reported, when it was back. Prints a table, writes benchmarks/results/network.json, exits 1 where a run
has no event for 120 s, the loss of a site is reported later than after 75 s, or a run ends otherwise than it must.

    python benchmarks/network.py                   all cases, two at once
    python benchmarks/network.py latency reset     those whose name contains one of these words
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from faults import wide_task
from faults.deployment import LOST, SILENCE, Deployment, Told
from faults.proxy import FaultProxy

RESULTS = Path(__file__).parent / "results" / "network.json"
#: Seconds from the end of a fault until the site's next update; Flower takes a killed node back after a minute.
BACK = 90.0
CONFIG = """
[task]
name = "{task}"
[run]
rounds = {rounds}
evaluate-every = 100000
[data]
partition = "iid"
[sites]
count = 2
[train]
local-steps = 3
[round]
deadline = {deadline}
min-sites = 1
max-skipped = 100000
"""
FAR = "far"


@dataclass
class Scene:
    """A case that runs now."""

    deployment: Deployment
    proxy: FaultProxy
    run: Told

    def trained(self, since: int) -> bool:
        """Whether a round after the first ``since`` holds an update of the site behind the proxy."""
        return any(FAR in line["trained"] for line in self.run.rounds()[since:])


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        name: in the table.
        line: settings of the proxy from the start.
        fault: what happens after round 1, giving the time of its beginning; None for a line that is bad throughout.
        end: what ends the fault.
        lasts: seconds between the two.
        takes_part: whether the site must be in every round; false where Flower cannot work over such a line.
        reports_loss: whether the site's loss must be reported.
    """

    name: str
    line: dict[str, float] = field(default_factory=dict)
    fault: Callable[[Scene], float] | None = None
    end: Callable[[Scene], None] = lambda _: None
    lasts: float = 0.0
    task: str = "breast-cancer"
    rounds: int = 2
    deadline: float = 240.0
    takes_part: bool = True
    reports_loss: bool = False


def half_open(scene: Scene) -> float:
    """Bytes vanish both ways, connections stay open."""
    scene.proxy.half_open = True
    return time.time()


def reset_line(scene: Scene) -> None:
    """The line is as before; what lost bytes is cut."""
    scene.proxy.half_open = False
    scene.proxy.reset()


CASES = [
    Case("no fault"),
    Case("latency 2 s", {"latency": 2.0}, rounds=1),
    Case("latency 10 s", {"latency": 10.0}, rounds=1, deadline=90.0, takes_part=False),
    Case("latency 20 s", {"latency": 20.0}, rounds=1, deadline=90.0, takes_part=False),
    Case("30 Mbit/s, 9 MB", {"bandwidth": 30e6}, task="wide"),
    Case("4 Mbit/s, 9 MB", {"bandwidth": 4e6}, task="wide", rounds=1),
    Case("reset every 5 s", {"reset_every": 5.0}, rounds=5),
    Case(
        "half-open, 120 s",
        fault=half_open,
        end=reset_line,
        lasts=120.0,
        deadline=100.0,
        reports_loss=True,
    ),
    Case(
        "host killed, 120 s",
        fault=lambda s: s.deployment.kill_host(FAR),
        end=lambda s: s.deployment.start(FAR),
        lasts=120.0,
        deadline=100.0,
        reports_loss=True,
    ),
]


def play(case: Case, folder: Path) -> dict[str, Any]:
    """Run one case.

    Returns:
        The run's state, rounds with both sites, and the seconds: longest silence, until the loss was reported, until
        the site was back after the fault's end, of the whole run. And what went wrong.
    """
    row: dict[str, Any] = {"case": case.name, "problem": "", "silence_s": 0.0}
    row |= {"seconds": 0.0, "state": "not begun", "rounds": 0, "with_both": 0, "reasons": []}
    try:
        _play(case, folder, row)
    except (
        Exception
    ) as error:  # one case that does not even begin must not cost the others' results
        row["problem"] = f"{type(error).__name__}: {error}"[-3000:]
    return row


def _play(case: Case, folder: Path, row: dict[str, Any]) -> None:
    packages = wide_task.write(folder.with_name(f"{folder.name}-packages"))
    with (
        Deployment(folder, packages) as at,
        FaultProxy(("127.0.0.1", at.port), **case.line) as proxy,
    ):
        at.admit("near", task=case.task)
        at.admit(FAR, dial=proxy.port, task=case.task)
        at.start("server", "near", FAR)
        rounds = 100_000 if case.fault else case.rounds
        text = CONFIG.format(task=case.task, rounds=rounds, deadline=case.deadline)
        run = Told(at.submit(text))
        started = time.time()
        try:
            if case.fault is None:
                at.wait(run.over, 900, "the end of the run")
            else:
                _disturb(case, Scene(at, proxy, run), row)
        except TimeoutError as error:
            row["problem"] = str(error)[-3000:]
        row["seconds"] = round(time.time() - started, 1)
        row["state"] = run.state()
        row["silence_s"] = round(run.longest_silence(), 1)
        row["rounds"] = len(run.rounds())
        row["with_both"] = sum(len(line["trained"]) == 2 for line in run.rounds())
        refused = [r["reason"] for line in run.rounds() for r in run.refused(line, FAR)]
        row["reasons"] = sorted(set(refused))[:5]


def _disturb(case: Case, scene: Scene, row: dict[str, Any]) -> None:
    assert case.fault is not None
    run, at = scene.run, scene.deployment
    at.wait(lambda: scene.trained(0), 240, "round 1")
    since = case.fault(scene)
    at.wait(lambda: run.events("lost", FAR), 120, "the word that the site is lost")
    row["lost_s"] = round(run.events("lost", FAR)[0]["at"] - since, 1)
    time.sleep(max(0.0, since + case.lasts - time.time()))
    before, ended = len(run.rounds()), time.time()
    case.end(scene)
    at.wait(lambda: scene.trained(before), 240, "the site's return")
    row["back_s"] = round(time.time() - ended, 1)


def judge(case: Case, row: dict[str, Any]) -> bool:
    """Whether a case is as it must be; notes it in the row."""
    good = not row["problem"] and row["silence_s"] < SILENCE
    if case.fault is None:
        good = good and row["state"] == "finished"
        good = good and (not case.takes_part or row["with_both"] == case.rounds)
    else:
        good = good and row.get("lost_s", 1e9) <= LOST and row.get("back_s", 1e9) <= BACK
    row["passed"] = good
    return good


def table(rows: list[dict[str, Any]]) -> str:
    """The results as text."""
    lines = [
        f"{'line':20} {'longest silence':>16} {'lost told':>10} {'back after':>11} {'seconds':>8}  rounds with both"
    ]
    for row in rows:
        reported = f"{row['lost_s']:.0f} s" if "lost_s" in row else "-"
        back = f"{row['back_s']:.0f} s" if "back_s" in row else "-"
        mark = "" if row["passed"] else "  MISSED"
        lines.append(
            f"{row['case']:20} {row['silence_s']:>14.0f} s {reported:>10} {back:>11} {row['seconds']:>8.0f}  "
            f"{row['with_both']} of {row['rounds']}{mark}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the names of cases")
    parser.add_argument("--at-once", type=int, default=2, help="cases that run at the same time")
    arguments = parser.parse_args()
    words = arguments.words
    chosen = [c for c in CASES if not words or any(w in c.name for w in words)]
    with (
        tempfile.TemporaryDirectory(prefix="fedge-network-") as name,
        ThreadPoolExecutor(arguments.at_once) as pool,
    ):
        folders = [Path(name) / str(number) for number in range(len(chosen))]
        rows = list(pool.map(play, chosen, folders))
    verdicts = [judge(case, row) for case, row in zip(chosen, rows, strict=True)]
    passed = all(verdicts)
    for row in rows:
        if row["problem"]:
            print(f"{row['case']}: {row['problem']}", file=sys.stderr)
    print(table(rows))
    if not words:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(
            json.dumps({"machine": machine, "passed": passed, "cases": rows}, indent=1) + "\n"
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
