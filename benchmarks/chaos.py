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
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedge.shared.daemon import home as homes
from fedge.shared.failpoints import COORDINATOR, VARIABLE

RESULTS = Path(__file__).parent / "results" / "chaos.json"
FEDGE = [sys.executable, "-c", "import sys; from fedge.shared.cli import main; sys.exit(main())"]
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


class Live:
    """A federation that runs now.

    Args:
        config: configuration file.
        out: run directory.
        fail_point: for the first coordinator.
    """

    def __init__(self, config: Path, out: Path, fail_point: str = "", *more: str) -> None:
        self.out = out
        self.log = out.with_name(f"{out.name}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [*FEDGE, "up", "--config", str(config), "--out", str(out), *more]
        environment = {**os.environ, VARIABLE: fail_point}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def home(self, name: str) -> Path:
        """Of "server" or a site."""
        return self.out / "server" if name == "server" else self.out / "sites" / name

    def pid(self, name: str, service: str) -> int:
        """Process id of a daemon's service or task, 0 where it does not run."""
        for found, pid, _ in homes.processes(homes.status(self.home(name)) or {}):
            if found == service:
                return pid
        return 0

    def host(self, name: str) -> list[int]:
        """All processes of a daemon, itself first."""
        return [pid for _, pid, _ in homes.processes(homes.status(self.home(name)) or {})]

    def text(self, name: str, log: str) -> str:
        """A log so far."""
        path = self.home(name) / "log" / f"{log}.log"
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    def committed(self) -> int:
        """Rounds in rounds.jsonl."""
        path = self.out / "rounds.jsonl"
        return len(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else 0

    def heard(self) -> int:
        """Replies and rounds that events.jsonl tells of, a number that only grows while one coordinator lives."""
        path = self.out / "events.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return sum('"event": "site"' in line or '"event": "round"' in line for line in lines)

    def wait(self, true: Callable[[], Any], seconds: float, what: str) -> float:
        """Wait until something is true; the seconds that it took.

        Raises:
            TimeoutError: it did not come.
        """
        started = time.monotonic()
        while not true():
            if time.monotonic() - started > seconds:
                raise TimeoutError(f"{what}: not within {seconds:g} s\n{self.tail()}")
            if self.process.poll() is not None and not true():
                raise TimeoutError(
                    f"{what}: fedge up ended with {self.process.returncode}\n{self.tail()}"
                )
            time.sleep(0.02)
        return time.monotonic() - started

    def tail(self) -> str:
        """The end of what ``fedge up`` has said."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:]

    def end(self, seconds: float = 30.0) -> None:
        """SIGTERM, and SIGKILL where that is not enough."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextmanager
def federation(config: Path, out: Path, fail_point: str = "", *more: str) -> Iterator[Live]:
    """A federation that ends with the block."""
    live = Live(config, out, fail_point, *more)
    try:
        yield live
    finally:
        live.end()


@dataclass(frozen=True)
class Case:
    """One kill.

    Attributes:
        name: in the table.
        limit: seconds until the run moves on.
        fail_point: of the coordinator, with SERVER for the server's status file; empty where killed from outside.
        moment: true when it is time, for a kill from outside.
        victims: whom to kill then.
    """

    name: str
    limit: float
    fail_point: str = ""
    moment: Callable[[Live], bool] = lambda _: False
    victims: Callable[[Live], list[int]] = lambda _: []


def in_round(live: Live) -> bool:
    """Whether the round of the kill is being played."""
    return live.committed() == KILL_ROUND - 1


def has_taken(live: Live) -> bool:
    """The site's node has started a process for the request."""
    return in_round(live) and live.pid(VICTIM, "flwr-clientapp") > 0


def is_training(live: Live) -> bool:
    """The site's worker is at it: its processor time grows while a request is there."""
    return has_taken(live) and _spins(live.pid(VICTIM, "worker"))


def has_answered(live: Live) -> bool:
    """The site's worker has trained, and its node has not sent the reply yet."""
    return in_round(live) and live.text(VICTIM, "worker").count("train: answered") >= KILL_ROUND


def has_sent(live: Live) -> bool:
    """The site's node has sent the reply."""
    # The registration is a reply too.
    return in_round(live) and live.text(VICTIM, "supernode").count("Sent successfully") > KILL_ROUND


def is_idle(live: Live) -> bool:
    """The round before is committed, and nothing has reached the site yet."""
    return in_round(live) and not live.pid(VICTIM, "flwr-clientapp")


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
    found = []
    for who, victim in (("coordinator", ""), ("superlink", "@SERVER#superlink")):
        for point in COORDINATOR:
            at = ROUNDS if point == "before-export" else KILL_ROUND
            found.append(
                Case(f"{who} at {point}", COORDINATOR_LIMIT, fail_point=f"{point}:{at}{victim}")
            )
    for name, moment in (
        ("idle", is_idle),
        ("request taken", has_taken),
        ("training", is_training),
        ("trained", has_answered),
        ("reply sent", has_sent),
    ):
        whole = Case(
            f"site, {name}", NODE_LIMIT, moment=moment, victims=lambda live: live.host(VICTIM)
        )
        found.append(whole)
    found += [
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
    return found


def play(case: Case, config: Path, out: Path) -> dict[str, Any]:
    """Run one case.

    Returns:
        Seconds until the run moved on and until it ended, the model's SHA-256, and what went wrong.
    """
    status = out / "server" / "status.json"
    point = case.fail_point.replace("SERVER", str(status))
    started = time.monotonic()
    found: dict[str, Any] = {"case": case.name, "limit": case.limit, "problem": ""}
    with federation(config, out, point) as live:
        try:
            live.wait(lambda: live.committed() >= 1, 120, "round 1")
            if case.fail_point:
                who = "superlink" if "superlink" in case.fail_point else "coordinator"
                before = live.committed()
                killed = _fallen(live, who)
            else:
                live.wait(lambda: case.moment(live), 60, "the moment of the kill")
                before = live.committed()
                victims = case.victims(live)
                if not victims:
                    raise TimeoutError("nobody to kill")
                for pid in victims:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                killed = time.monotonic()
            live.wait(lambda: live.committed() > before or _over(out), 300, "the next round")
            found["continues_s"] = round(time.monotonic() - killed, 2)
            live.process.wait(300)
            found["ends_s"] = round(time.monotonic() - started, 1)
            found["status"] = live.process.returncode
        except (TimeoutError, subprocess.TimeoutExpired) as error:
            found["problem"] = str(error)[-2500:]
    model = out / "model.safetensors"
    found["sha256"] = hashlib.sha256(model.read_bytes()).hexdigest() if model.is_file() else ""
    return found


def _fallen(live: Live, who: str) -> float:
    """Wait until the server's daemon says that a process of it fell; when that was."""
    sign = "its coordinator killed by SIGKILL" if who == "coordinator" else "superlink (pid"
    path = live.out / "federation" / "log" / "server.log"

    def told() -> bool:
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
        return any(sign in line and "SIGKILL" in line for line in text.splitlines())

    live.wait(told, 120, f"the kill of the {who}")
    return time.monotonic()


def _over(out: Path) -> bool:
    return (out / "model.safetensors").is_file()


def reference(config: Path, out: Path) -> str:
    """SHA-256 of the weights that a simulation of the same configuration ends with."""
    command = [*FEDGE, "simulate", str(config), "--out", str(out), "--quiet"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=300)
    return hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()


def judge(found: list[dict[str, Any]], wanted: str) -> bool:
    """Mark every case, and say whether all are as they must be."""
    for row in found:
        row["identical"] = row["sha256"] == wanted
        late = row.get("continues_s", 1e9) > row["limit"]
        ended_well = row.get("status") == 0 and not row["problem"]
        row["passed"] = bool(row["identical"] and not late and ended_well)
    return all(row["passed"] for row in found)


def table(found: list[dict[str, Any]]) -> str:
    """The results as text."""
    lines = [f"{'killed':32} {'next round after':>16} {'limit':>6} {'whole run':>10}  weights"]
    for row in found:
        after = f"{row['continues_s']:.1f} s" if "continues_s" in row else "-"
        whole = f"{row['ends_s']:.0f} s" if "ends_s" in row else "-"
        same = "identical" if row.get("identical") else "DIFFER"
        mark = "" if row["passed"] else "  MISSED"
        lines.append(
            f"{row['case']:32} {after:>16} {row['limit']:>4.0f} s {whole:>10}  {same}{mark}"
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
    found = []
    with tempfile.TemporaryDirectory(prefix="fedge-chaos-") as name:
        folder = Path(name)
        config = folder / "config.toml"
        config.write_text(CONFIG)
        wanted = reference(config, folder / "simulated")
        for number, case in enumerate(chosen):
            row = play(case, config, folder / f"case-{number}")
            judge([row], wanted)
            found.append(row)
            print(table([row]).splitlines()[1], flush=True)
            if row["problem"]:
                print(row["problem"], file=sys.stderr, flush=True)
    passed = judge(found, wanted)
    print()
    print(table(found))
    if not arguments.words:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        result = {"machine": machine, "sites": SITES, "rounds": ROUNDS, "model_sha256": wanted}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(
            json.dumps({**result, "passed": passed, "cases": found}, indent=1) + "\n"
        )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
