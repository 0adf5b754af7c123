"""A soak's table outlives whatever a row does."""

import importlib.util
import json
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def soak(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("soak", ROOT / "benchmarks" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "soak", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "soak.json")
    return module


def test_a_row_ends_at_its_first_failure_and_bytes_of_no_text_are_shown(soak, capfd):
    row = soak.Row("some", [["true"], ["printf", r"\xff said\n"], ["false"], ["touch", "/nowhere"]])
    soak.play(row)
    assert row.outcome == "failed"
    row = soak.Row("some", [["printf", r"\xff said\n"]])
    soak.play(row)
    assert (row.outcome, row.said) == ("passed", "� said")
    assert capfd.readouterr().out == ""


@pytest.mark.slow
def test_a_row_that_hangs_is_ended_with_what_it_started(soak, tmp_path):
    pid = tmp_path / "pid"
    command = ["sh", "-c", f"sleep 600 & echo $! > {pid}; echo begun; wait"]
    status, lines = soak.run(command, 5.0)
    assert (status, lines) == (1, ["begun", "not within 5 s"])
    until = time.monotonic() + 60
    while Path(f"/proc/{pid.read_text().strip()}").exists():
        assert time.monotonic() < until
        time.sleep(0.02)


def test_the_age_of_the_results_is_reported(soak):
    assert soak.age() == "soak: has not run here yet; `make soak`"
    rows = [soak.Row("a", [], outcome="passed"), soak.Row("b", [], "there is no b")]
    soak.write(rows, datetime.now(UTC) - timedelta(days=3))
    assert soak.age().startswith("soak: 3 days ago, of commit ")
    assert soak.age().endswith(": 1 passed, 1 not run")
    found = json.loads(soak.RESULTS.read_text())
    assert found["passed"] is False
    assert [row["name"] for row in found["rows"]] == ["a", "b"]
