"""The poison table against every strategy, through real runs: what one bad site sends never counts.

The twin of each run is the same federation in which the bad site only reports errors; both must end with the same
bytes, so nothing of the poison was added, scaled by, or remembered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import builders
import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from fedge.client.relay import message_relay
from fedge.shared.config.federation import Config
from fedge.shared.wire.tensors import read
from fedge.simulations.engine import simulate
from fedge.simulations.grid import InProcessGrid

BAD = "site-4"
STRATEGIES = [
    *("FedAvg", "FedProx", "FedAvgM", "FedAdam", "FedYogi", "FedAdagrad", "QFedAvg", "FedMedian"),
    *("FedTrimmedAvg", "Krum", "MultiKrum", "Bulyan", "Scaffold"),
]

#: One of each kind: a mean, state at the server, at the sites, a median, and one that chooses. The others are in soak.
UNLIKE = ("FedAvg", "FedAdam", "Scaffold", "FedMedian", "Krum")


def _map_first(content: RecordDict, change: Callable[[np.ndarray], np.ndarray]) -> None:
    arrays = content.array_records["arrays"]
    name = next(iter(arrays))
    arrays[name] = Array(change(arrays[name].numpy()))


def _fill(value: float) -> Callable[[RecordDict], None]:
    def change(a: np.ndarray) -> np.ndarray:
        a = a.copy()
        a.flat[0] = value
        return a

    return lambda content: _map_first(content, change)


def _examples(value: Any) -> Callable[[RecordDict], None]:
    def poison(content: RecordDict) -> None:
        content.metric_records["metrics"]["num-examples"] = value

    return poison


def _text_examples(content: RecordDict) -> None:
    metrics = content.metric_records["metrics"]
    content["metrics"] = ConfigRecord({**dict(metrics), "num-examples": "many"})  # type: ignore[dict-item]


def _drop_tensor(content: RecordDict) -> None:
    arrays = content.array_records["arrays"]
    del arrays[next(iter(arrays))]


def _extra_tensor(content: RecordDict) -> None:
    content.array_records["arrays"]["backdoor"] = Array(np.zeros(3, np.float32))


def _rename_tensor(content: RecordDict) -> None:
    arrays = content.array_records["arrays"]
    items = list(arrays.items())
    content["arrays"] = ArrayRecord(
        {("renamed" if i == 0 else k): v for i, (k, v) in enumerate(items)}
    )


def _old_round(content: RecordDict) -> None:
    config = content.config_records["config"]
    config["server-round"] = int(str(config["server-round"])) - 1


def _other_run(content: RecordDict) -> None:
    content.config_records["config"]["run-id"] = "r-of-yesterday"


def _other_site(content: RecordDict) -> None:
    content.config_records["config"]["site"] = "site-1"


def _lying_type(content: RecordDict) -> None:
    arrays = content.array_records["arrays"]
    name = next(iter(arrays))
    honest = arrays[name]
    arrays[name] = Array(dtype="float64", shape=honest.shape, stype=honest.stype, data=honest.data)


def _flood_of_metrics(content: RecordDict) -> None:
    metrics = content.metric_records["metrics"]
    for i in range(1000):
        metrics[f"patient {i}"] = 1.0


def _lying_shape(content: RecordDict) -> None:
    arrays = content.array_records["arrays"]
    name = next(iter(arrays))
    honest = arrays[name]
    arrays[name] = Array(
        dtype=honest.dtype,
        shape=honest.shape,
        stype=honest.stype,
        data=Array(np.ones(1, np.float32)).data,
    )


# Every row of the reliability table that must be rejected: what to do to the reply, and the number expected.
REJECTED: dict[str, tuple[Callable[[RecordDict], None], str]] = {
    "NaN": (_fill(np.nan), "FE-401"),
    "Inf": (_fill(np.inf), "FE-401"),
    "1e30": (_fill(1e30), "FE-402"),
    "norm": (lambda c: _map_first(c, lambda a: a + np.float32(1e3)), "FE-402"),
    "examples 1e9": (_examples(1_000_000_000), "FE-403"),
    "examples over registered": (_examples(100_000), "FE-403"),
    "examples negative": (_examples(-5), "FE-403"),
    "examples NaN": (_examples(float("nan")), "FE-403"),
    "examples zero": (_examples(0), "FE-403"),
    "examples fraction": (_examples(12.5), "FE-403"),
    "examples list": (_examples([10]), "FE-403"),
    "examples text": (_text_examples, "FE-411"),
    "shape (1,)": (lambda c: _map_first(c, lambda a: np.ones(1, a.dtype)), "FE-404"),
    "other shape": (lambda c: _map_first(c, lambda a: np.ones((3, 3), a.dtype)), "FE-404"),
    "lying shape": (_lying_shape, "FE-404"),
    "lying dtype": (_lying_type, "FE-404"),
    "flood of metrics": (_flood_of_metrics, "FE-411"),
    "other dtype": (lambda c: _map_first(c, lambda a: a.astype(np.float64)), "FE-404"),
    "missing tensor": (_drop_tensor, "FE-404"),
    "extra tensor": (_extra_tensor, "FE-404"),
    "renamed tensor": (_rename_tensor, "FE-404"),
    "extra record": (lambda c: c.__setitem__("more", ArrayRecord()), "FE-411"),
    "replayed round": (_old_round, "FE-406"),
    "other run": (_other_run, "FE-406"),
    "other site": (_other_site, "FE-411"),
}


def _hostile(poisons: list[Callable[[RecordDict], None] | None]) -> ClientApp:
    """fedge's relay, but the bad site alters its reply to round r by ``poisons[r - 1]``; None raises instead."""
    app = ClientApp()
    app.query("register")(message_relay.forward)
    app.evaluate()(message_relay.forward)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        server_round = int(str(message.content.config_records["config"]["server-round"]))
        reply = message_relay.forward(message, context)
        if context.node_config["site"] != BAD:
            return reply
        poison = poisons[server_round - 1]
        if poison is None:
            raise RuntimeError("/secret/path/of/patient-42.csv is broken")
        content = RecordDict({k: v.copy() for k, v in reply.content.items()})
        poison(content)
        return Message(content, reply_to=message)

    return app


