"""Runs are executed to their end whatever process dies: a real supervisor and children, and a scripted SuperLink.

A child that Flower would start is a fork that does to the run's directory what a coordinator does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedge.server.deployment import run_scheduler
from fedge.server.deployment.flower_control import CONNECTION, Done
from fedge.server.deployment.run_scheduler import MAX_CRASHES, STOP_REQUEST, RunScheduler
from fedge.server.runs.directory import prepare, state_of
from fedge.shared.config.federation import Config
from fedge.shared.daemon.supervisor import Supervisor

Work = Callable[[list[str]], int | None]


class Flower:
    """Answers as the SuperLink does, and asks for a coordinator at the next tick."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.accepts = self.starts = True
        self.answers_late = False
        self.idle = True
        self._starting: list[list[str]] = []
        self._late: list[Callable[[], None]] = []
        self._number = 100

    def call(self, arguments: Sequence[str], done: Done, *, first: bool = False) -> None:
        self.calls.append(list(arguments))
        if arguments[0] != "run":
            done({"success": True}, "")
            return
        if not self.accepts:
            done(None, "no")
            return
        self._number += 1
        answer = {"success": True, "run-id": str(self._number)}
        if self.starts:
            self._starting.append([str(self._number), *arguments])
        if self.answers_late:
            self._late.append(lambda: done(answer, ""))
        else:
            done(answer, "")

    def answer(self) -> None:
        late, self._late = self._late, []
        for done in late:
            done()

    def tick(self, runs: RunScheduler) -> None:
        starting, self._starting = self._starting, []
        for arguments in starting:
            runs.launch(arguments)

    def of(self, kind: str) -> list[list[str]]:
        return [call for call in self.calls if call[0] == kind]


class Server:
    """A daemon that does nothing but play runs."""

    def __init__(self, home: Path, at_once: int = 1) -> None:
        self.home, self.flower = home, Flower()
        (home / "runs").mkdir(exist_ok=True)
        self.supervisor = Supervisor(home)
        self.runs = RunScheduler(
            home,
            self.supervisor,
            self.flower,  # type: ignore[arg-type]
            {"FEDGE_RUNS": str(home / "runs")},
            at_once,
        )
        self.open = True
        self.supervisor.ticks += [
            lambda: self.runs.tick(open_for_runs=self.open),
            lambda: self.flower.tick(self.runs),
        ]

    def submit(self, name: str) -> Path:
        path = self.home / "runs" / name
        config = Config.model_validate({"task": {"name": "digits"}, "sites": {"count": 2}})
        prepare(path, config, resume=False)
        return path

    def until(self, done: Callable[[], Any], seconds: float = 300.0) -> None:
        """Let the daemon work until something is true, then leave it as a crash would find it."""
        deadline = time.monotonic() + seconds
        met: list[bool] = []

        def tick() -> None:
            if done():
                met.append(True)
            if met or time.monotonic() > deadline:
                self.supervisor.stop()

        self.supervisor.ticks.append(tick)
        self.supervisor.run()
        assert met, (self.flower.calls, log_of(self.home))

    @property
    def pids(self) -> dict[str, int]:
        told: dict[str, Any] = self.supervisor.facts.get("runs", {})
        return {name: run["coordinator"] for name, run in told.items()}


def log_of(home: Path) -> str:
    path = home / "log" / "coordinator.log"
    return path.read_text() if path.is_file() else ""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_scheduler, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(run_scheduler, "SCAN_EVERY", 0.02)


@pytest.fixture
def coordinator(monkeypatch: pytest.MonkeyPatch) -> Callable[[Work], None]:
    """What a coordinator does; it is given Flower's number and the words of ``flwr run``."""
    return lambda work: monkeypatch.setattr(run_scheduler, "play", work)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def directory(arguments: list[str]) -> Path:
    """The run directory that the run configuration names."""
    return Path(json.loads(arguments[-1].removeprefix("run-dir=")))


def starts(path: Path) -> list[str]:
    """Flower's numbers of the coordinators that were started in a directory."""
    found = path / "starts"
    return found.read_text().split() if found.is_file() else []


