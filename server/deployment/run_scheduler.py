"""Executes every unfinished run: submits it to Flower, watches its coordinator, continues it after a crash.

A run is a directory below ``runs/``; its journal holds its progress. So no state is kept here: after a
crash of this daemon, or of the machine, the same scan of the directories finds the same work. Flower loses a run with
its ServerApp process, so each continuation is a new Flower run of the same fedge run.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fedge.server.deployment.flower_control import CONNECTION, Control
from fedge.server.runs import results
from fedge.server.runs.directory import RunDirectory, state_of
from fedge.shared.daemon.process import Preloaded, Program, script
from fedge.shared.daemon.supervisor import Supervisor, words
from fedge.shared.errors import RunError
from fedge.shared.flower import app_bundle, patches
from fedge.shared.flower.patches import SERVER_APP

_log = logging.getLogger(__name__)

#: Seconds from Flower's acceptance of a run to the start of its coordinator.
STARTS_WITHIN = 60.0
#: Seconds that a coordinator has to end after an operator's request; a SIGKILL costs it a round at most.
STOPS_WITHIN = 30.0
#: Crashes in a row, without a round between them, after which a run is stopped.
MAX_CRASHES = 5
#: Submissions in a row that Flower may refuse before a run is stopped.
MAX_REFUSALS = 12
FIRST_PAUSE, LAST_PAUSE = 1.0, 30.0
#: Seconds between two scans of the directories.
SCAN_EVERY = 0.5
#: Name of the program that a fork server starts, with Flower's arguments.
COORDINATOR = "coordinator"
#: File by which an operator requests a run's end.
STOP_REQUEST = "stop"


@dataclass
class _Run:
    path: Path
    flower_run: int | None = None
    submitted: float = 0.0
    submitting: bool = False
    pid: int = 0
    crashes: int = 0
    rounds: int = -1
    due: float = 0.0
    # Submissions in a row that Flower refused, or took and did not start.
    refused: int = 0
    # Its coordinator ended before `flwr run` had reported the Flower run's number.
    ended_early: bool = False
    stopping: float | None = None


class RunScheduler:
    """Schedules the runs of one server.

    Args:
        home: of the server.
        supervisor: of its daemon.
        control: of its SuperLink.
        environment: of Flower's processes.
        at_once: largest number of concurrent runs.
        fork_server: socket of a process that forks coordinators; without one each is a fork of the daemon.
    """

    def __init__(
        self,
        home: Path,
        supervisor: Supervisor,
        control: Control,
        environment: Mapping[str, str],
        at_once: int = 1,
        fork_server: Path | None = None,
    ) -> None:
        self._folder, self._supervisor, self._control = home / "runs", supervisor, control
        self._memory = home / "flower-runs.json"
        self._environment, self._at_once = dict(environment), at_once
        self._app = home / "app"
        self._fork_server = fork_server
        self._runs: dict[str, _Run] = {}
        self._given_up: set[str] = set()
        self._next_scan = 0.0
        # A test's fail point kills once, not at every continuation.
        self._fail_point = os.environ.pop("FEDGE_FAIL_POINT", None)
        self._forget_former()

    def tick(self, *, open_for_runs: bool) -> None:
        """Scan the run directories and advance every run; starts none unless ``open_for_runs``."""
        now = time.monotonic()
        if now < self._next_scan:
            return
        self._next_scan = now + SCAN_EVERY
        for path in in_order(self._folder):
            try:
                self._advance(path, now, open_for_runs=open_for_runs)
            except OSError as error:
                # A folder of another user, say: it must not block the others.
                _log.warning("run %s: cannot be scanned: %s", path.name, error)
        self._supervisor.facts["runs"] = {
            name: {"coordinator": run.pid, "crashes": run.crashes}
            for name, run in self._runs.items()
        }

    def launch(self, arguments: list[str]) -> None:
        """Start the coordinator that Flower requests, for the earliest submitted run that has none.

        Args:
            arguments: of ``flwr-serverapp``, as Flower gives them.
        """
        # `flwr run` may end, and report the number, after the SuperExec's next poll.
        waiting = [r for r in self._runs.values() if (r.flower_run or r.submitting) and not r.pid]
        run = min(waiting, key=lambda r: r.submitted, default=None)
        if run is None:
            # Another process of this machine has reached Flower's Control API, which has no authentication.
            _log.error(
                "Flower requests a coordinator of a run that was not submitted here; it is not started"
            )
            return
        environment = dict(self._environment)
        if self._fail_point:
            environment["FEDGE_FAIL_POINT"], self._fail_point = self._fail_point, None
        name = run.path.name
        program = Program(
            f"flwr-serverapp {name}",
            self._supervisor.log_of("coordinator"),
            function=partial(play, arguments),
            environment=environment,
            preloaded=Preloaded(self._fork_server, COORDINATOR, tuple(arguments))
            if self._fork_server
            else None,
        )
        ended = partial(self._ended, run)
        run.pid = self._supervisor.task(f"coordinator {name}", program, ended)

    def _advance(self, path: Path, now: float, *, open_for_runs: bool) -> None:
        state = state_of(path)
        run = self._runs.get(path.name)
        if (path / STOP_REQUEST).exists():
            self._stop(path, run, state)
            return
        if state != "unfinished":
            self._given_up.discard(path.name)
            if run is not None and not run.pid:
                del self._runs[path.name]
            return
        if run is None:
            full = len(self._runs) >= self._at_once
            if not open_for_runs or full or path.name in self._given_up:
                return
            run = self._runs[path.name] = _Run(path)
        if run.pid or now < run.due or not open_for_runs:
            return
        if run.flower_run and now - run.submitted > STARTS_WITHIN:
            self._release(run)
            self._refused(run, "Flower took the run and did not start its coordinator")
            return
        if not run.flower_run and not run.submitting:
            self._submit(run)

    def _submit(self, run: _Run) -> None:
        run.submitting, run.ended_early, run.submitted = True, False, time.monotonic()
        value = json.dumps(str(run.path))

        def done(answer: dict[str, Any] | None, output: str) -> None:
            run.submitting = False
            number = (answer or {}).get("run-id")
            if number is None:
                self._refused(run, output)
                return
            run.refused = 0
            run.flower_run, run.submitted = int(number), time.monotonic()
            _log.info("run %s is Flower's run %d", run.path.name, run.flower_run)
            if run.ended_early or self._runs.get(run.path.name) is not run:
                # It crashed, or its operator stopped it, in the meantime.
                self._release(run)
            self._remember()

        command = ["run", str(self._app), CONNECTION, "--run-config", f"run-dir={value}"]
        self._control.call(command, done, first=True)

    def _refused(self, run: _Run, output: str) -> None:
        run.refused += 1
        run.due = time.monotonic() + min(FIRST_PAUSE * 2**run.refused, LAST_PAUSE)
        _log.error("run %s: could not be submitted: %s", run.path.name, output)
        if run.refused >= MAX_REFUSALS:
            self._give_up(run, f"coordinator: must be started by Flower, got {output[-200:]!r}")

    def _give_up(self, run: _Run, why: str) -> None:
        results.stop(RunDirectory(run.path), RunError(509, why))
        # Where even that cannot be written, the run must not be tried endlessly, nor block others.
        self._given_up.add(run.path.name)
        self._runs.pop(run.path.name, None)

    def _ended(self, run: _Run, status: int) -> None:
        run.pid, run.ended_early = 0, run.submitting
        state = state_of(run.path)
        if state == "finished":
            # Flower's run ends with its ServerApp.
            run.flower_run = None
            self._remember()
            return
        self._release(run)
        if state != "unfinished" or run.stopping is not None:
            return
        rounds = _rounds_done(run.path)
        run.crashes = run.crashes + 1 if rounds == run.rounds else 1
        run.rounds = rounds
        _log.error(
            "run %s: its coordinator %s after round %d; it goes on from there",
            run.path.name,
            words(status),
            max(rounds, 0),
        )
        if run.crashes >= MAX_CRASHES:
            self._give_up(
                run, f"coordinator: must play round {rounds + 1}, got {run.crashes} crashes"
            )
        elif run.crashes > 1:
            run.due = time.monotonic() + min(FIRST_PAUSE * 2**run.crashes, LAST_PAUSE)

    def _release(self, run: _Run) -> None:
        """Have Flower stop its run: the messages that it still holds for the sites are obsolete."""
        if run.flower_run:
            self._control.call(["stop", str(run.flower_run), CONNECTION], lambda *_: None)
        run.flower_run = None
        self._remember()

    def _stop(self, path: Path, run: _Run | None, state: str) -> None:
        if run is not None and run.pid:
            if run.stopping is None:
                run.stopping = time.monotonic()
                self._supervisor.kill(run.pid)
            elif time.monotonic() - run.stopping > STOPS_WITHIN:
                self._supervisor.kill(run.pid, signal.SIGKILL)
            return
        if run is not None:
            self._release(run)
            del self._runs[path.name]
        if state == "unfinished":
            results.stop(
                RunDirectory(path), RunError(508, f"run {path.name}: stopped by its operator")
            )
        (path / STOP_REQUEST).unlink(missing_ok=True)

    def _remember(self) -> None:
        running = {name: run.flower_run for name, run in self._runs.items() if run.flower_run}
        self._memory.write_text(json.dumps(running), encoding="utf-8")

    def _forget_former(self) -> None:
        """Stop the Flower runs of a daemon that died: their coordinators died with it."""
        try:
            former = json.loads(self._memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        for number in former.values() if isinstance(former, dict) else ():
            self._control.call(["stop", str(number), CONNECTION], lambda *_: None)


def in_order(folder: Path) -> list[Path]:
    """The runs of a folder, in the order of their submission."""

    def submitted(path: Path) -> tuple[int, str]:
        try:
            return (path / "config.toml").stat().st_mtime_ns, path.name
        except OSError:
            return 0, path.name

    return sorted(folder.iterdir(), key=submitted) if folder.is_dir() else []


def play(arguments: Sequence[str]) -> int | None:
    """Run ``flwr-serverapp`` in a fork: Flower's own command, but no code that a bundle brings."""
    patches.before_bundle(SERVER_APP, app_bundle.require_ours)
    return script("flwr-serverapp", arguments)()


def _rounds_done(path: Path) -> int:
    try:
        return int(json.loads((path / "run.json").read_text(encoding="utf-8"))["rounds_done"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1
