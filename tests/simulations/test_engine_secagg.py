"""Whole runs under secure aggregation: equal to those in clear up to quantisation, and as robust."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from flwr.app import Error, Message

from fedge.client.data.dataset import site_shares
from fedge.client.training.learner import Learner
from fedge.server.report.page.render import write as write_report
from fedge.server.runs.journal import Journal
from fedge.server.runs.listener import NullListener
from fedge.shared.config.federation import Config
from fedge.shared.errors import RunError
from fedge.shared.secagg import fixed_point, messages
from fedge.shared.tasks.registry import get_task
from fedge.shared.wire.tensors import read
from fedge.simulations.engine import simulate
from fedge.simulations.grid import InProcessGrid
from fedge.simulations.terminal.summary import summary_table
from fedge.simulations.terminal.text import round_facts

FEDGE = [
    sys.executable,
    "-c",
    "import sys; from fedge.shared.cli.main import main; sys.exit(main())",
]
CAP = 1000


def config(count: int = 5, secure: Mapping[str, Any] | None = None, **sections: Any) -> Config:
    """Breast cancer in small; ``secure`` switches masks on and adds to their section."""
    masks = {"enabled": secure is not None, "min-sites": 3, "weight-cap": CAP, **(secure or {})}
    small = {"run": {"evaluate-every": 2}, "sites": {"count": count}, "secure-aggregation": masks}
    return builders.config("breast-cancer", **{**small, **sections})


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def apart(one: Path, other: Path) -> float:
    """The largest difference of two models' weights."""
    first, second = (read(run / "model.safetensors") for run in (one, other))
    assert first.keys() == second.keys()
    return max(float(np.abs(first[k].astype(float) - second[k]).max()) for k in first)


class Faulty(InProcessGrid):
    """A grid on which some answers fail: ``fails(site, kind, attempt)``."""

    def __init__(self, fails: Callable[[str, str, int], bool], *more: Any) -> None:
        super().__init__(*more)
        self.fails, self.sites = fails, dict(more[0])
        self.kinds: list[str] = []

    def _answer(self, message_id: str, message: Message) -> Message:
        kind, content = message.metadata.message_type, message.content
        self.kinds.append(kind)
        reply = super()._answer(message_id, message)
        secure = content.get(messages.SECURE)
        attempt = int(secure.get(messages.ATTEMPT, 0)) if secure else 0
        if self.fails(self.sites[message.metadata.dst_node_id], kind, attempt):
            failed = Message(Error(code=413, reason="FE-413"), reply_to=message)
            failed.metadata.__dict__["_message_id"] = reply.metadata.message_id
            return failed
        return reply


def faulty(fails: Callable[[str, str, int], bool]) -> Any:
    return lambda sites, app, number: Faulty(fails, sites, app, number)


STRATEGIES: list[tuple[dict[str, Any], float]] = [
    # By how much a step of the quantisation grows in the server's own step: eta / tau where it is adaptive.
    ({"name": "FedAvg"}, 1),
    ({"name": "FedProx", "proximal-mu": 0.1}, 1),
    ({"name": "FedAvgM", "server-momentum": 0.5, "server-learning-rate": 0.7}, 2),
    ({"name": "FedAdam", "eta": 0.02, "tau": 0.01}, 4),
    ({"name": "FedYogi", "tau": 0.01}, 4),
    ({"name": "FedAdagrad", "eta": 0.02, "tau": 0.01}, 4),
    ({"name": "Scaffold"}, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "growth"), STRATEGIES, ids=[s["name"] for s, _ in STRATEGIES])
def test_a_run_under_secure_aggregation_is_the_run_in_clear(
    strategy: dict[str, Any], growth: float, tmp_path: Path
) -> None:
    plain = simulate(config(strategy=strategy), tmp_path / "plain").path
    masked = simulate(config(secure={}, strategy=strategy), tmp_path / "masked").path
    for mine, theirs in zip(lines(masked), lines(plain), strict=True):
        assert (mine["outcome"], mine["trained"]) == ("committed", theirs["trained"])
        assert mine["secure"]["clipped"] == mine["secure"]["saturated"] == 0
        assert mine["metrics"]["train"]["loss"] == pytest.approx(
            theirs["metrics"]["train"]["loss"], abs=1e-5
        )
    pooled = [lines(run)[-1]["metrics"]["pooled"] for run in (masked, plain)]
    assert pooled[0] == pytest.approx(pooled[1], abs=1e-5)
    # Each site rounds by less than a step, and together they weigh what they have of the cap.
    examples = sum(lines(plain)[0]["examples"].values())
    bound = 100.0 if strategy["name"] == "Scaffold" else 4.0
    step = 5 / fixed_point.scale(bound, 5) * CAP / examples
    assert apart(masked, plain) <= growth * 2 * (step + 2e-7)
    # The failing twin: the model itself has moved by far more than that.
    start = simulate(config(strategy=strategy, run={"rounds": 1}), tmp_path / "one").path
    assert apart(start, plain) > 100 * growth * (step + 2e-7)


