"""Forks of another process: started, watched, ended and started again as if they were children of the daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedge.shared.daemon import fork_server, process
from fedge.shared.daemon.process import Preloaded, Program
from fedge.shared.daemon.supervisor import Service, Supervisor, words

SERVER = """
import os, sys, threading, time
from pathlib import Path
from fedge.shared.daemon import fork_server, process, sockets

def sleep(arguments):
    Path(arguments[0]).write_text(os.environ.get("ASKED", "not set"))
    time.sleep(600)

def leave(arguments):
    return int(arguments[0])

os.environ["ASKED"] = "by the server"
if sys.argv[2:] == ["with a thread"]:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
fork_server.serve(sockets.listen(Path(sys.argv[1])), {"sleep": sleep, "leave": leave})
"""


def until(true: Callable[[], object], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "what the test waited for did not come"
        time.sleep(0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    path = tmp_path / "fork.sock"
    with subprocess.Popen([sys.executable, "-c", SERVER, str(path)]) as running:
        until(path.is_socket)
        yield running
        running.kill()


def program(folder: Path, name: str, *arguments: str, **environment: str) -> Program:
    """One that is forked by the server, or else is a ``sleep`` of its own."""
    return Program(
        "fork",
        folder / "fork.log",
        command=("sleep", "600"),
        environment=environment,
        preloaded=Preloaded(folder / "fork.sock", name, arguments),
    )


def asked(folder: Path, name: str, *arguments: str, **environment: str) -> fork_server.Remote:
    found = fork_server.request_fork(program(folder, name, *arguments, **environment))
    assert found is not None
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def status_of(remote: fork_server.Remote) -> int:
    found: list[int] = []

    def ended() -> bool:
        if (status := remote.ended()) is not None:
            found.append(status)
        return bool(found)

    until(ended)
    return found[0]


@pytest.mark.usefixtures("server")
def test_its_exit_status_is_told_and_its_number_stays_taken_until_then(tmp_path: Path) -> None:
    remote = asked(tmp_path, "leave", "7")
    until(lambda: process.birth(remote.pid) is None)
    assert Path(f"/proc/{remote.pid}").exists()
    assert words(status_of(remote)) == "exited with 7"
    until(lambda: not Path(f"/proc/{remote.pid}").exists())


def test_it_is_the_server_s_child_under_the_daemon_s_environment(
    server: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ASKED", raising=False)
    plain, more = tmp_path / "plain", tmp_path / "more"
    first = asked(tmp_path, "sleep", str(plain))
    second = asked(tmp_path, "sleep", str(more), ASKED="by the daemon")
    until(lambda: more.exists() and more.read_text() and plain.exists() and plain.read_text())
    assert (plain.read_text(), more.read_text()) == ("not set", "by the daemon")
    assert parent(first.pid) == server.pid
    assert first.ended() is None
    os.kill(first.pid, signal.SIGKILL)
    assert words(status_of(first)) == "killed by SIGKILL"
    second.close()
    until(lambda: process.birth(second.pid) is None)


@pytest.mark.usefixtures("server")
def test_it_ends_with_the_daemon_that_asked(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    code = f"""
import os, sys
from pathlib import Path
from fedge.shared.daemon import fork_server
from fedge.shared.daemon.process import Preloaded, Program
wanted = Preloaded(Path({str(tmp_path / "fork.sock")!r}), "sleep", ({str(mark)!r},))
remote = fork_server.request_fork(Program("fork", Path({str(tmp_path / "log")!r}), preloaded=wanted))
print(remote.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    pid = int(done.stdout)
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_it_ends_with_the_server_and_the_daemon_is_told(
    server: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    remote = asked(tmp_path, "sleep", str(tmp_path / "mark"))
    server.kill()
    assert words(status_of(remote)) == "killed by SIGTERM"


def test_a_service_is_forked_again_and_where_nobody_forks_it_is_a_program(
    server: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    supervisor = Supervisor(tmp_path)
    service = supervisor.add(
        Service("one", lambda: program(tmp_path, "sleep", str(tmp_path / "mark")))
    )
    parents: list[int] = []
    pids: list[int] = []
    deadline = time.monotonic() + 300.0

    def tick() -> None:
        if service.pid and service.pid not in pids:
            pids.append(service.pid)
            parents.append(parent(service.pid))
            if len(pids) == 1:
                os.kill(service.pid, signal.SIGKILL)
            elif len(pids) == 2:
                server.kill()
        if len(pids) == 3 or time.monotonic() > deadline:
            supervisor.stop()

    supervisor.ticks.append(tick)
    supervisor.run()
    assert parents == [server.pid, server.pid, os.getpid()]
    assert not any(process.birth(pid) for pid in pids)


@pytest.mark.usefixtures("server")
def test_it_ends_with_the_loop(tmp_path: Path) -> None:
    supervisor = Supervisor(tmp_path)
    mark = tmp_path / "mark"
    service = supervisor.add(Service("one", lambda: program(tmp_path, "sleep", str(mark))))
    pids: list[int] = []

    def tick() -> None:
        if mark.exists():
            pids.append(service.pid)
            supervisor.stop()

    supervisor.ticks.append(tick)
    supervisor.run()
    assert process.birth(pids[0]) is None
    assert service.restarts == 0


@pytest.mark.usefixtures("server")
def test_an_unknown_program_is_not_forked_and_the_server_goes_on(tmp_path: Path) -> None:
    assert fork_server.request_fork(program(tmp_path, "nosuch")) is None
    assert words(status_of(asked(tmp_path, "leave", "3"))) == "exited with 3"


def test_a_process_with_a_thread_does_not_serve(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SERVER, str(tmp_path / "fork.sock"), "with a thread"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "threads before a fork: must be 1, got 2" in done.stderr
