"""The journal: what was committed survives any end of the process, and damage is reported."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from fedge.server.runs.journal import Commit, Journal
from fedge.shared.errors import RunError

_CHILD = """
import os, signal, sys
from pathlib import Path
from fedge.server.runs.journal import Commit, Journal
journal = Journal(Path(sys.argv[1]))
journal.begin_run("r-1", "[task]", "2026-01-01T00:00:00Z")
for number in range(3):
    journal.commit(Commit(number, f"round-{number}", "ab"), {"round": number})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


def test_a_fresh_journal_holds_nothing(path: Path):
    journal = Journal(path)
    assert journal.run() is None
    assert journal.last() is None
    assert (journal.lines(), journal.sites(), journal.flower_runs()) == ([], {}, [])
    journal.close()


def test_everything_is_there_after_reopening(path: Path):
    journal = Journal(path)
    journal.begin_run("r-1", "[task]\n", "2026-01-01T00:00:00Z")
    journal.begin_flower_run(2**63 + 5, "then")
    journal.begin_flower_run(7, "later")
    journal.add_site("b", 10, 3)
    journal.add_site("a", 20, 4)
    journal.commit(Commit(0, "round-0", "aa"), {})
    journal.commit(Commit(1, "round-1", "bb"), {"round": 1, "metrics": {"train": {"loss": 0.1}}})
    journal.close()

    again = Journal(path)
    row = again.run()
    assert row is not None
    assert (row.id, row.config, row.started) == ("r-1", "[task]\n", "2026-01-01T00:00:00Z")
    assert row.finished is None
    assert row.preprocessing is None
    assert again.flower_runs() == [str(2**63 + 5), "7"]
    assert list(again.sites().items()) == [("a", (20, 4)), ("b", (10, 3))]
    assert again.last() == Commit(1, "round-1", "bb")
    assert again.lines() == [{"round": 1, "metrics": {"train": {"loss": 0.1}}}]
    again.finish("2026-01-02T00:00:00Z")
    again.close()
    third = Journal(path)
    assert third.run().finished == "2026-01-02T00:00:00Z"  # type: ignore[union-attr]
    third.close()


def test_a_commit_outlives_a_kill(path: Path):
    done = subprocess.run([sys.executable, "-c", _CHILD, path], timeout=300)
    assert done.returncode == -signal.SIGKILL
    journal = Journal(path)
    assert journal.last() == Commit(2, "round-2", "ab")
    assert [line["round"] for line in journal.lines()] == [1, 2]
    journal.close()


def test_every_commit_is_synchronised_with_the_disk(path: Path):
    journal = Journal(path)
    assert journal._query("PRAGMA journal_mode") == [("wal",)]
    assert journal._query("PRAGMA synchronous") == [(2,)]  # FULL
    journal.close()


def test_a_round_is_committed_once(path: Path):
    journal = Journal(path)
    journal.commit(Commit(1, "first", "aa"), {"round": 1})
    with pytest.raises(RunError) as refused:
        journal.commit(Commit(1, "second", "bb"), {"round": 1})
    assert refused.value.code == 504
    assert journal.last() == Commit(1, "first", "aa")
    journal.close()


def test_a_line_with_nan_is_refused_and_not_committed(path: Path):
    journal = Journal(path)
    with pytest.raises(ValueError, match="JSON"):
        journal.commit(Commit(1, "first", "aa"), {"loss": float("nan")})
    assert journal.last() is None
    journal.close()


def test_the_first_word_of_a_site_counts(path: Path):
    journal = Journal(path)
    journal.add_site("a", 20, 4)
    journal.add_site("a", 99, 99)
    assert journal.sites() == {"a": (20, 4)}
    journal.close()