@pytest.mark.slow
def test_no_size_of_a_site_is_anywhere(tmp_path: Path) -> None:
    run = simulate(config(secure={}), tmp_path / "run").path
    record = json.loads((run / "run.json").read_text())
    for site in record["sites"].values():
        assert site == {"train_examples": None, "test_examples": None, "rounds": 2}
    journal = Journal(run / "journal.db")
    assert set(journal.sites().values()) == {(0, 0)}
    journal.close()
    assert all(line["examples"] == {} for line in lines(run))
    assert all(line["metrics"].get("per_site", {}) == {} for line in lines(run))
    shares = site_shares(config(), get_task("breast-cancer"))
    sizes = {len(s.train_labels) for s in shares.values()} | {
        len(s.test_labels) for s in shares.values()
    }
    found = summary_table(json.loads((run / "metrics.json").read_text()), lines(run))
    for text in (found, (run / "rounds.jsonl").read_text()):
        numbers = set("".join(c if c.isalnum() else " " for c in text).split())
        assert not numbers & {str(n) for n in sizes if n > 30}
    write_report(run)


@pytest.mark.slow
def test_the_table_shows_what_is_known_and_no_zeros(tmp_path: Path) -> None:
    run = simulate(config(secure={}), tmp_path / "run").path
    metrics, record = json.loads((run / "metrics.json").read_text()), lines(run)
    table = summary_table(metrics, record).splitlines()
    accuracy = metrics["final"]["pooled"]["accuracy"]
    assert len(table) == 2
    assert table[1].split()[:3] == ["pooled", f"{100 * accuracy:.1f}", "%"]
    assert "site mean" not in "".join(table)
    assert round_facts(record[-1]).startswith(f"{100 * accuracy:.1f} %  loss ")


@pytest.mark.slow
def test_mean_and_deviation_are_those_of_the_run_in_clear(tmp_path: Path) -> None:
    runs = [
        simulate(config(secure=secure, run={"rounds": 1}), tmp_path / name).path
        for name, secure in (("plain", None), ("masked", {}))
    ]
    plain, masked = (json.loads((run / "run.json").read_text())["preprocessing"][0] for run in runs)
    assert len(masked["mean"]) == 30
    for key in ("mean", "std"):
        assert masked[key] == pytest.approx(plain[key], rel=1e-9)
    # The failing twin: those of a single site are others altogether.
    shares = site_shares(config(), get_task("breast-cancer"))
    alone = shares["site-1"].train_features.astype(float).mean(axis=0).tolist()
    assert masked["mean"] != pytest.approx(alone, rel=1e-3)


@pytest.mark.slow
def test_the_line_says_which_sites_dropped_out_where_and_the_run_goes_on(tmp_path: Path) -> None:
    def fails(site: str, kind: str, attempt: int) -> bool:
        return (site, kind) in {("site-2", messages.MASKED), ("site-7", messages.UNMASK)}

    run = simulate(config(7, secure={}), tmp_path / "run", grid=faulty(fails)).path
    for line in lines(run):
        assert line["outcome"] == "committed"
        assert line["trained"] == [f"site-{i}" for i in (1, 3, 4, 5, 6, 7)]
        (rejected,) = line["rejected"]
        assert (rejected["site"], rejected["code"]) == ("site-2", "FE-410")
        assert rejected["reason"].startswith("masked: the site reported FE-413")
        lost = {(x["site"], x["exchange"]) for x in line["secure"]["lost"]}
        assert lost == {("site-2", "masked"), ("site-7", "unmask")}
        assert line["secure"]["groups"] == [line["trained"]]
    evaluation = lines(run)[-1]["secure"]["evaluation"]
    assert (evaluation["sites"], evaluation["reason"]) == (6, None)


@pytest.mark.slow
def test_the_sum_of_survivors_is_a_run_in_clear_without_the_others(tmp_path: Path) -> None:
    def lost(site: str, kind: str, attempt: int) -> bool:
        return site == "site-2" and kind in ("train", messages.SHARE)

    chosen = {"run": {"rounds": 2, "evaluate-every": 2}, "data": {"standardise": "site"}}
    masked = simulate(
        config(7, secure={}, **chosen),
        tmp_path / "masked",
        grid=faulty(lambda s, k, a: s == "site-2" and k == messages.SHARE),
    ).path
    plain = simulate(config(7, **chosen), tmp_path / "plain", grid=faulty(lost)).path
    assert [line["trained"] for line in lines(masked)] == [line["trained"] for line in lines(plain)]
    assert apart(masked, plain) < 2e-6


