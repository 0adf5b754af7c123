"""Supervision with real processes: what dies comes back, what is left over ends."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from fedge.shared.daemon import home as homes
from fedge.shared.daemon import launcher, process
from fedge.shared.daemon.process import Program
from fedge.shared.daemon.supervisor import FIRST_PAUSE, Service, Supervisor, words
from fedge.shared.errors import DeployError


def sleeper(folder: Path, name: str = "sleeper") -> Program:
    return Program(name, folder / f"{name}.log", command=("sleep", "600"))


def run_until(supervisor: Supervisor, done: Callable[[], bool], seconds: float = 300.0) -> None:
    """Run the loop until something is true; the test fails where it never is."""
    deadline = time.monotonic() + seconds
    met: list[bool] = []

    def tick() -> None:
        if done():
            met.append(True)
        if met or time.monotonic() > deadline:
            supervisor.stop()

    supervisor.ticks.append(tick)
    supervisor.run()
    assert met, "what the test waited for did not come"


def alive(pid: int) -> bool:
    return process.birth(pid) is not None


@pytest.mark.slow
def test_a_killed_service_is_started_again_and_ends_with_the_loop(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    service = supervisor.add(Service("one", lambda: sleeper(tmp_path)))
    pids: list[int] = []

    def twice() -> bool:
        if service.pid and service.pid not in pids:
            pids.append(service.pid)
            if len(pids) == 1:
                os.kill(service.pid, signal.SIGKILL)
        return len(pids) == 2

    run_until(supervisor, twice)
    assert service.restarts == 1
    assert service.last_exit == "killed by SIGKILL"
    assert not any(alive(pid) for pid in pids)
    told = homes.status(tmp_path)
    assert told is not None
    assert told["services"]["one"]["state"] == "down"


def test_a_service_waits_until_what_it_needs_is_ready(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    mark = tmp_path / "ready"
    order: list[str] = []

    def started(name: str) -> Program:
        order.append(name)
        return sleeper(tmp_path, name)

    supervisor.add(Service("second", partial(started, "second"), after=("first",)))
    first = supervisor.add(Service("first", partial(started, "first"), ready=mark.exists))

    def both() -> bool:
        if first.pid and not mark.exists():
            assert order == ["first"]
            mark.touch()
        return order == ["first", "second"]

    run_until(supervisor, both)


@pytest.mark.slow
def test_pauses_grow_while_a_service_keeps_dying(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    program = Program("bad", tmp_path / "bad.log", command=("false",))
    service = supervisor.add(Service("bad", lambda: program))
    starts: list[float] = []

    def thrice() -> bool:
        if service.since not in starts and service.since:
            starts.append(service.since)
        return len(starts) >= 4

    run_until(supervisor, thrice)
    gaps = [b - a for a, b in pairwise(starts)]
    # A busy machine makes them longer, never shorter.
    for number, gap in enumerate(gaps):
        assert gap >= FIRST_PAUSE * 2**number
    assert service.pause == FIRST_PAUSE * 2**service.failures
    assert service.last_exit == "exited with 1"


def test_a_forked_function_has_its_own_log_group_and_environment(tmp_path: Path) -> None:
    def work() -> int:
        sys.stdout.write(f"{os.environ['COLOUR']} {os.getpgrp() == os.getpid()}\n")
        return 3

    statuses: list[int] = []
    supervisor = Supervisor(tmp_path)
    program = Program("worker", tmp_path / "w.log", function=work, environment={"COLOUR": "blue"})
    supervisor.task("work", program, statuses.append)
    run_until(supervisor, lambda: bool(statuses))
    assert words(statuses[0]) == "exited with 3"
    assert (tmp_path / "w.log").read_text() == "blue True\n"
    assert "COLOUR" not in os.environ


def test_an_error_of_ours_in_a_fork_is_one_line_of_its_log(tmp_path: Path) -> None:
    def work() -> int:
        raise DeployError(904, "port: must be free, got a used one")

    statuses: list[int] = []
    supervisor = Supervisor(tmp_path)
    supervisor.task("w", Program("w", tmp_path / "w.log", function=work), statuses.append)
    run_until(supervisor, lambda: bool(statuses))
    assert os.WEXITSTATUS(statuses[0]) == 1
    assert (tmp_path / "w.log").read_text().startswith("FE-904 port: must be free")


def test_a_task_past_its_deadline_is_killed(tmp_path: Path) -> None:
    statuses: list[int] = []
    supervisor = Supervisor(tmp_path)
    supervisor.task("slow", sleeper(tmp_path), statuses.append, deadline=0.3)
    run_until(supervisor, lambda: bool(statuses))
    assert words(statuses[0]) == "killed by SIGKILL"


def test_children_do_not_outlive_a_killed_daemon(tmp_path: Path) -> None:
    def daemon() -> int:
        supervisor = Supervisor(tmp_path / "inner")
        supervisor.add(Service("one", lambda: sleeper(tmp_path)))
        supervisor.run()
        return 0

    (tmp_path / "inner").mkdir()
    pid = process.start(Program("daemon", tmp_path / "d.log", function=daemon))
    deadline = time.monotonic() + 120
    child = 0
    while not child and time.monotonic() < deadline:
        found = homes.status(tmp_path / "inner") or {}
        child = found.get("services", {}).get("one", {}).get("pid", 0)
        time.sleep(0.02)
    assert alive(child)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


def test_end_stops_a_daemon_by_its_home_and_no_stranger(tmp_path: Path) -> None:
    def daemon() -> int:
        supervisor = Supervisor(tmp_path)
        supervisor.add(Service("one", lambda: sleeper(tmp_path)))
        supervisor.run()
        return 0

    pid = process.start(Program("daemon", tmp_path / "d.log", function=daemon))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (homes.status(tmp_path) or {}).get("services", {}).get("one", {}).get("pid"):
            break
        time.sleep(0.02)
    stranger = process.start(sleeper(tmp_path, "stranger"))
    status = json.loads((tmp_path / "status.json").read_text())
    # A pid that was given to somebody else since: the birth tells them apart.
    status["tasks"] = [{"name": "old", "pid": stranger, "born": 1}]
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert homes.end(tmp_path) >= 1
    os.waitpid(pid, 0)
    assert alive(stranger)
    os.kill(stranger, signal.SIGKILL)
    os.waitpid(stranger, 0)


@pytest.mark.slow
def test_a_home_has_one_daemon(tmp_path: Path) -> None:
    assert not homes.held(tmp_path)
    with homes.lock(tmp_path):
        assert homes.held(tmp_path)
        with pytest.raises(DeployError, match="must be free") as caught, homes.lock(tmp_path):
            pass
        assert caught.value.code == 902
    assert not homes.held(tmp_path)
    with pytest.raises(DeployError) as missing, homes.lock(tmp_path / "none"):
        pass
    assert missing.value.code == 901


@pytest.mark.parametrize("address", ["", "host", "host:", "host:0", "host:70000", ":80", "a:b"])
def test_addresses_are_host_and_port(address: str) -> None:
    with pytest.raises(DeployError) as caught:
        homes.split_address(address)
    assert caught.value.code == 904


def test_addresses_are_split() -> None:
    assert homes.split_address("fed.example.org:8443") == ("fed.example.org", 8443)
    assert homes.split_address("[::1]:80") == ("::1", 80)


def test_a_launched_command_is_a_fork_of_the_daemon(tmp_path: Path) -> None:
    """The program on PATH hands its arguments to the daemon, however deep and odd the folder is."""
    home = tmp_path / ("deep folder' " * 8).strip()
    home.mkdir()
    asked: list[tuple[str, list[str]]] = []
    supervisor = Supervisor(home)
    folder = launcher.install(
        supervisor, ["flwr-clientapp"], lambda name, arguments: asked.append((name, arguments))
    )
    statuses: list[int] = []
    program = Program(
        "caller",
        tmp_path / "c.log",
        command=("flwr-clientapp", "--token", "a b", "ü"),
        environment={"PATH": launcher.path_with(folder)},
    )
    supervisor.task("caller", program, statuses.append)
    run_until(supervisor, lambda: bool(statuses))
    assert statuses == [0], (tmp_path / "c.log").read_text()
    assert asked == [("flwr-clientapp", ["--token", "a b", "ü"])]


@pytest.mark.parametrize(
    "sent", [b"", b"{}\n", b"[]\n", b'["rm", "-rf"]\n', b"not json\n", b"x" * 70_000]
)
def test_what_is_no_launch_request_starts_nothing(tmp_path: Path, sent: bytes) -> None:
    from fedge.shared.daemon import sockets

    asked: list[object] = []
    supervisor = Supervisor(tmp_path)
    launcher.install(supervisor, ["flwr-clientapp"], lambda *words: asked.append(words))

    def client() -> int:
        with sockets.connect(tmp_path / "launch.sock", 5.0) as connection:
            try:
                connection.sendall(sent)
                connection.shutdown(1)
            except BrokenPipeError:
                return 0
            return 0 if connection.recv(2) != b"ok" else 1

    statuses: list[int] = []
    supervisor.task("client", Program("c", tmp_path / "c.log", function=client), statuses.append)
    run_until(supervisor, lambda: bool(statuses))
    assert not asked
    assert statuses == [0] or os.WIFEXITED(statuses[0])


def test_a_child_whose_log_is_full_does_not_end_its_siblings(tmp_path: Path) -> None:
    """Its last words cannot be written; it must not go on as if it were the daemon, which would end them all."""
    supervisor = Supervisor(tmp_path)
    other = supervisor.add(Service("other", lambda: sleeper(tmp_path)))
    statuses: list[int] = []

    def work() -> int:
        sys.stdout.write("something")
        return 0

    def started() -> bool:
        if other.pid and not supervisor.alive("full") and not statuses:
            program = Program("full", Path("/dev/full"), function=work)
            supervisor.task("full", program, statuses.append)
        return bool(statuses)

    run_until(supervisor, started)
    assert other.restarts == 0


def test_a_step_that_fails_does_not_end_the_daemon(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    calls: list[int] = []

    def broken() -> None:
        calls.append(1)
        raise PermissionError("a folder of somebody else")

    supervisor.ticks.append(broken)
    run_until(supervisor, lambda: len(calls) >= 3)
