"""The file of events: written, followed from another process, started over, damaged, unwritable."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedge.server.runs import events
from fedge.server.runs.events import EventLog, follow
from fedge.server.runs.listener import NullListener


class Heard(NullListener):
    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, total_rounds: int, done: int = 0) -> None:
        self.calls.append(("start", total_rounds, done))

    def site(self, server_round: int, site: str, done: int, total: int) -> None:
        self.calls.append(("site", server_round, site, done, total))

    def round(self, line: dict[str, Any]) -> None:
        self.calls.append(("round", line))

    def sent(self, server_round: int, done: int, total: int, nbytes: int) -> None:
        self.calls.append(("sent", server_round, done, total, nbytes))

    def waiting(self, server_round: int, phase: str, sites: Any, seconds: float) -> None:
        self.calls.append(("waiting", server_round, phase, list(sites), seconds))

    def disconnected(self, server_round: int, site: str, seconds: float) -> None:
        self.calls.append(("disconnected", server_round, site, seconds))

    def reconnected(self, server_round: int, site: str, seconds: float) -> None:
        self.calls.append(("reconnected", server_round, site, seconds))


EVERY: list[tuple[Any, ...]] = [
    ("start", 3, 1),
    ("sent", 2, 1, 4, 1000),
    ("site", 2, "site-1", 1, 4),
    ("waiting", 2, "train", ["site-2", "site-3"], 10.5),
    ("disconnected", 2, "site-2", 65.0),
    ("reconnected", 2, "site-2", 9.25),
    ("round", {"round": 2, "outcome": "committed"}),
]


def write(log: EventLog, calls: list[tuple[Any, ...]] = EVERY) -> None:
    for name, *values in calls:
        getattr(log, name)(*values)


def heard(path: Path, listener: Heard | None = None) -> list[tuple[Any, ...]]:
    listener = listener or Heard()
    follow(path, listener, lambda: True)
    return listener.calls


def test_what_is_written_is_told_again(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    write(EventLog(path))
    assert heard(path) == EVERY
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["n"] for line in lines] == list(range(1, len(EVERY) + 1))
    names = ["start", "sent", "site", "waiting", "lost", "back", "round"]
    assert [line["event"] for line in lines] == names
    assert all(line["at"].endswith("Z") for line in lines)


def test_a_file_that_is_not_there_yet_grows_and_begins_anew(tmp_path: Path):
    path, listener = tmp_path / "events.jsonl", Heard()
    done = iter(range(100))

    def sleep(seconds: float) -> None:
        match next(done):
            case 0:
                write(EventLog(path))
            case 1:
                with path.open("a") as file:
                    file.write('{"event": "start", "total": 7')
            case 2:
                with path.open("a") as file:
                    file.write(', "done": 0}\n')
            case 3:
                path.unlink()
                EventLog(path).start(9)
            case _:
                stopped.append(True)

    stopped: list[bool] = []
    follow(path, listener, lambda: bool(stopped), sleep)
    assert listener.calls == [*EVERY, ("start", 7, 0), ("start", 9, 0)]


def test_it_begins_anew_beyond_its_bound(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path, limit=2000)
    for i in range(200):
        log.site(1, "site-1", i, 200)
        assert path.stat().st_size <= 2000
    assert heard(path)[-1] == ("site", 1, "site-1", 199, 200)


def test_hostile_lines_are_left_out(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    bad = [
        "[1, 2]", "{", "null", '{"event": "site"}', '{"event": "other"}', "[" * 100_000,
        '{"event": "start", "total": "many", "done": 0}', '{"event": "round", "line": 3}',
        '{"event": "round", "line": {}}', '{"event": "waiting", "round": 1, "phase": "x", "sites": 4, "seconds": 1}',
        '{"event": "start", "total": 1e999, "done": 0}', "x" * 300_000,
    ]  # fmt: skip
    path.write_bytes("\n".join(bad).encode() + b"\n\xff\xfe\n")
    EventLog(path).start(2)
    assert heard(path) == [("start", 2, 0)]


def test_an_endless_line_does_not_fill_the_memory(tmp_path: Path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"x" * (3 * events.MAX_LINE))
    assert heard(path) == []


def test_a_file_that_cannot_be_written_does_not_stop_the_run(tmp_path: Path):
    write(EventLog(tmp_path / "no" / "events.jsonl"))
    (tmp_path / "folder").mkdir()
    write(EventLog(tmp_path / "folder"))
