"""The beginning and the end of a run on disk."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builders import config

from fedge.server.runs import checkpoints, results
from fedge.server.runs.directory import RunDirectory, prepare
from fedge.server.runs.journal import Commit, Journal
from fedge.shared.errors import RunError
from fedge.shared.tasks.registry import get_task
from fedge.shared.wire.tensors import encode, read

CONFIG = config("breast-cancer", run={"rounds": 3})
SITES = {"site-1": (20, 5), "site-2": (30, 7)}


def line(number: int, accuracy: float | None) -> dict[str, Any]:
    metrics: dict[str, Any] = {"train": {"loss": 1.0 / number}}
    if accuracy is not None:
        metrics |= {
            "per_site": {"site-1": {"accuracy": accuracy}, "site-2": {"accuracy": 0.5}},
            "site_mean": {"accuracy": (accuracy + 0.5) / 2},
            "pooled": {"accuracy": 0.6},
        }
    return {
        "round": number,
        "outcome": "committed",
        "reason": None,
        "invited": list(SITES),
        "trained": list(SITES),
        "rejected": [],
        "dropped": [],
        "metrics": metrics,
        "examples": {site: train for site, (train, _) in SITES.items()},
        "seconds": 0.25,
        "bytes": {"sent": 100 * number, "received": 90},
        "model_sha256": "ab" * 32,
    }


LINES = [line(1, 0.7), line(2, 0.9), line(3, None)]


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return prepare(tmp_path / "run", CONFIG, resume=False)[0]


@pytest.fixture
def journal(directory: RunDirectory) -> Iterator[Journal]:
    opened = Journal(directory.journal)
    yield opened
    opened.close()


@pytest.fixture
def played(directory: RunDirectory, journal: Journal) -> Journal:
    """A journal of three committed rounds."""
    results.begin(journal, directory)
    journal.begin_flower_run(77, results.now())
    journal.fix_preprocessing([{"op": "scale", "factor": 0.5}])
    for site, (train, test) in SITES.items():
        journal.add_site(site, train, test)
    journal.commit(Commit(0, "round-000000.safetensors", "00"), {})
    for each in LINES:
        number = each["round"]
        journal.commit(Commit(number, f"round-{number:06d}.safetensors", "00"), each)
    return journal


def arrays() -> dict[str, np.ndarray[Any, Any]]:
    return checkpoints.initial_arrays(get_task("breast-cancer"), 42)


def loaded(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_run_gets_an_id_of_its_own_once(
    directory: RunDirectory, journal: Journal, tmp_path: Path
):
    row = results.begin(journal, directory)
    assert re.fullmatch(r"r-\d{8}-[0-9a-f]{12}", row.id)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row.started)
    assert row.config == directory.config.read_text()
    assert results.begin(journal, directory) == row, "a resumed run keeps it"
    other, _ = prepare(tmp_path / "other", CONFIG, resume=False)
    second = Journal(other.journal)
    assert results.begin(second, other).id != row.id
    second.close()


def test_504_a_journal_without_a_run(journal: Journal):
    with pytest.raises(RunError) as refused:
        results.begun(journal)
    assert refused.value.code == 504


def test_run_json_of_a_run_in_progress(directory: RunDirectory, played: Journal):
    results.write_run(directory, played, CONFIG, {"site-1": 3})
    run = loaded(directory.run)
    assert run["state"] == "running"
    assert (run["rounds"], run["rounds_done"]) == (3, 3)
    assert (run["finished"], run["model_sha256"]) == (None, None)
    assert (run["task"], run["strategy"]) == ("breast-cancer", "FedAvg")
    assert run["sites"] == {
        "site-1": {"train_examples": 20, "test_examples": 5, "rounds": 3},
        "site-2": {"train_examples": 30, "test_examples": 7, "rounds": 0},
    }
    assert run["preprocessing"] == [{"op": "scale", "factor": 0.5}]
    assert run["flower_runs"] == ["77"]
    assert run["run"] == results.begun(played).id


def test_run_json_before_the_first_round(directory: RunDirectory, journal: Journal):
    results.begin(journal, directory)
    results.write_run(directory, journal, CONFIG, {})
    run = loaded(directory.run)
    assert (run["rounds_done"], run["sites"], run["preprocessing"]) == (0, {}, [])


def test_results_are_of_the_last_evaluation_with_totals_of_all_rounds():
    made = results.results("r-1", CONFIG, LINES)
    assert made["final"] == {
        "round": 2,
        "per_site": {"site-1": {"accuracy": 0.9}, "site-2": {"accuracy": 0.5}},
        "site_mean": {"accuracy": 0.7},
        "pooled": {"accuracy": 0.6},
    }
    assert made["bytes"] == {"sent": 600, "received": 270}
    assert made["seconds"] == 0.75
    assert made["rounds"] == 3
    assert (made["run"], made["task"], made["strategy"]) == ("r-1", "breast-cancer", "FedAvg")


def test_results_tell_of_the_noise_on_the_last_evaluation():
    noised = json.loads(json.dumps(LINES))
    for number, told in enumerate(noised):
        if "pooled" in told["metrics"]:
            told["metrics"]["noise"] = {"unit": "site", "pooled": {"accuracy": number / 10}}
    found = results.results("r-1", CONFIG, noised)["final"]["noise"]
    assert found == {"unit": "site", "pooled": {"accuracy": 0.1}}


def test_results_without_an_evaluation():
    final = results.results("r-1", CONFIG, [line(1, None)])["final"]
    assert final == {"round": 0, "per_site": {}, "site_mean": {}, "pooled": {}}


def test_complete_writes_every_file_and_then_declares_the_end(
    directory: RunDirectory, played: Journal
):
    model = arrays()
    results.complete(directory, played, CONFIG, model)
    data = directory.model.read_bytes()
    assert data == encode(model)
    assert {k: a.tobytes() for k, a in read(directory.model).items()} == {
        k: a.tobytes() for k, a in model.items()
    }
    run = loaded(directory.run)
    assert run["state"] == "finished"
    assert run["model_sha256"] == hashlib.sha256(data).hexdigest()
    assert run["finished"] == results.begun(played).finished
    assert loaded(directory.metrics)["final"]["round"] == 2
    lines = [json.loads(text) for text in directory.rounds.read_text().splitlines()]
    assert lines == LINES
    assert "<html" in directory.report.read_text(encoding="utf-8")


def test_a_kill_in_between_is_mended_by_doing_it_again(
    directory: RunDirectory, played: Journal, monkeypatch: pytest.MonkeyPatch
):
    def fail(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(results, "write_report", fail)
        results.complete(directory, played, CONFIG, arrays())
    assert results.begun(played).finished is None, "the declaration comes last"
    first = directory.model.read_bytes()
    directory.append_line({"half": "a line"})
    results.complete(directory, played, CONFIG, arrays())
    assert results.begun(played).finished is not None
    assert directory.model.read_bytes() == first
    assert len(directory.rounds.read_text().splitlines()) == 3