def _config(strategy: str, rounds: int, **round_section: Any) -> Config:
    run, strategy_section = {"rounds": rounds, "evaluate-every": rounds}, {"name": strategy}
    return builders.config(
        "breast-cancer", run=run, sites={"count": 8}, strategy=strategy_section, round=round_section
    )


def _lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]


def _play(
    tmp_path: Path, strategy: str, poisons: list[Callable[[RecordDict], None] | None]
) -> tuple[Path, Path]:
    """A poisoned run and its twin without the bad site."""
    config = _config(strategy, len(poisons))
    simulate(config, tmp_path / "poisoned", app=_hostile(poisons))
    simulate(config, tmp_path / "honest", app=_hostile([None] * len(poisons)))
    return tmp_path / "poisoned", tmp_path / "honest"


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy",
    [pytest.param(s, marks=() if s in UNLIKE else pytest.mark.soak) for s in STRATEGIES],
)
def test_no_poison_counts(strategy: str, tmp_path: Path) -> None:
    poisoned, honest = _play(tmp_path, strategy, [poison for poison, _ in REJECTED.values()])
    for (kind, (_, code)), line in zip(REJECTED.items(), _lines(poisoned), strict=True):
        assert line["outcome"] == "committed", kind
        assert [(r["site"], r["code"]) for r in line["rejected"]] == [(BAD, code)], kind
        assert len(line["trained"]) == 7, kind
        assert BAD not in line["trained"], kind
    weights = read(poisoned / "model.safetensors")
    assert all(np.isfinite(a).all() for a in weights.values())
    assert (poisoned / "model.safetensors").read_bytes() == (
        honest / "model.safetensors"
    ).read_bytes()


def test_the_twin_learns_without_the_bad_site_and_the_poison_would_have_counted(
    tmp_path: Path,
) -> None:
    """Were the gate open, a poison would change the model: an honest eighth site does."""
    config = _config("FedAvg", 1)
    simulate(config, tmp_path / "all")
    simulate(config, tmp_path / "seven", app=_hostile([None]))
    assert (tmp_path / "all/model.safetensors").read_bytes() != (
        tmp_path / "seven/model.safetensors"
    ).read_bytes()


def test_an_exception_keeps_its_text_at_the_site(tmp_path: Path) -> None:
    directory = simulate(_config("FedAvg", 1), tmp_path / "run", app=_hostile([None]))
    (line,) = _lines(directory.path)
    assert [(r["site"], r["code"], r["outcome"]) for r in line["rejected"]] == [
        (BAD, "FE-410", "error")
    ]
    for path in directory.path.rglob("*"):
        if path.is_file():
            assert b"patient-42" not in path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["extra metric", "metric NaN", "metric missing"])
def test_a_bad_metric_is_dropped_and_the_update_counts(name: str, tmp_path: Path) -> None:
    def poison(content: RecordDict) -> None:
        metrics = content.metric_records["metrics"]
        match name:
            case "extra metric":
                metrics["auc\x1b[2J"] = 0.9
            case "metric NaN":
                metrics["train-loss"] = float("nan")
            case _:
                del metrics["train-loss"]

    config = _config("FedAvg", 1)
    simulate(config, tmp_path / "poisoned", app=_hostile([poison]))
    simulate(config, tmp_path / "honest")
    (line,) = _lines(tmp_path / "poisoned")
    assert BAD in line["trained"]
    assert [(d["site"], d["code"]) for d in line["dropped"]] == [(BAD, "FE-405")]
    assert "\x1b" not in line["dropped"][0]["metric"]
    same = [
        (tmp_path / which / "model.safetensors").read_bytes() for which in ("poisoned", "honest")
    ]
    assert same[0] == same[1]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [float("nan"), -1.0, 1e30, None])
