"""Kill -9 everything, once each, in a real federation: does it go on, how soon, and with the same bytes?

Every case starts ``fedge up`` (a SuperLink over TLS, three sites with their daemons and workers), kills one process or
one host at one point of round 2, and waits for the run to end. The final weights must be byte for byte those of
``fedge simulate`` with the same configuration. Prints a table, writes benchmarks/results/chaos.json, exits 1 where a
case ends otherwise or goes on too late.

    python benchmarks/chaos.py                     all cases
    python benchmarks/chaos.py superlink worker    those whose name contains one of these words
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedge.shared.failpoints import COORDINATOR

# Beside this file; named here as a test loads this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from live import WAIT_FACTOR, Live, federation, reference, sha256

RESULTS = Path(__file__).parent / "results" / "chaos.json"
SITES, ROUNDS, KILL_ROUND = 3, 3, 2
VICTIM = "site-2"
#: Seconds from a kill until the run moves on. Flower takes a killed node back once its last heartbeat is 60 s old.
COORDINATOR_LIMIT, NODE_LIMIT = 30.0, 90.0
CONFIG = f"""
[task]
name = "digits"
[run]
rounds = {ROUNDS}
evaluate-every = {ROUNDS}
[sites]
count = {SITES}
[train]
local-steps = 400
batch-size = 32
[strategy]
name = "FedAdam"
[round]
deadline = 300
"""


@dataclass(frozen=True)
class Case:
    """One kill.

    Attributes:
        name: in the table.
        limit: seconds until the run moves on.
        fail_point: of the coordinator, with SERVER for the server's status file; empty where killed from outside.
        moment: true when it is time, given the round of the kill; for a kill from outside.
        victims: whom to kill then.
    """

    name: str
    limit: float
    fail_point: str = ""
    moment: Callable[[Live, int], bool] = lambda _live, _round: False
    victims: Callable[[Live], list[int]] = lambda _: []


def in_round(live: Live, server_round: int) -> bool:
    """Whether the round of the kill is being played."""
    return live.committed() == server_round - 1


def has_taken(live: Live, server_round: int) -> bool:
    """The site's node has started a process for the request."""
    return in_round(live, server_round) and live.pid(VICTIM, "flwr-clientapp") > 0


def is_training(live: Live, server_round: int) -> bool:
    """The site's worker is at it: its processor time grows while a request is there."""
    return has_taken(live, server_round) and _spins(live.pid(VICTIM, "worker"))


def has_answered(live: Live, server_round: int) -> bool:
    """The site's worker has trained, and its node has not sent the reply yet."""
    return (
        in_round(live, server_round)
        and live.text(VICTIM, "worker").count("train: answered") >= server_round
    )


def has_sent(live: Live, server_round: int) -> bool:
    """The site's node has sent the reply."""
    # The registration is a reply too.
    return (
        in_round(live, server_round)
        and live.text(VICTIM, "supernode").count("Sent successfully") > server_round
    )


def is_idle(live: Live, server_round: int) -> bool:
    """The round before is committed, and nothing has reached the site yet."""
    return in_round(live, server_round) and not live.pid(VICTIM, "flwr-clientapp")


def _spins(pid: int) -> bool:
    def ticks() -> int:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return int(text.rpartition(")")[2].split()[11])

    try:
        before = ticks()
        time.sleep(0.1)
        return ticks() - before >= 3
    except OSError:
        return False


def one(service: str, name: str = VICTIM) -> Callable[[Live], list[int]]:
    """One process of a daemon as the victim."""
    return lambda live: [pid for pid in [live.pid(name, service)] if pid]


def cases() -> list[Case]:
    """The matrix of reliability: coordinator and SuperLink at eight points, a site at five, single processes."""
    matrix = []
    for who, victim in (("coordinator", ""), ("superlink", "@SERVER#superlink")):
        for point in COORDINATOR:
            at = ROUNDS if point == "before-export" else KILL_ROUND
            matrix.append(
                Case(f"{who} at {point}", COORDINATOR_LIMIT, fail_point=f"{point}:{at}{victim}")
            )
    for name, moment in (
        ("idle", is_idle),
        ("request taken", has_taken),
        ("training", is_training),
        ("trained", has_answered),
        ("reply sent", has_sent),
    ):
        case = Case(
            f"site, {name}", NODE_LIMIT, moment=moment, victims=lambda live: live.host(VICTIM)
        )
        matrix.append(case)
    matrix += [
        Case("SuperNode, training", NODE_LIMIT, moment=is_training, victims=one("supernode")),
        Case("SuperExec of a site", NODE_LIMIT, moment=is_training, victims=one("superexec")),
        Case("flwr-clientapp", NODE_LIMIT, moment=is_training, victims=one("flwr-clientapp")),
        Case("worker, training", NODE_LIMIT, moment=is_training, victims=one("worker")),
        Case(
            "SuperExec of the server", COORDINATOR_LIMIT,
            moment=is_training, victims=one("superexec", "server"),
        ),
        Case(
            "server's daemon and all of it", COORDINATOR_LIMIT,
            moment=is_training, victims=lambda live: live.host("server"),
        ),
        Case(
            "server's daemon alone", COORDINATOR_LIMIT,
            moment=is_training, victims=one("daemon", "server"),
        ),
        Case("site's daemon alone", NODE_LIMIT, moment=is_training, victims=one("daemon")),
    ]  # fmt: skip
    return matrix


