"""The round loop's promises: quorum, required sites, skipped rounds, cohorts, quarantine."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedge.client.data.dataset import site_shares
from fedge.client.relay import message_relay
from fedge.server.runs.journal import Journal
from fedge.shared.config.federation import Config
from fedge.shared.errors import ConfigError, RunError
from fedge.shared.files import write_atomically
from fedge.simulations.engine import simulate


def _config(**sections: Any) -> Config:
    return builders.config("breast-cancer", **{"run": {"rounds": 3}, **sections})


def _failing(fails: Callable[[str, int], bool]) -> ClientApp:
    """fedge's relay, where a site raises in the rounds for which ``fails(site, round)``."""
    app = ClientApp()
    app.query("register")(message_relay.forward)
    app.evaluate()(message_relay.forward)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        server_round = int(str(message.content.config_records["config"]["server-round"]))
        if fails(str(context.node_config["site"]), server_round):
            raise RuntimeError("the GPU went away")
        return message_relay.forward(message, context)

    return app


def _lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_round_below_quorum_is_skipped_and_the_next_goes_on(tmp_path: Path) -> None:
    app = _failing(lambda site, r: r == 2 and site != "site-1")
    simulate(_config(), tmp_path, app=app)
    first, second, third = _lines(tmp_path)
    assert [line["outcome"] for line in (first, second, third)] == [
        "committed",
        "skipped",
        "committed",
    ]
    assert second["reason"] == "FE-501 updates: must be at least 2, got 1"
    assert first["model_sha256"] == second["model_sha256"] != third["model_sha256"]
    assert second["trained"] == ["site-1"]


@pytest.mark.slow
def test_too_many_skipped_rounds_stop_the_run_and_it_can_go_on(tmp_path: Path) -> None:
    config = _config(run={"rounds": 5}, round={"max-skipped": 2})
    with pytest.raises(RunError) as raised:
        simulate(config, tmp_path, app=_failing(lambda site, r: r >= 2))
    assert raised.value.code == 503
    assert [line["outcome"] for line in _lines(tmp_path)] == ["committed", "skipped", "skipped"]
    assert not (tmp_path / "model.safetensors").exists()
    simulate(config, tmp_path, resume=True)
    assert [line["outcome"] for line in _lines(tmp_path)[3:]] == ["committed", "committed"]


@pytest.mark.slow
def test_a_required_site_that_fails_stops_the_run_loudly(tmp_path: Path) -> None:
    config = _config(round={"require-sites": ["site-2"]})
    with pytest.raises(RunError) as raised:
        simulate(config, tmp_path, app=_failing(lambda site, r: r == 2 and site == "site-2"))
    assert raised.value.code == 502
    assert "site-2" in raised.value.message
    assert "FE-410" in raised.value.message
    assert len(_lines(tmp_path)) == 1, "the round without the site was not committed"
    simulate(config, tmp_path, resume=True)
    assert len(_lines(tmp_path)) == 3


def test_a_strategy_that_needs_more_sites_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RunError) as raised:
        simulate(_config(strategy={"name": "Bulyan"}, sites={"count": 2}), tmp_path)
    assert raised.value.code == 506
    assert "3 sites" in raised.value.message


@pytest.mark.slow
def test_a_cohort_is_a_share_of_the_sites_and_all_are_evaluated(tmp_path: Path) -> None:
    simulate(_config(round={"fraction-train": 0.5, "require-sites": ["site-5"]}), tmp_path)
    lines = _lines(tmp_path)
    for line in lines:
        assert 2 <= len(line["invited"]) <= 3
        assert "site-5" in line["invited"]
        assert line["trained"] == line["invited"] == sorted(line["invited"])
        assert len(line["metrics"]["per_site"]) == 5
    assert len({tuple(line["invited"]) for line in lines}) > 1


@pytest.mark.slow
def test_evaluation_every_third_round_and_at_the_end(tmp_path: Path) -> None:
    simulate(_config(run={"rounds": 4, "evaluate-every": 3}), tmp_path)
    assert ["per_site" in line["metrics"] for line in _lines(tmp_path)] == [
        False,
        False,
        True,
        True,
    ]
    assert json.loads((tmp_path / "metrics.json").read_text())["final"]["round"] == 4