def test_where_no_sum_comes_about_the_round_is_skipped(tmp_path: Path) -> None:
    rounds: list[int] = []

    def fails(site: str, kind: str, attempt: int) -> bool:
        return kind == messages.UNMASK and site != "site-1" and not rounds

    class OnceOnly(NullListener):
        def round(self, line: Any) -> None:
            rounds.append(line["round"])

    chosen = config(secure={}, data={"standardise": "site"})
    run = simulate(chosen, tmp_path / "run", grid=faulty(fails), listener=OnceOnly()).path
    first, second = lines(run)
    assert first["outcome"] == "skipped"
    assert first["reason"].startswith("FE-510 secure sums: must be 1, got 0 (unmask: must be")
    assert first["secure"]["attempts"] == 1
    assert first["trained"] == []
    assert second["outcome"] == "committed"


@pytest.mark.slow
def test_a_required_site_that_is_not_in_the_sum_stops_the_run(tmp_path: Path) -> None:
    chosen = config(7, secure={}, round={"require-sites": ["site-3"]})
    fails = faulty(lambda site, kind, attempt: (site, kind) == ("site-3", messages.MASKED))
    with pytest.raises(RunError) as caught:
        simulate(chosen, tmp_path / "run", grid=fails)
    assert caught.value.code == 502
    assert "site-3: FE-410 masked: the site reported FE-413" in caught.value.message
    assert lines(tmp_path / "run") == []
    done = simulate(chosen, tmp_path / "run", resume=True).path
    assert len(lines(done)) == 2


def test_a_quorum_counts_the_sites_of_the_sum(tmp_path: Path) -> None:
    chosen = config(7, secure={}, round={"min-sites": 7, "max-skipped": 1})
    fails = faulty(lambda site, kind, attempt: (site, kind) == ("site-3", messages.MASKED))
    with pytest.raises(RunError) as caught:
        simulate(chosen, tmp_path / "run", grid=fails)
    assert caught.value.code == 503
    (line,) = lines(tmp_path / "run")
    assert line["reason"] == "FE-501 updates: must be at least 7, got 6"


@pytest.mark.slow
def test_an_evaluation_that_fails_says_so_and_the_round_counts(tmp_path: Path) -> None:
    def fails(site: str, kind: str, attempt: int) -> bool:
        return kind == "evaluate" and site in ("site-1", "site-2", "site-3")

    run = simulate(config(secure={"attempts": 1}), tmp_path / "run", grid=faulty(fails)).path
    last = lines(run)[-1]
    assert last["outcome"] == "committed"
    assert last["metrics"]["pooled"] == {}
    assert last["secure"]["evaluation"]["reason"] == ("begin: must be answered by 3 sites, got 2")


def poisoned(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """site-1 sends its update many times as long."""
    real = Learner.train

    def fit(worker: Learner, terms: Any, what: Any, received: Any, examples: Any) -> Any:
        trained, loss = real(worker, terms, what, received, examples)
        if worker.site == "site-1":
            for name, a in received.items():
                moved = a.astype(np.float64) + factor * (trained[name] - a.astype(np.float64))
                trained[name] = moved.astype(a.dtype)
        return trained, loss

    monkeypatch.setattr(Learner, "train", fit)


@pytest.mark.slow
def test_groups_bound_what_one_poisoned_site_can_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(folder: str) -> dict[str, Path]:
        found = {}
        for name, groups in (("FedAvg", 1), ("FedMedian", 3), ("Krum", 3)):
            chosen = config(
                9,
                secure={"groups": groups},
                strategy={"name": name},
                data={"partition": "iid"},
                run={"rounds": 1},
            )
            found[name] = simulate(chosen, tmp_path / f"{folder}-{name}").path
            (line,) = lines(found[name])
            sampled_groups = line["secure"]["groups"]
            assert [len(some) for some in sampled_groups] == [9 // groups] * groups
            assert line["trained"] == sorted(site for some in sampled_groups for site in some)
            assert line["secure"]["clipped"] == 0
        return found

    honest = runs("honest")
    # A hundred times an honest update is still within the clip.
    poisoned(monkeypatch, 100)
    bad = runs("bad")
    moved = {name: apart(bad[name], honest[name]) for name in bad}
    assert moved["FedMedian"] < 0.1 * moved["FedAvg"]
    assert moved["Krum"] < 0.1 * moved["FedAvg"]
