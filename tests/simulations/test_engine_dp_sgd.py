"""Whole runs under differential privacy: what is charged, what stops, and what stays hidden."""

from __future__ import annotations

import json

import builders
import pytest

from fedge.server.release.pipeline import release
from fedge.server.runs.directory import RunDirectory
from fedge.shared.bundle import bundle
from fedge.shared.crypto import dsse
from fedge.shared.errors import ConfigError
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.simulations.engine import simulate


def config(mechanism="example", privacy=None, **sections):
    own = {"mechanism": mechanism, "noise-multiplier": 1.0, **(privacy or {})}
    masks = {"enabled": mechanism == "distributed"}
    small = {"data": {"partition": "iid"}, "secure_aggregation": masks}
    return builders.config(privacy=own, **{**small, **sections})


def lines(out):
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_with_dp_sgd_reports_epsilons_and_neither_losses_nor_metrics(tmp_path):
    simulate(config(), tmp_path / "out")
    rows = {line["round"]: line for line in lines(tmp_path / "out")}
    for number, line in rows.items():
        assert line["metrics"]["train"] == {}
        assert line["metrics"]["pooled"] == {}
        for site, n in line["examples"].items():
            spent = epsilon([Release(1.0, 16 / n, 3 * number)], 1e-5)
            reported = line["privacy"][site]
            assert reported["consumers"] == reported["server"] == pytest.approx(spent, abs=1e-6)
    home = RunDirectory(tmp_path / "out").sites / "site-1"
    assert [e.charge.server_round for e in Ledger(home / FILE).entries()] == [1, 2]


@pytest.mark.slow
def test_a_run_with_distributed_noise_charges_whole_sites_and_only_they_know(tmp_path):
    simulate(config("distributed", {"metrics": "unprotected"}), tmp_path / "out")
    for line in lines(tmp_path / "out"):
        assert line["outcome"] == "committed"
        assert "privacy" not in line
        assert line["metrics"]["train"] == {}
        assert "accuracy" in line["metrics"]["pooled"]
        assert "examples" not in line["secure"]
    for name in ("site-1", "site-5"):
        ledger = Ledger(RunDirectory(tmp_path / "out").sites / name / FILE)
        assert [(e.charge.unit, e.charge.mechanism) for e in ledger.entries()] == [
            ("site", "distributed")
        ] * 2
        spent = ledger.spent("default", "site", 1e-5)
        assert (
            spent.server == spent.consumers == pytest.approx(epsilon([Release(1.0, 1.0, 2)], 1e-5))
        )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (lambda: config(strategy={"name": "QFedAvg"}), "must not weigh by losses"),
        (lambda: config(strategy={"name": "Scaffold"}), "must not send more than weights"),
        (
            lambda: config(train={"mixed-precision": "bfloat16"}),
            "train.mixed-precision: must be off",
        ),
        (
            lambda: config("distributed", secure_aggregation={"enabled": False}),
            "secure-aggregation.enabled: must be true",
        ),
        (
            lambda: config("distributed", {"corrupt-sites": 5}),
            "privacy.corrupt-sites: must be below",
        ),
        (
            lambda: builders.config(privacy={"noise-multiplier": 1.0}),
            "mechanism must be named",
        ),
        (
            lambda: builders.config(privacy={"mechanism": "example"}),
            "must hold noise-multiplier",
        ),
    ],
)
def test_what_would_break_the_promise_is_refused(settings, says):
    assert says in builders.refused(201, settings)


def test_a_task_that_standardises_is_refused_before_its_data_is_read(tmp_path):
    run_config = config(task="breast-cancer")
    with pytest.raises(ConfigError, match="privacy.statistics: must be unprotected") as caught:
        simulate(run_config, tmp_path / "out")
    assert caught.value.code == 211
    assert not (tmp_path / "out").exists()


def test_noise_that_is_incompatible_with_the_grid_begins_no_run(tmp_path):
    with pytest.raises(ConfigError, match="noise of one site: must be") as caught:
        simulate(config("distributed", {"noise-multiplier": 0.001}), tmp_path / "out")
    assert caught.value.code == 211
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", ["example", "distributed"])
def test_a_release_holds_the_digests_of_the_ledgers(mechanism, tmp_path):
    out = tmp_path / "out"
    simulate(config(mechanism, {"metrics": "unprotected"}, run={"rounds": 1}), out)
    dsse.new_key(tmp_path / "key")
    release(out, tmp_path / "key", tmp_path / "model.fedge")
    trusted = dsse.load_public(tmp_path / "key.pub")
    verified = bundle.open_bundle(tmp_path / "model.fedge", trusted)
    reported = verified.statement["predicate"]["privacy"]
    assert reported == verified.manifest.privacy.to_json()
    assert (reported["mechanism"], reported["noise_multiplier"]) == (mechanism, 1.0)
    homes = RunDirectory(out).sites
    assert reported["ledgers"] == {
        f"site-{i}": Ledger(homes / f"site-{i}" / FILE).digest("default") for i in range(1, 6)
    }