@pytest.mark.slow
def test_metrics_are_nested_and_the_means_are_what_they_say(tmp_path: Path) -> None:
    simulate(_config(), tmp_path)
    final = json.loads((tmp_path / "metrics.json").read_text())["final"]
    accuracies = [row["accuracy"] for row in final["per_site"].values()]
    assert len(accuracies) == 5
    assert final["site_mean"]["accuracy"] == pytest.approx(np.mean(accuracies), abs=1e-12)
    sizes = [
        site["test_examples"]
        for site in json.loads((tmp_path / "run.json").read_text())["sites"].values()
    ]
    assert final["pooled"]["accuracy"] == pytest.approx(
        np.average(accuracies, weights=sizes), abs=1e-12
    )


@pytest.mark.slow
def test_a_fedge_run_outlives_flowers(tmp_path: Path) -> None:
    app = _failing(lambda site, r: r >= 2)
    with pytest.raises(RunError):
        simulate(_config(round={"max-skipped": 1}), tmp_path, app=app)
    before = json.loads((tmp_path / "run.json").read_text())
    simulate(_config(round={"max-skipped": 1}), tmp_path, resume=True)
    after = json.loads((tmp_path / "run.json").read_text())
    assert before["run"] == after["run"]
    journal = Journal(tmp_path / "journal.db")
    assert len(set(journal.flower_runs())) == 2
    journal.close()


@pytest.mark.slow
def test_a_full_disk_is_a_numbered_error_and_loses_at_most_the_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any, **__: Any) -> None:
        if path.name == "round-000002.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomically(path, *_, **__)

    with monkeypatch.context() as disk, pytest.raises(ConfigError) as raised:
        disk.setattr("fedge.server.runs.checkpoints.write_atomically", full)
        simulate(_config(), tmp_path)
    assert raised.value.code == 210
    assert "No space left" in raised.value.message
    assert len(_lines(tmp_path)) == 1
    simulate(_config(), tmp_path, resume=True)
    assert len(_lines(tmp_path)) == 3


@pytest.mark.slow
def test_a_run_without_any_model_is_no_finished_run(tmp_path: Path) -> None:
    with pytest.raises(RunError) as raised:
        simulate(_config(run={"rounds": 2}), tmp_path, app=_failing(lambda site, r: True))
    assert raised.value.code == 503
    assert not (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "run.json").read_text())["state"] == "running"
    assert "FE-410" in (tmp_path / "report.html").read_text(), "the report says why"


@pytest.mark.slow
def test_a_site_whose_data_changed_is_named_in_every_round_after_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = _failing(lambda site, r: r == 2)
    with pytest.raises(RunError):
        simulate(_config(round={"max-skipped": 1}), tmp_path, app=stops)

    def altered(config: Config, task: Any) -> Any:
        shares = site_shares(config, task)
        shares["site-2"].train_features[0, 0] += 1
        return shares

    monkeypatch.setattr("fedge.simulations.engine.site_shares", altered)
    simulate(_config(round={"max-skipped": 1}), tmp_path, resume=True)
    third = _lines(tmp_path)[2]
    assert "site-2" not in third["invited"]
    assert ("site-2", "FE-409", "absent") in [
        (r["site"], r["code"], r["outcome"]) for r in third["rejected"]
    ]
    refused = [r for r in third["rejected"] if r["code"] == "FE-410"]
    assert "FE-415" in refused[0]["reason"]
    assert json.loads((tmp_path / "run.json").read_text())["sites"]["site-2"]["rounds"] == 1


@pytest.mark.slow
def test_a_finished_run_gets_its_lost_files_back_and_a_damaged_model_is_noticed(
    tmp_path: Path,
) -> None:
    simulate(_config(), tmp_path)
    before = {n: (tmp_path / n).read_bytes() for n in ("rounds.jsonl", "metrics.json")}
    (tmp_path / "rounds.jsonl").unlink()
    (tmp_path / "metrics.json").write_text("{")
    (tmp_path / "report.html").unlink()
    simulate(_config(), tmp_path, resume=True)
    assert {n: (tmp_path / n).read_bytes() for n in before} == before
    assert (tmp_path / "report.html").exists()
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(RunError) as raised:
        simulate(_config(), tmp_path, resume=True)
    assert raised.value.code == 504