def began(arguments: list[str]) -> Path:
    path = directory(arguments)
    with (path / "starts").open("a") as file:
        file.write(arguments[0] + "\n")
    return path


def play(path: Path, rounds: int, state: str = "running") -> None:
    (path / "run.json").write_text(json.dumps({"rounds_done": rounds, "state": state}))


def finish(path: Path) -> None:
    """As far as the daemon can see: it looks at run.json and into the journal."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(path / "journal.db")) as journal, journal:
        journal.execute("CREATE TABLE IF NOT EXISTS run (finished TEXT)")
        journal.execute("INSERT INTO run VALUES ('now')")
    play(path, 1, "finished")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work_to_the_end(arguments: list[str]) -> None:
    finish(began(arguments))


def wait_for_a_signal(arguments: list[str]) -> None:
    began(arguments)
    time.sleep(60)


def stopped(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "stopped.json").read_text())
    return found


def test_a_run_is_submitted_once_and_ends(server: Server, coordinator: Any) -> None:
    coordinator(work_to_the_end)
    path = server.submit("one")
    server.until(lambda: state_of(path) == "finished" and server.pids == {})
    (call,) = server.flower.of("run")
    assert call[1:3] == [str(server.home / "app"), CONNECTION]
    assert directory(call) == path
    assert starts(path) == ["101"]


def test_a_crash_is_a_new_flower_run_of_the_same_run(server: Server, coordinator: Any) -> None:
    def crashes_once(arguments: list[str]) -> None:
        if starts(began(arguments)) == ["101"]:
            play(directory(arguments), 1)
            die()
        finish(directory(arguments))

    coordinator(crashes_once)
    path = server.submit("one")
    server.until(lambda: state_of(path) == "finished" and server.pids == {})
    first, second = server.flower.of("run")
    assert directory(first) == directory(second) == path
    assert starts(path) == ["101", "102"]
    # What Flower still held of the dead one is told to be over, before the next begins.
    assert [call[0] for call in server.flower.calls[:3]] == ["run", "stop", "run"]
    assert server.flower.calls[1] == ["stop", "101", CONNECTION]


@pytest.mark.slow
def test_crashes_without_progress_stop_the_run(server: Server, coordinator: Any) -> None:
    def crashes(arguments: list[str]) -> None:
        began(arguments)
        die()

    coordinator(crashes)
    path = server.submit("one")
    server.until(lambda: state_of(path) == "stopped" and server.pids == {})
    assert len(starts(path)) == MAX_CRASHES
    assert stopped(path)["code"] == "FE-509"
    assert f"{MAX_CRASHES} crashes" in stopped(path)["message"]
    assert ["stop", str(100 + MAX_CRASHES), CONNECTION] in server.flower.calls


@pytest.mark.slow
def test_a_round_between_crashes_starts_the_count_anew(server: Server, coordinator: Any) -> None:
    """Twice as many crashes as stop a run, but every second of them after another round."""

    def crashes(arguments: list[str]) -> None:
        path = began(arguments)
        count = len(starts(path))
        if count > 2 * MAX_CRASHES:
            finish(path)
            return
        play(path, count // 2)
        die()

    coordinator(crashes)
    path = server.submit("one")
    server.until(lambda: state_of(path) == "finished" and server.pids == {})
    assert len(starts(path)) == 2 * MAX_CRASHES + 1


def test_an_error_of_fedge_stops_the_run_at_once(server: Server, coordinator: Any) -> None:
    def refuses(arguments: list[str]) -> int:
        path = began(arguments)
        (path / "stopped.json").write_text('{"code": "FE-502", "message": "m"}')
        return 1

    coordinator(refuses)
    path = server.submit("one")
    server.until(lambda: bool(starts(path)) and server.pids == {})
    assert len(starts(path)) == 1
    assert stopped(path)["code"] == "FE-502"


@pytest.mark.slow
def test_an_operator_stops_a_run_that_is_under_way(server: Server, coordinator: Any) -> None:
    coordinator(wait_for_a_signal)
    path = server.submit("one")
    server.until(lambda: _stop_when_started(path) and state_of(path) == "stopped")
    assert stopped(path)["code"] == "FE-508"
    assert not (path / STOP_REQUEST).exists()
    assert len(starts(path)) == 1
    assert ["stop", "101", CONNECTION] in server.flower.calls


def _stop_when_started(path: Path) -> bool:
    if starts(path) and not (path / "asked").exists():
        (path / "asked").touch()
        (path / STOP_REQUEST).touch()
    return (path / "asked").exists()


@pytest.mark.slow
def test_a_coordinator_that_ignores_its_end_is_killed(
    server: Server, coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stubborn(arguments: list[str]) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        wait_for_a_signal(arguments)

    monkeypatch.setattr(run_scheduler, "STOPS_WITHIN", 0.3)
    coordinator(stubborn)
    path = server.submit("one")
    server.until(lambda: _stop_when_started(path) and state_of(path) == "stopped")
    assert stopped(path)["code"] == "FE-508"


def test_an_operator_stops_a_run_that_waits(server: Server, coordinator: Any) -> None:
    server.open = False
    path = server.submit("one")
    (path / STOP_REQUEST).touch()
    server.until(lambda: state_of(path) == "stopped")
    assert stopped(path)["code"] == "FE-508"
    assert server.flower.calls == []


def test_a_request_to_stop_what_is_over_changes_nothing(server: Server, coordinator: Any) -> None:
    path = server.submit("one")
    finish(path)
    (path / STOP_REQUEST).touch()
    server.until(lambda: not (path / STOP_REQUEST).exists())
    assert state_of(path) == "finished"
    assert not (path / "stopped.json").exists()


def test_a_run_stopped_while_flower_takes_it_is_taken_back(server: Server) -> None:
    """Between the call and its answer: the Flower run that comes of it must not play a stopped run."""
    server.flower.answers_late, server.flower.starts = True, False
    path = server.submit("one")
    server.until(lambda: server.flower.of("run"))
    again = Server(server.home)
    assert again.flower.calls == []  # nothing was remembered of a run that Flower had not accepted
    again.flower.answers_late, again.flower.starts = True, False

    def asked() -> bool:
        if again.flower.of("run") and state_of(path) == "unfinished":
            (path / STOP_REQUEST).touch()
        return state_of(path) == "stopped"

    again.until(asked)
    again.flower.answer()
    assert again.flower.calls[-1] == ["stop", "101", CONNECTION]
    assert json.loads((server.home / "flower-runs.json").read_text()) == {}


def test_a_coordinator_may_start_before_flower_has_answered(
    server: Server, coordinator: Any
) -> None:
    """``flwr run`` takes longer to end than the next look of the SuperExec: the child is ours all the same."""
    coordinator(wait_for_a_signal)
    server.flower.answers_late = True
    path = server.submit("one")
    pids: list[int] = []

    def started() -> bool:
        if starts(path) and server.pids["one"] and not pids:
            pids.append(server.pids["one"])
            server.flower.answer()
        return bool(pids)

    server.until(started)
    assert pids[0] > 0
    assert json.loads((server.home / "flower-runs.json").read_text()) == {"one": 101}


def test_a_coordinator_that_ends_before_flower_has_answered_is_a_crash_like_others(
    server: Server, coordinator: Any
) -> None:
    def crashes_once(arguments: list[str]) -> None:
        if starts(began(arguments)) == ["101"]:
            die()
        finish(directory(arguments))

    coordinator(crashes_once)
    server.flower.answers_late = True
    path = server.submit("one")

    def done() -> bool:
        if starts(path) and not server.supervisor.alive("coordinator one"):
            server.flower.answers_late = False
            server.flower.answer()
        return state_of(path) == "finished"

    # Far less than a coordinator has to start in.
    server.until(done)
    assert ["stop", "101", CONNECTION] in server.flower.calls


@pytest.mark.slow
def test_a_run_that_flower_accepts_and_never_starts_is_submitted_again(
    server: Server, coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_scheduler, "STARTS_WITHIN", 0.3)
    coordinator(work_to_the_end)
    server.flower.starts = False
    path = server.submit("one")

    def done() -> bool:
        server.flower.starts = len(server.flower.of("run")) >= 2
        return state_of(path) == "finished" and server.pids == {}

    server.until(done)
    assert ["stop", "101", CONNECTION] in server.flower.calls
    assert len(starts(path)) == 1


def test_a_run_that_flower_refuses_is_tried_again(server: Server, coordinator: Any) -> None:
    coordinator(work_to_the_end)
    server.flower.accepts = False
    path = server.submit("one")

    def done() -> bool:
        server.flower.accepts = bool(server.flower.calls)
        return state_of(path) == "finished"

    server.until(done)
    assert len(server.flower.of("run")) == 2


@pytest.mark.slow
def test_no_run_begins_while_the_superlink_is_not_there(server: Server) -> None:
    server.open = False
    server.submit("one")
    seen: list[float] = []
    server.until(lambda: seen.append(0) or len(seen) > 8)
    assert server.flower.calls == []


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 2])
def test_only_so_many_runs_are_played_at_once(
    tmp_path: Path, coordinator: Any, at_once: int
) -> None:
    server = Server(tmp_path, at_once)
    together, seen = set[int](), tmp_path / "seen"

    def works(arguments: list[str]) -> None:
        path = began(arguments)
        # Not before as many as may are there.
        while not seen.exists():
            time.sleep(0.02)
        finish(path)

    coordinator(works)
    paths = [server.submit(name) for name in ("a", "b", "c")]

    def done() -> bool:
        together.add(sum(1 for pid in server.pids.values() if pid))
        if max(together) >= at_once:
            seen.touch()
        return all(state_of(path) == "finished" for path in paths)

    server.until(done)
    assert max(together) == at_once
    assert [starts(path) for path in paths] == [["101"], ["102"], ["103"]]


@pytest.mark.slow
def test_a_daemon_that_comes_back_stops_what_died_with_it_and_goes_on(
    server: Server, coordinator: Any
) -> None:
    coordinator(wait_for_a_signal)
    path = server.submit("one")
    server.until(lambda: starts(path))
    # The end of the daemon ended its coordinator; the run is simply not finished.
    assert state_of(path) == "unfinished"
    coordinator(work_to_the_end)
    again = Server(server.home)
    assert again.flower.calls == [["stop", "101", CONNECTION]]
    again.until(lambda: state_of(path) == "finished")
    assert len(starts(path)) == 2


@pytest.mark.parametrize("text", ["", "[1, 2]", "no JSON", "{", "null"])
def test_a_memory_that_is_damaged_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "flower-runs.json").write_text(text)
    assert Server(tmp_path).flower.calls == []


@pytest.mark.slow
def test_a_coordinator_that_nobody_asked_for_gets_no_run(server: Server, coordinator: Any) -> None:
    """Whoever reaches Flower's Control API can ask for one: it is not started."""
    marks = server.home / "marks"
    coordinator(lambda arguments: marks.write_text(str(arguments)))
    server.open = False
    server.submit("one")
    server.runs.launch(["stranger"])
    until = time.monotonic() + 0.5
    server.until(lambda: time.monotonic() > until)
    assert not marks.exists()
    assert server.pids == {}


@pytest.mark.slow
def test_a_fail_point_kills_once(
    tmp_path: Path, coordinator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDGE_FAIL_POINT", "after-commit")
    server = Server(tmp_path)
    assert "FEDGE_FAIL_POINT" not in os.environ

    def works(arguments: list[str]) -> None:
        path = began(arguments)
        with (path / "points").open("a") as file:
            file.write(os.environ.get("FEDGE_FAIL_POINT", "none") + "\n")
        if len(starts(path)) == 1:
            die()
        finish(path)

    coordinator(works)
    path = server.submit("one")
    server.until(lambda: state_of(path) == "finished")
    assert (path / "points").read_text().split() == ["after-commit", "none"]


def test_what_it_logs_names_the_run(server: Server, coordinator: Any) -> None:
    def says(arguments: list[str]) -> None:
        sys.stdout.write(f"coordinator of {directory(arguments).name}\n")
        finish(directory(arguments))

    coordinator(says)
    path = server.submit("one")
    server.until(lambda: state_of(path) == "finished")
    assert "coordinator of one" in log_of(server.home)
