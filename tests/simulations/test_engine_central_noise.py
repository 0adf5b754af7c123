"""Whole runs with central noise: the sites asked, what is charged, what a kill changes, and what stays hidden."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedge.client.relay import message_relay
from fedge.server.release.pipeline import release
from fedge.server.runs.directory import RunDirectory
from fedge.server.runs.journal import Journal
from fedge.shared.bundle import bundle
from fedge.shared.config import reader
from fedge.shared.config.federation import Config
from fedge.shared.crypto import dsse
from fedge.shared.errors import ConfigError, RunError
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.wire import tensors
from fedge.simulations.engine import simulate


def config(mechanism: str = "central", privacy: Any = None, **sections: Any) -> Config:
    own = {"mechanism": mechanism, "noise-multiplier": 1.0, **(privacy or {})}
    small = {"sites": {"count": 4}, "data": {"partition": "iid"}, "train": {"local-steps": 1}}
    return builders.config(privacy=own, **{**small, **sections})


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_central_noise_round_by_round(tmp_path: Path) -> None:
    simulate(config(), tmp_path / "out")
    for number, line in enumerate(lines(tmp_path / "out"), 1):
        assert line["outcome"] == "committed"
        assert len(line["trained"]) == 4
        assert line["metrics"]["train"] == {}
        assert line["metrics"]["pooled"] == {}
        assert line["central"]["expected_sites"] == 4
        spent = epsilon([Release(1.0, 1.0, number)], 1e-5)
        assert line["central"]["epsilon"]["consumers"] == pytest.approx(spent)
        for reported in line["privacy"].values():
            told = {"consumers": pytest.approx(spent), "server": None, "delta": 1e-5}
            assert reported == told
    ledger = Ledger(RunDirectory(tmp_path / "out").sites / "site-1" / FILE)
    assert [(e.charge.unit, e.charge.server_round) for e in ledger.entries()] == [
        ("site", 1),
        ("site", 2),
    ]
    assert "unbounded: it gets the updates before the noise" in (
        tmp_path / "out/report.html"
    ).read_text(encoding="utf-8")


def test_a_sample_that_is_empty_makes_a_round_of_noise_alone(tmp_path: Path) -> None:
    """Also where the strategy has a memory, and min-sites is more than were sampled."""
    privacy = {"sampling-rate": 1e-8, "clipping-quantile": 0.5, "metrics": "unprotected"}
    run_config = config("central", privacy, strategy={"name": "FedAdam"}, round={"min-sites": 4})
    simulate(run_config, tmp_path / "out")
    found = lines(tmp_path / "out")
    assert [line["invited"] for line in found] == [[], []]
    assert [line["outcome"] for line in found] == ["committed", "committed"]
    assert len({line["model_sha256"] for line in found}) == 2
    assert found[1]["central"]["clipping_bound"] != 1.0
    assert all(len(line["metrics"]["per_site"]) == 4 for line in found)
    assert all("privacy" not in line for line in found)


@pytest.mark.slow
def test_the_sample_is_not_the_seeds(tmp_path: Path) -> None:
    cohorts = []
    for name in ("a", "b"):
        run_config = config("central", {"sampling-rate": 0.5}, run={"rounds": 8})
        simulate(run_config, tmp_path / name)
        cohorts.append([tuple(line["invited"]) for line in lines(tmp_path / name)])
    assert cohorts[0] != cohorts[1], "equal once in 2^32 runs"
    first = lines(tmp_path / "a")
    # A site is charged for the whole run when it is first sampled, and never again.
    total = epsilon([Release(1.0, 0.5, 8)], 1e-5)
    reported = [t["consumers"] for line in first for t in line.get("privacy", {}).values()]
    assert reported == pytest.approx([total] * len(reported))
    by_round = [line["central"]["epsilon"]["consumers"] for line in first]
    assert by_round == sorted(by_round)
    assert by_round[-1] == pytest.approx(total)


@pytest.mark.slow
def test_sites_participate_in_turn(tmp_path: Path) -> None:
    run_config = config("central-mf", {"min-separation": 2}, run={"rounds": 4})
    simulate(run_config, tmp_path / "out")
    found = lines(tmp_path / "out")
    odd, even = ["site-1", "site-3"], ["site-2", "site-4"]
    assert [line["trained"] for line in found] == [odd, even, odd, even]
    spent = epsilon([Release(1.0)], 1e-5)
    for line in found:
        assert line["central"]["epsilon"]["consumers"] == pytest.approx(spent)
        assert line["central"]["expected_sites"] == 2
    for site in ("site-1", "site-4"):
        ledger = Ledger(RunDirectory(tmp_path / "out").sites / site / FILE)
        assert len(ledger.entries()) == 1
    kept = [p.name for p in (tmp_path / "out/checkpoints").iterdir()]
    assert kept == ["round-000004.safetensors"], "an older one holds the noise of the model"
    assert not any(b"past-noise" in p.read_bytes() for p in tmp_path.rglob("*.safetensors"))


def test_a_round_of_which_no_update_comes_is_noise_alone(tmp_path: Path) -> None:
    """Leaving it out would reveal that none came."""
    app = ClientApp()
    app.query("register")(message_relay.forward)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("no update comes")

    simulate(config("central-mf", run={"rounds": 2}), tmp_path / "out", app=app)
    found = lines(tmp_path / "out")
    assert [line["outcome"] for line in found] == ["committed", "committed"]
    assert [line["trained"] for line in found] == [[], []]
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_run_of_noise_alone_ends(tmp_path: Path) -> None:
    """As where the budget of all sites is spent."""
    app = ClientApp()
    app.query("register")(message_relay.forward)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise RuntimeError("no update comes")

    with pytest.raises(RunError) as stopped:
        simulate(config(run={"rounds": 9}, round={"max-skipped": 2}), tmp_path / "out", app=app)
    assert stopped.value.code == 503
    assert "round 2: must have an update among the noise" in str(stopped.value)
    assert "site-1: FE-" in str(stopped.value)
    assert len(lines(tmp_path / "out")) == 2


# Kills.


def _words(folder: Path) -> list[str]:
    return ["simulate", str(folder / "config.toml"), "--out", str(folder / "run"), "--quiet"]


def _begin(fedge: Any, folder: Path, mechanism: str, point: str) -> list[dict[str, Any]]:
    """Kill a run of three rounds in its second; its committed lines."""
    privacy = {"metrics": "unprotected"}
    privacy |= {"min-separation": 1, "bands": 2} if mechanism == "central-mf" else {}
    run_config = config(mechanism, privacy, run={"rounds": 3})
    (folder / "config.toml").write_text(reader.dump(run_config))
    killed = fedge(*_words(folder), fail_point=f"{point}:2")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    journal = Journal(folder / "run/journal.db")
    try:
        return journal.lines()
    finally:
        journal.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mechanism", "point"),
    [
        ("central", "after-commit"),
        ("central-mf", "after-commit"),
        ("central", "mid-aggregate"),
        ("central-mf", "mid-checkpoint"),
    ],
)
def test_a_killed_run_goes_on(
    mechanism: str, point: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    # One case by the path of users, from nothing; forks, which save seconds, for the others.
    fedge = request.getfixturevalue("fresh" if point == "mid-checkpoint" else "forked")
    committed = _begin(fedge, tmp_path, mechanism, point)
    assert len(committed) == (2 if point == "after-commit" else 1)
    if point == "after-commit":
        # Nothing of a round has left before its commit, not even to be evaluated.
        assert "pooled" not in committed[-1]["metrics"]
    resumed = fedge(*_words(tmp_path), "--resume")
    assert resumed.returncode == 0, resumed.stderr
    found = lines(tmp_path / "run")
    assert [line["round"] for line in found] == [1, 2, 3]
    assert all(line["metrics"]["pooled"] for line in found), "caught up with"
    for before, after in zip(committed, found, strict=False):
        assert before["model_sha256"] == after["model_sha256"]
    # The redone round was answered from what the sites had kept, and charged once.
    for site in ("site-1", "site-4"):
        entries = Ledger(tmp_path / "run/sites" / site / FILE).entries()
        assert [e.charge.server_round for e in entries] == (
            [1, 2, 3] if mechanism == "central" else [1]
        )


@pytest.mark.slow
def test_a_run_whose_past_noise_is_missing_does_not_continue(tmp_path: Path, forked: Any) -> None:
    _begin(forked, tmp_path, "central-mf", "after-commit")
    journal = Journal(tmp_path / "run/journal.db")
    last = journal.last()
    assert last is not None
    path = tmp_path / "run/checkpoints" / last.checkpoint
    held = {k: a for k, a in tensors.read(path).items() if "past-noise" not in k}
    path.write_bytes(tensors.encode(held))
    journal._query("UPDATE round SET checkpoint_sha256 = ? WHERE number = 2", _sha256(path))
    journal.close()
    run_config = reader.load(tmp_path / "config.toml")
    with pytest.raises(RunError, match="noise's state after round 2") as caught:
        simulate(run_config, tmp_path / "run", resume=True)
    assert caught.value.code == 504


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


# Contents of a bundle.


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1.0, 1e-3])
def test_a_bundle_does_not_reveal_which_sites_were_sampled(rate: float, tmp_path: Path) -> None:
    out = tmp_path / "out"
    privacy = {"sampling-rate": rate, "noise-multiplier": 1e-3}
    simulate(config("central", privacy, run={"rounds": 1}), out)
    dsse.new_key(tmp_path / "key")
    release(out, tmp_path / "key", tmp_path / "model.fedge")
    verified = bundle.open_bundle(tmp_path / "model.fedge", dsse.load_public(tmp_path / "key.pub"))
    assert verified.manifest.sites == ("site-1", "site-2", "site-3", "site-4")
    assert verified.manifest.privacy is not None
    reported = verified.manifest.privacy
    assert (reported.mechanism, reported.noise_multiplier, reported.clipping_bound) == (
        "central",
        1e-3,
        1.0,
    )
    # A digest comes with an update, and so would reveal it.
    assert len(reported.ledgers) == (4 if rate == 1 else 0)


@pytest.mark.slow
def test_a_bundle_of_a_sampled_run_leaves_out_the_sampled_sites_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_config = config("central", {"sampling-rate": 0.999}, run={"rounds": 1})
    simulate(run_config, out)
    (line,) = lines(out)
    assert line["privacy_ledgers"], "there was something to tell"
    dsse.new_key(tmp_path / "key")
    release(out, tmp_path / "key", tmp_path / "model.fedge")
    verified = bundle.open_bundle(tmp_path / "model.fedge", dsse.load_public(tmp_path / "key.pub"))
    text = json.dumps(verified.statement)
    assert not any(digest in text for digest in line["privacy_ledgers"].values())


# What the sites are sent.


@pytest.mark.slow
def test_no_site_learns_how_many_were_sampled(tmp_path: Path) -> None:
    """The failing twin is a run without sampling, where each learns how many were asked."""
    seen: dict[str, list[int]] = {}

    def watching(name: str) -> ClientApp:
        app = ClientApp()
        app.query("register")(message_relay.forward)

        @app.train()
        def train(message: Message, context: Context) -> Message:
            reported = message.content.config_records["config"]
            seen.setdefault(name, []).append(int(str(reported["cohort"])))
            return message_relay.forward(message, context)

        return app

    run_config = config("central", {"sampling-rate": 0.5}, run={"rounds": 6})
    simulate(run_config, tmp_path / "sampled", app=watching("sampled"))
    assert set(seen["sampled"]) == {4}
    assert {len(line["invited"]) for line in lines(tmp_path / "sampled")} != {4}
    turns = config("central-mf", {"min-separation": 2})
    simulate(turns, tmp_path / "turns", app=watching("turns"))
    assert set(seen["turns"]) == {2}


@pytest.mark.slow
def test_every_weighted_mean_learns_by_it(tmp_path: Path) -> None:
    for name in ("FedAvg", "FedAvgM", "FedAdam", "FedProx"):
        out = tmp_path / name
        simulate(config("central", strategy={"name": name}, run={"rounds": 2}), out)
        weights = tensors.read(out / "model.safetensors")
        assert all(np.isfinite(a).all() for a in weights.values())


def test_too_little_noise_for_whole_numbers_is_refused() -> None:
    for mechanism in ("central", "central-mf"):
        with pytest.raises(ConfigError, match="noise-multiplier: must be at least 1e-06"):
            config(mechanism, {"noise-multiplier": 1e-7})
    config("example", {"noise-multiplier": 1e-7})
