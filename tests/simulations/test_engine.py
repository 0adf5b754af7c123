"""Whole runs: the same seed gives the same bytes, and a finished run is left alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import builders
import pytest

from fedge.client.relay import message_relay
from fedge.server.runs.journal import Journal
from fedge.shared.config.federation import Config
from fedge.shared.errors import ConfigError, DataError, RunError
from fedge.shared.tasks.registry import get_task
from fedge.shared.wire.tensors import read
from fedge.simulations.engine import simulate

FILES = {
    "config.toml",
    "journal.db",
    "metrics.json",
    "model.safetensors",
    "report.html",
    "rounds.jsonl",
    "run.json",
}


def config(seed: int = 42, strategy: dict[str, Any] | None = None, **of_round: Any) -> Config:
    run, sites = {"rounds": 3, "seed": seed}, {"count": 4}
    return builders.config("breast-cancer", run=run, sites=sites, strategy=strategy, round=of_round)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run."""
    return simulate(config(), tmp_path_factory.mktemp("engine") / "first").path


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def test_everything_is_written(first: Path):
    assert {p.name for p in first.iterdir()} >= FILES
    assert all((first / name).stat().st_size for name in FILES)
    run = json.loads((first / "run.json").read_text())
    assert run["state"] == "finished"
    assert run["rounds_done"] == 3
    assert list(run["sites"]) == ["site-1", "site-2", "site-3", "site-4"]
    assert run["run"] in (first / "report.html").read_text(encoding="utf-8")


def test_rounds_and_metrics_agree(first: Path):
    record = lines(first)
    assert [line["round"] for line in record] == [1, 2, 3]
    for line in record:
        assert line["outcome"] == "committed"
        assert line["invited"] == line["trained"] == ["site-1", "site-2", "site-3", "site-4"]
        assert line["rejected"] == line["dropped"] == []
        assert line["bytes"]["sent"] > 0
    metrics = json.loads((first / "metrics.json").read_text())
    assert metrics["final"] == {
        "round": 3,
        **{k: record[-1]["metrics"][k] for k in ("per_site", "site_mean", "pooled")},
    }
    accuracies = [row["accuracy"] for row in metrics["final"]["per_site"].values()]
    assert metrics["final"]["site_mean"]["accuracy"] == pytest.approx(sum(accuracies) / 4)


def test_the_model_file_holds_tensors_and_nothing_else(first: Path):
    data = (first / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert "__metadata__" not in header
    network = get_task("breast-cancer").network()
    assert set(header) == set(network.state_dict())
    assert {k: tuple(a.shape) for k, a in read(first / "model.safetensors").items()} == {
        k: tuple(t.shape) for k, t in network.state_dict().items()
    }


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(first: Path, tmp_path: Path):
    second = simulate(config(), tmp_path / "second").path
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    volatile = {"seconds"}
    for one, other in zip(lines(first), lines(second), strict=True):
        assert {k: v for k, v in one.items() if k not in volatile} == {
            k: v for k, v in other.items() if k not in volatile
        }
    runs = [json.loads((run / "run.json").read_text())["run"] for run in (first, second)]
    assert runs[0] != runs[1], "each run has its own id"
    other_seed = simulate(config(seed=43), tmp_path / "other").path
    assert (other_seed / "model.safetensors").read_bytes() != (
        first / "model.safetensors"
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [{"name": "FedAvgM", "server-momentum": 0.9}, {"name": "Scaffold"}]
)
def test_strategies_with_memory_are_reproducible_too(strategy: dict[str, Any], tmp_path: Path):
    half = {"fraction-train": 0.5}
    runs = [simulate(config(strategy=strategy, **half), tmp_path / n).path for n in ("a", "b")]
    models = [(run / "model.safetensors").read_bytes() for run in runs]
    assert models[0] == models[1]
    assert [len(line["invited"]) for line in lines(runs[0])] == [2, 2, 2]


def test_a_finished_run_resumed_returns_and_touches_nothing(first: Path):
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*") if p.is_file()}
    assert simulate(config(), first, resume=True).path == first
    # The journal is opened to see that it is finished; its content and everything else stays.
    after = {p: p.stat().st_mtime_ns for p in before}
    changed = {p.name for p in before if before[p] != after[p]}
    assert changed <= {"journal.db", "lock"}
    journal = Journal(first / "journal.db")
    assert len(journal.flower_runs()) == 1
    journal.close()


def test_a_finished_run_is_neither_overwritten_nor_continued_with_other_settings(first: Path):
    with pytest.raises(ConfigError) as refused:
        simulate(config(), first)
    assert refused.value.code == 206
    with pytest.raises(ConfigError) as refused:
        simulate(config(seed=1), first, resume=True)
    assert refused.value.code == 207


def test_resume_of_a_missing_directory_starts(tmp_path: Path, first: Path):
    run = simulate(config(), tmp_path / "new", resume=True).path
    assert (run / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_a_run_that_stops_leaves_no_site_connected(tmp_path: Path):
    with pytest.raises(RunError) as stopped:
        simulate(config(**{"require-sites": ["elsewhere"]}), tmp_path / "run")
    assert stopped.value.code == 502
    assert not message_relay._links


def test_data_that_cannot_be_divided_are_an_error_of_the_data(tmp_path: Path):
    many = builders.config("breast-cancer", sites={"count": 500})
    builders.refused(303, simulate, many, tmp_path / "run")


def test_missing_data_begin_no_directory(tmp_path: Path):
    settings = builders.config("heart", data={"path": str(tmp_path / "no"), "partition": "natural"})
    with pytest.raises(DataError):
        simulate(settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