def play(case: Case, config: Path, out: Path) -> dict[str, Any]:
    """Run one case.

    Returns:
        Seconds until the run moved on and until it ended, the model's SHA-256, and what went wrong.
    """
    status = out / "server" / "status.json"
    point = case.fail_point.replace("SERVER", str(status))
    started = time.monotonic()
    row: dict[str, Any] = {"case": case.name, "limit": case.limit, "problem": ""}
    with federation(config, out, point) as live:
        try:
            live.wait(lambda: live.committed() >= 1, 120, "round 1")
            if case.fail_point:
                who = "superlink" if "superlink" in case.fail_point else "coordinator"
                before = live.committed()
                killed = fallen(live, who)
            else:
                killed = strike(live, case, KILL_ROUND)
                before = KILL_ROUND - 1
            live.wait(lambda: live.committed() > before or sha256(out), 300, "the next round")
            row["continues_s"] = round(time.monotonic() - killed, 2)
            live.process.wait(WAIT_FACTOR * 300)
            row["ends_s"] = round(time.monotonic() - started, 1)
            row["status"] = live.process.returncode
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            row["problem"] = str(error)[-2500:]
    row["sha256"] = sha256(out)
    return row


def strike(live: Live, case: Case, server_round: int) -> float:
    """Wait for the moment of a kill from outside in a round, and kill; when that was.

    Raises:
        TimeoutError: it did not come, or no process was there to kill.
    """
    live.wait(lambda: case.moment(live, server_round), 200, "the moment of the kill")
    victims = case.victims(live)
    if not victims:
        raise TimeoutError("no process to kill")
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return time.monotonic()


def fallen(live: Live, who: str) -> float:
    """Wait until the server's daemon says that a process of it fell; when that was."""
    sign = "its coordinator killed by SIGKILL" if who == "coordinator" else "superlink (pid"
    path = live.out / "federation" / "log" / "server.log"

    def reported() -> bool:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        return any(sign in line and "SIGKILL" in line for line in text.splitlines())

    live.wait(reported, 120, f"the kill of the {who}")
    return time.monotonic()


def judge(rows: list[dict[str, Any]], expected: str) -> bool:
    """Mark every case, and say whether all are as they must be."""
    for row in rows:
        row["identical"] = row["sha256"] == expected
        late = row.get("continues_s", 1e9) > row["limit"]
        ended_well = row.get("status") == 0 and not row["problem"]
        row["passed"] = bool(row["identical"] and not late and ended_well)
    return all(row["passed"] for row in rows)


def table(rows: list[dict[str, Any]]) -> str:
    """The results as text."""
    lines = [f"{'killed':32} {'next round after':>16} {'limit':>6} {'whole run':>10}  weights"]
    for row in rows:
        after = f"{row['continues_s']:.1f} s" if "continues_s" in row else "-"
        duration = f"{row['ends_s']:.0f} s" if "ends_s" in row else "-"
        same = "identical" if row.get("identical") else "DIFFER"
        mark = "" if row["passed"] else "  MISSED"
        lines.append(
            f"{row['case']:32} {after:>16} {row['limit']:>4.0f} s {duration:>10}  {same}{mark}"
        )
    return "\n".join(lines)


def main() -> int:
    """Run the cases that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", help="parts of the names of cases")
    parser.add_argument("--list", action="store_true", help="only name the cases")
    arguments = parser.parse_args()
    chosen = [
        c for c in cases() if not arguments.words or any(w in c.name for w in arguments.words)
    ]
    if arguments.list:
        print("\n".join(c.name for c in chosen))
        return 0
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedge-chaos-") as name:
        folder = Path(name)
        config = folder / "config.toml"
        config.write_text(CONFIG)
        expected = reference(config, folder / "simulated")
        for number, case in enumerate(chosen):
            row = play(case, config, folder / f"case-{number}")
            judge([row], expected)
            rows.append(row)
            print(table([row]).splitlines()[1], flush=True)
            if row["problem"]:
                print(row["problem"], file=sys.stderr, flush=True)
    passed = judge(rows, expected)
    print()
    print(table(rows))
    if not arguments.words:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        result = {"machine": machine, "sites": SITES, "rounds": ROUNDS, "model_sha256": expected}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps({**result, "passed": passed, "cases": rows}, indent=1) + "\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
