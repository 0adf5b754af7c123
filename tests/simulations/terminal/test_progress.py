"""What is printed while a run goes on."""

from __future__ import annotations

import io
import os
import re
import select
import sys

import pytest

from fedge.simulations.terminal.progress import Progress

from ..shown import line


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")


def run(rounds: int, *, quiet: bool = False, done: int = 0) -> list[str]:
    out = io.StringIO()
    with Progress(quiet=quiet, file=out) as progress:
        progress.start(rounds, done)
        for number in range(done + 1, rounds + 1):
            for i in range(1, 9):
                progress.site(number, f"site-{i}", i, 8)
            progress.round(line(number))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("rounds", [1, 3, 12, 100, 257])
def test_few_plain_lines_where_there_is_no_terminal(rounds: int) -> None:
    printed = run(rounds)
    assert 1 <= len(printed) <= min(rounds, 5)
    assert printed[-1].startswith(f"round {rounds}/{rounds}")
    assert not any("\x1b" in p for p in printed)


def test_a_resumed_run_goes_on_where_it_was() -> None:
    printed = run(10, done=8)
    assert [p.split()[1] for p in printed] == ["9/10", "10/10"]


def test_quiet_prints_nothing() -> None:
    assert run(12, quiet=True) == []


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_gets_one_bar() -> None:
    reader, writer = os.openpty()
    with os.fdopen(writer, "w") as terminal:
        with Progress(file=terminal) as progress:
            progress.start(2)
            progress.site(1, "site-1", 1, 8)
            progress.round(line(1))
            progress.round(line(2, rejected=[{"site": "[red]x[/red]", "outcome": "late"}]))
        terminal.write("<end>")
        terminal.flush()
        shown = b""
        while not shown.endswith(b"<end>"):
            assert select.select([reader], [], [], 60)[0]
            shown += os.read(reader, 65_536)
    os.close(reader)
    text = shown.decode()
    assert "round 2/2" in text
    assert "56.0 %" in text
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert plain.count("\n") <= 2  # the bar is one line, drawn over


def test_the_bar_stops_where_the_run_fails() -> None:
    out = io.StringIO()
    with pytest.raises(RuntimeError), Progress(file=out, terminal=True) as progress:
        progress.start(3)
        raise RuntimeError
    assert out.getvalue().count("\x1b[?25h") == 1  # the cursor is back


def test_waiting_and_disconnected_sites_are_shown_in_plain_lines() -> None:
    out = io.StringIO()
    with Progress(file=out, terminal=False) as progress:
        progress.waiting(0, "connect", [], 12.0)
        progress.start(4)
        progress.sent(2, 1, 3, 10**7)
        progress.waiting(2, "train", ["site-3", "site-4"], 30.0)
        progress.waiting(2, "superlink", ["site-3"], 40.0)
        progress.disconnected(2, "si\x1bte-3", 65.0)
        progress.reconnected(2, "site-3", 90.0)
    assert out.getvalue().splitlines() == [
        "start  waiting for sites to connect (0:12)",
        "round 2/4  waiting for site-3 and 1 more (0:30)",
        "round 2/4  waiting for the SuperLink (0:40)",
        "round 2/4  si?te-3 is not connected",
        "round 2/4  site-3 is back after 1:30",
    ]