def test_a_bad_loss_is_rejected_where_it_is_the_weight(loss: float | None, tmp_path: Path) -> None:
    def poison(content: RecordDict) -> None:
        if loss is None:
            del content.metric_records["metrics"]["train-loss"]
        else:
            content.metric_records["metrics"]["train-loss"] = loss

    poisoned, honest = _play(tmp_path, "QFedAvg", [poison])
    (line,) = _lines(poisoned)
    assert [(r["site"], r["code"]) for r in line["rejected"]] == [(BAD, "FE-401")]
    assert (poisoned / "model.safetensors").read_bytes() == (
        honest / "model.safetensors"
    ).read_bytes()


class _BadNetwork(InProcessGrid):
    """The bad site's training replies arrive twice, late, never, or to a request that was never sent."""

    kind = ""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        for reply in list(replies):
            bad = reply.metadata.src_node_id == 4 and reply.metadata.message_type == "train"
            if not bad:
                continue
            if self.kind == "twice":
                replies.append(reply)
            elif self.kind == "stray":
                other = Message(RecordDict(), dst_node_id=4, message_type="train")
                replies.append(Message(RecordDict({"metrics": MetricRecord()}), reply_to=other))
            elif self.kind == "never":
                replies.remove(reply)
        return replies

    def elapsed(self, reply: Message) -> float:
        bad = reply.metadata.src_node_id == 4 and reply.metadata.message_type == "train"
        return 1e6 if bad and self.kind == "late" else 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "code", "outcome", "counts"),
    [
        ("twice", "FE-407", "duplicate", True),
        ("stray", "FE-406", "stale", True),
        ("late", "FE-408", "late", False),
        ("never", "FE-409", "absent", False),
    ],
)
def test_replies_out_of_turn_have_a_typed_outcome(
    kind: str, code: str, outcome: str, counts: bool, tmp_path: Path
) -> None:
    network = type("_Network", (_BadNetwork,), {"kind": kind})
    config = _config("FedAvg", 1, deadline=1.0)
    simulate(config, tmp_path / "run", grid=network)
    simulate(config, tmp_path / "twin", app=ClientApp_of_all() if counts else _hostile([None]))
    (line,) = _lines(tmp_path / "run")
    assert [(r["code"], r["outcome"]) for r in line["rejected"]] == [(code, outcome)]
    assert (BAD in line["trained"]) is counts
    same = [(tmp_path / which / "model.safetensors").read_bytes() for which in ("run", "twin")]
    assert same[0] == same[1]


def ClientApp_of_all() -> ClientApp:
    """The relay as it is."""
    from fedge.client.app import app

    return app


def test_error_numbers_of_a_site_are_shown_only_when_known(tmp_path: Path) -> None:
    app = ClientApp()
    app.query("register")(message_relay.forward)
    app.evaluate()(message_relay.forward)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_config["site"] == BAD:
            return Message(Error(code=99_999, reason="<script>alert(1)</script>"), reply_to=message)
        return message_relay.forward(message, context)

    directory = simulate(_config("FedAvg", 1), tmp_path / "run", app=app)
    (line,) = _lines(directory.path)
    assert line["rejected"][0]["code"] == "FE-410"
    assert "script" not in line["rejected"][0]["reason"]
    assert "<script>alert" not in directory.report.read_text()


@pytest.mark.parametrize(
    ("claim", "shown"),
    [
        ({"num-train-examples": 10_000_000}, "admission.max-size-ratio"),
        ({"num-train-examples": 2**40}, "num-train-examples"),
    ],
)
def test_a_site_cannot_take_over_by_what_it_registers(
    claim: dict[str, int], shown: str, tmp_path: Path
) -> None:
    app = ClientApp()
    app.train()(message_relay.forward)
    app.evaluate()(message_relay.forward)

    @app.query("register")
    def register(message: Message, context: Context) -> Message:
        reply = message_relay.forward(message, context)
        if context.node_config["site"] != BAD:
            return reply
        content = RecordDict({k: v.copy() for k, v in reply.content.items()})
        content.metric_records["metrics"].update(claim)
        return Message(content, reply_to=message)

    directory = simulate(_config("FedAvg", 1), tmp_path / "run", app=app)
    (line,) = _lines(directory.path)
    assert BAD not in line["invited"]
    assert [(r["site"], r["code"]) for r in line["rejected"]] == [(BAD, "FE-412")]
    assert shown in line["rejected"][0]["reason"]


@pytest.mark.slow
def test_a_loss_far_above_the_others_does_not_take_over_where_it_is_the_weight(
    tmp_path: Path,
) -> None:
    def poison(content: RecordDict) -> None:
        content.metric_records["metrics"]["train-loss"] = 9999.0

    poisoned, honest = _play(tmp_path, "QFedAvg", [poison])
    (line,) = _lines(poisoned)
    assert [(r["site"], r["code"]) for r in line["rejected"]] == [(BAD, "FE-401")]
    assert (poisoned / "model.safetensors").read_bytes() == (
        honest / "model.safetensors"
    ).read_bytes()