def test_preprocessing_is_fixed_once(path: Path):
    journal = Journal(path)
    assert not journal.run_preprocessing_missing(), "there is no run yet"
    journal.begin_run("r-1", "", "then")
    assert journal.run_preprocessing_missing()
    journal.fix_preprocessing([{"op": "scale", "factor": 0.1}])
    assert not journal.run_preprocessing_missing()
    journal.fix_preprocessing([{"op": "scale", "factor": 0.2}])
    assert journal.run().preprocessing == [{"op": "scale", "factor": 0.1}]  # type: ignore[union-attr]
    journal.close()


def test_a_file_that_is_no_journal_is_refused(path: Path):
    path.write_bytes(b"something else altogether" * 100)
    with pytest.raises(RunError, match=r"journal\.db") as refused:
        Journal(path)
    assert refused.value.code == 504


def test_a_folder_is_no_journal(path: Path):
    path.mkdir()
    with pytest.raises(RunError) as refused:
        Journal(path)
    assert refused.value.code == 504


def test_a_damaged_page_is_refused(path: Path):
    journal = Journal(path)
    journal.begin_run("r-1", "", "then")
    for number in range(200):
        journal.commit(Commit(number, "round", "ab"), {"round": number, "text": "x" * 500})
    journal.close()
    data = bytearray(path.read_bytes())
    assert not Path(f"{path}-wal").exists(), "closing folds the WAL in"
    data[4096:] = random.Random(0).randbytes(len(data) - 4096)
    path.write_bytes(bytes(data))
    with pytest.raises(RunError) as refused:
        damaged = Journal(path)
        damaged.lines()
        damaged.run()
    assert refused.value.code == 504


@pytest.mark.parametrize(
    ("sql", "ask"),
    [
        ("UPDATE round SET line = '{\"round\": '", "lines"),
        ("UPDATE run SET preprocessing = '[{'", "run"),
    ],
)
def test_a_damaged_text_is_refused(path: Path, sql: str, ask: str):
    journal = Journal(path)
    journal.begin_run("r-1", "", "then")
    journal.commit(Commit(1, "round", "ab"), {"round": 1})
    journal.close()
    with sqlite3.connect(path) as damage:
        damage.execute(sql)
    damage.close()
    again = Journal(path)
    with pytest.raises(RunError) as refused:
        getattr(again, ask)()
    assert refused.value.code == 504
    again.close()


def test_sites_keep_the_order_in_which_they_came(path: Path):
    journal = Journal(path)
    for name in ("north", "b", "a", "b", "north"):
        journal.add_site(name, 1, 1)
    assert journal.order() == ["north", "b", "a"]
    journal.close()
    again = Journal(path)
    again.add_site("0", 1, 1)
    assert again.order() == ["north", "b", "a", "0"]
    assert list(again.sites()) == ["0", "a", "b", "north"]
    again.close()


def test_a_line_can_be_completed(path: Path):
    journal = Journal(path)
    journal.commit(Commit(0, "round-0", "aa"), {})
    for number in (1, 2):
        journal.commit(Commit(number, f"round-{number}", "bb"), {"round": number})
    journal.amend(1, {"round": 1, "metrics": {}})
    assert journal.lines() == [{"round": 1, "metrics": {}}, {"round": 2}]
    last = journal.last()
    assert last is not None
    assert (last.number, last.checkpoint) == (2, "round-2")
    journal.close()


def test_ranges_are_kept_with_their_line_until_the_calibration_is_whole(path: Path):
    journal = Journal(path)
    journal.commit(Commit(1, "round-1", "aa"), {"round": 1})
    assert journal.ranges() is None
    journal.keep_ranges("first", 1, {"round": 1, "privacy": {}})
    journal.close()
    again = Journal(path)
    assert (again.ranges(), again.calibration()) == ("first", None)
    assert again.lines() == [{"round": 1, "privacy": {}}]
    with pytest.raises(ValueError):
        again.keep_ranges("second", 1, {"loss": float("nan")})
    assert again.ranges() == "first"
    again.calibrate("whole", 1, {"round": 1})
    assert (again.ranges(), again.calibration()) == ("first", "whole")
    again.close()
