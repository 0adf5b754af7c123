"""Whole runs where each site adds its own noise, to its updates or to its counters over held-out examples."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedge.client.data.dataset import site_shares
from fedge.client.privacy import charging
from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.client.worker import handlers
from fedge.server.release.pipeline import release
from fedge.server.runs.directory import RunDirectory
from fedge.shared.bundle import bundle
from fedge.shared.config import reader
from fedge.shared.crypto import dsse
from fedge.shared.preprocessing import steps
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.tasks.registry import get_task
from fedge.simulations.engine import simulate

DIGITS = Path(__file__).parents[2] / "examples" / "digits.toml"
SMALL = ("run.rounds=2", "sites.count=5", "data.partition='iid'", "train.local-epochs=1")
NOISED = ("privacy.metrics='noised'", "privacy.metrics-noise-multiplier=2")


@pytest.fixture(autouse=True)
def noise_of_its_own(monkeypatch):
    """Sites' noise is the same each time that a test runs: the first has the key 1, the next 2."""
    keys = itertools.count(1)
    monkeypatch.setattr(charging, "Entropy", lambda: Entropy(key=next(keys).to_bytes(32, "big")))


def config(mechanism, *more, noise_multiplier=1.0):
    privacy = (
        f"privacy.mechanism='{mechanism}'",
        f"privacy.noise-multiplier={noise_multiplier}",
    )
    return reader.load(DIGITS, (*SMALL, *privacy, *more))


def lines(out):
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def charges(out, site="site-1"):
    return [e.charge for e in Ledger(RunDirectory(out).sites / site / FILE).entries()]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam", "FedMedian"])
def test_a_run_with_local_noise_stays_finite_and_reports_no_sizes(tmp_path, strategy):
    out = tmp_path / "out"
    run_config = (f"strategy.name='{strategy}'", "privacy.clipping-bound=0.05")
    simulate(config("local", *run_config, noise_multiplier=8.0), out)
    rows = lines(out)
    assert [row["outcome"] for row in rows] == ["committed"] * 2
    for number, row in enumerate(rows, 1):
        assert row["rejected"] == row["dropped"] == []
        assert set(row["examples"].values()) == {1}
        assert row["metrics"]["train"] == row["metrics"]["pooled"] == {}
        spent = epsilon([Release(8.0, 1.0, number)], 1e-5)
        for reported in row["privacy"].values():
            assert reported["server"] == reported["consumers"] == pytest.approx(spent)
    assert {(c.unit, c.mechanism, c.purpose) for c in charges(out)} == {("site", "local", "train")}
    assert all(np.isfinite(a).all() for a in load_file(out / "model.safetensors").values())
    for registered in json.loads((out / "run.json").read_text())["sites"].values():
        assert registered["train_examples"] is registered["test_examples"] is None


@pytest.mark.slow
def test_little_local_noise_learns_and_much_does_not(tmp_path):
    def accuracy(noise_multiplier):
        out = tmp_path / f"{noise_multiplier}"
        simulate(
            config(
                "local",
                "privacy.metrics='unprotected'",
                "privacy.clipping-bound=3",
                noise_multiplier=noise_multiplier,
            ),
            out,
        )
        return lines(out)[-1]["metrics"]["pooled"]["accuracy"]

    # Chance is .1.
    assert accuracy(0.01) > 0.3 > accuracy(8.0)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["example", "local", "distributed"])
def test_noised_metrics_are_shares_and_charged_by_themselves(tmp_path, mechanism):
    out = tmp_path / "out"
    more = ("secure-aggregation.enabled=true",) if mechanism == "distributed" else ()
    simulate(config(mechanism, *NOISED, *more), out)
    for row in lines(out):
        metrics = row["metrics"]
        assert set(metrics["pooled"]) == {"accuracy"}
        assert 0 <= metrics["pooled"]["accuracy"] <= 1
        assert len(metrics["per_site"]) == (5 if mechanism == "example" else 0)
        assert row["rejected"] == row["dropped"] == []
    found = charges(out)
    assert [c.purpose for c in found] == ["train", "evaluate"] * 2
    assert [c.release for c in found if c.purpose == "evaluate"] == [Release(2.0)] * 2
    if mechanism != "distributed":
        # The round's line holds what was spent including its evaluation.
        entries = Ledger(RunDirectory(out).sites / "site-1" / FILE).entries()
        reported = lines(out)[-1]["privacy"]["site-1"]["consumers"]
        assert reported == pytest.approx(entries[-1].epsilon_consumers, rel=1e-9)


@pytest.mark.slow
def test_noised_accuracy_is_near_the_exact_one_and_is_not_it(tmp_path):
    out = tmp_path / "out"
    run_config = config("example", *NOISED, noise_multiplier=0.6)
    simulate(run_config, out)
    task = get_task("digits")
    network = task.network()
    state = {k: torch.from_numpy(v) for k, v in load_file(out / "model.safetensors").items()}
    network.load_state_dict(state)
    network.eval()
    right = count = 0
    for share in site_shares(run_config, task).values():
        x = torch.from_numpy(np.asarray(steps.apply(task.preprocessing, share.test_features)))
        right += int((network(x).argmax(dim=1).numpy() == share.test_labels).sum())
        count += len(share.test_labels)
    noised = lines(out)[-1]["metrics"]["pooled"]["accuracy"]
    assert noised != right / count
    # Five sites' noise of 2 sqrt(2) on both counters, over some 450 examples.
    assert abs(noised - right / count) < 5 * np.sqrt(5 * 8 * 2) / count


@pytest.mark.slow
def test_a_budget_that_is_spent_stops_the_evaluation_and_not_the_run(tmp_path, monkeypatch):
    once, twice = (epsilon([Release(1.0, 1.0, n)], 1e-5) for n in (1, 2))
    both = epsilon([Release(1.0), Release(0.5)], 1e-5)
    assert once < twice < both
    monkeypatch.setattr(handlers, "simulated", lambda: PrivacyPolicy(epsilon=(twice + both) / 2))
    out = tmp_path / "out"
    loud = (NOISED[0], "privacy.metrics-noise-multiplier=0.5")
    simulate(config("local", *loud), out)
    for row in lines(out):
        assert row["outcome"] == "committed"
        assert len(row["trained"]) == 5
        assert {r["code"] for r in row["rejected"]} == {"FE-410"}
        assert all("FE-427" in r["reason"] for r in row["rejected"])
        assert row["metrics"]["pooled"] == {}
    assert [c.purpose for c in charges(out)] == ["train"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["example", "distributed"])
def test_a_release_holds_the_ledgers_as_the_last_evaluation_left_them(tmp_path, mechanism):
    out = tmp_path / "out"
    more = ("secure-aggregation.enabled=true",) if mechanism == "distributed" else ()
    simulate(config(mechanism, *NOISED, *more, "run.rounds=1"), out)
    dsse.new_key(tmp_path / "key")
    release(out, tmp_path / "key", tmp_path / "model.fedge")
    verified = bundle.open_bundle(tmp_path / "model.fedge", dsse.load_public(tmp_path / "key.pub"))
    homes = RunDirectory(out).sites
    assert verified.statement["predicate"]["privacy"]["ledgers"] == {
        f"site-{i}": Ledger(homes / f"site-{i}" / FILE).digest("default") for i in range(1, 6)
    }
