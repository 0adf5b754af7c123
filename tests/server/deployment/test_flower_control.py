"""The operator's calls to Flower, with real processes that answer as ``flwr`` does, or do not."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedge.server.deployment import flower_control
from fedge.server.deployment.flower_control import Control, flower_environment, write_connection
from fedge.shared.daemon.supervisor import Supervisor

Answer = tuple[dict[str, Any] | None, str]


@pytest.fixture
def supervisor(tmp_path: Path) -> Supervisor:
    return Supervisor(tmp_path)


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int | None]], None]:
    """What ``flwr`` does instead, in a real fork."""

    def install(work: Callable[[list[str]], int | None]) -> None:
        def script(name: str, arguments: list[str]) -> Callable[[], int | None]:
            assert name == "flwr"
            return lambda: work(arguments)

        monkeypatch.setattr(flower_control, "script", script)

    return install


def until(supervisor: Supervisor, done: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds

    def tick() -> None:
        if done() or time.monotonic() > deadline:
            supervisor.stop()

    supervisor.ticks.append(tick)
    supervisor.run()
    assert done()


def write(text: str) -> Callable[[list[str]], int | None]:
    def work(_arguments: list[str]) -> int | None:
        sys.stdout.write(text)
        return None

    return work


def ask(supervisor: Supervisor, *calls: list[str]) -> list[Answer]:
    found: list[Answer] = []
    calling = Control(supervisor, {})
    for call in calls:
        calling.call(call, lambda answer, said: found.append((answer, said)))
    assert not calling.idle
    until(supervisor, lambda: len(found) == len(calls))
    assert calling.idle
    return found


def test_an_answer_is_found_between_log_lines(supervisor: Supervisor, says: Any) -> None:
    says(write('INFO {not json}\nLoaded\n{"success": true,\n "run-id": 7}\nINFO: {"later": 1}\n'))
    ((answer, said),) = ask(supervisor, ["run", "app"])
    assert answer == {"success": True, "run-id": 7}
    assert said == ""


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("no answer at all", "no answer at all"),
        ("", ""),
        ('{"success": false, "error-message": "key in use"}', "key in use"),
        ("{" * 3000, "{{{"),
        ('{"a": ' * 3000, '"a"'),
        ("[1, 2]", "[1, 2]"),
    ],
)
def test_what_is_no_success(supervisor: Supervisor, says: Any, text: str, part: str) -> None:
    says(write(text))
    ((answer, said),) = ask(supervisor, ["run", "app"])
    assert answer is None
    assert part in said
    assert len(said) <= 300


def test_a_command_that_fails_is_none_whatever_it_printed(
    supervisor: Supervisor, says: Any
) -> None:
    def work(_arguments: list[str]) -> int:
        sys.stdout.write('{"success": true}')
        return 3

    says(work)
    ((answer, said),) = ask(supervisor, ["run", "app"])
    assert answer is None
    assert "success" in said


@pytest.mark.slow
def test_calls_come_one_after_the_other_in_order(supervisor: Supervisor, says: Any) -> None:
    log = supervisor.home / "order"

    def work(arguments: list[str]) -> None:
        with log.open("a") as file:
            file.write(f"begin {arguments[0]}\n")
            file.flush()
            time.sleep(0.1)
            file.write(f"end {arguments[0]}\n")
        sys.stdout.write('{"success": true}')

    says(work)
    found = ask(supervisor, ["one"], ["two"], ["three"])
    assert [answer for answer, _ in found] == [{"success": True}] * 3
    expected = [f"{what} {n}" for n in ("one", "two", "three") for what in ("begin", "end")]
    assert log.read_text().splitlines() == expected


def test_a_call_may_be_made_from_an_answer(supervisor: Supervisor, says: Any) -> None:
    says(write('{"success": true}'))
    calling, found = Control(supervisor, {}), list[str]()

    def again(_answer: Any, _said: str) -> None:
        found.append("first")
        calling.call(["two"], lambda *_: found.append("second"))

    calling.call(["one"], again)
    until(supervisor, lambda: found == ["first", "second"])


@pytest.mark.slow
def test_one_that_hangs_is_ended_and_the_next_is_made(
    supervisor: Supervisor, says: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flower_control, "DEADLINE", 0.3)

    def work(arguments: list[str]) -> None:
        if arguments[0] == "hang":
            sys.stdout.write('{"success": true}')
            sys.stdout.flush()
            time.sleep(60)
        sys.stdout.write('{"success": true}')

    says(work)
    found: list[Answer] = []

    def hangs(answer: dict[str, Any] | None, said: str) -> None:
        found.append((answer, said))
        monkeypatch.setattr(flower_control, "DEADLINE", 60.0)

    calling = Control(supervisor, {})
    calling.call(["hang"], hangs)
    calling.call(["work"], lambda answer, said: found.append((answer, said)))
    until(supervisor, lambda: len(found) == 2)
    assert [answer for answer, _ in found] == [None, {"success": True}]


def test_a_command_gets_the_environment_and_json(supervisor: Supervisor, says: Any) -> None:
    def work(arguments: list[str]) -> None:
        assert arguments == ["supernode", "list", "local", "--format", "json"]
        sys.stdout.write(
            f'{{"home": "{os.environ["FLWR_HOME"]}", "c": "{os.environ["NO_COLOR"]}"}}'
        )

    says(work)
    found: list[Answer] = []
    calling = Control(supervisor, {"FLWR_HOME": "/somewhere"})
    calling.call(["supernode", "list", "local"], lambda a, s: found.append((a, s)))
    until(supervisor, lambda: bool(found))
    assert found[0][0] == {"home": "/somewhere", "c": "1"}


def test_flowers_own_command_that_reaches_nobody_fails_in_time(
    supervisor: Supervisor, tmp_path: Path
) -> None:
    """The real ``flwr``, and no SuperLink."""
    ca = tmp_path / "ca.crt"
    ca.write_text("")
    write_connection(tmp_path / "flower", 9, ca)
    found: list[Answer] = []
    calling = Control(supervisor, flower_environment(tmp_path))
    calling.call(
        ["supernode", "list", flower_control.CONNECTION], lambda a, s: found.append((a, s))
    )
    until(supervisor, lambda: bool(found))
    assert found[0][0] is None
    assert found[0][1]


def test_the_connection_names_any_path(tmp_path: Path) -> None:
    import tomllib

    ca = tmp_path / 'a "quoted" \\ name' / "ca.crt"
    write_connection(tmp_path / "flower", 8443, ca)
    path = tmp_path / "flower" / "config.toml"
    found = tomllib.loads(path.read_text())["superlink"]
    assert found["default"] == flower_control.CONNECTION
    assert found[flower_control.CONNECTION] == {
        "address": "127.0.0.1:8443",
        "root-certificates": str(ca),
    }
    assert stat.S_ISREG(path.stat().st_mode)
