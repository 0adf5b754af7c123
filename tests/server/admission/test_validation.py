"""The gate by itself: generated replies never crash it, and what it admits is exactly what it promises."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.server.admission.validation import admit_evaluate, admit_train
from fedge.server.admission.validation_result import (
    Expected,
    Registration,
    Rejection,
    printable,
    reported_words,
)
from fedge.server.aggregation.updates import record
from fedge.server.participants.members import admit_registration
from fedge.shared.config.sections import AdmissionSection
from fedge.shared.error_catalogue import CATALOGUE
from fedge.shared.tasks.standardised_columns import Bound
from fedge.simulations import flower_patches

RUN, SITE, REGISTERED = "r-1", "site-1", 100
REFERENCE = {
    "weight": np.ones((2, 3), np.float32),
    "steps": np.asarray(4, np.int64),
    "control/weight": np.full((2, 3), 50, np.float32),
}
COUNTERS = ("correct", "examples", "loss-sum")
EXPECTED = Expected(RUN, 3, REFERENCE, AdmissionSection(), counters=COUNTERS)


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    flower_patches.identify(1, 0)


def _request() -> Message:
    return Message(RecordDict(), dst_node_id=1, message_type="train")


def _reply(**records: Any) -> Message:
    return Message(
        RecordDict({k: v for k, v in records.items() if v is not None}), reply_to=_request()
    )


def _config(**changes: Any) -> ConfigRecord:
    return ConfigRecord({"run-id": RUN, "server-round": 3, "site": SITE, **changes})


def _honest(**metrics: Any) -> Message:
    arrays = {k: a + np.asarray(1, a.dtype) for k, a in REFERENCE.items()}
    return _reply(
        arrays=record(arrays),
        config=_config(),
        metrics=MetricRecord({"num-examples": 10, "train-loss": 0.5, **metrics}),
    )


def test_an_honest_reply_is_admitted_as_it_is() -> None:
    verdict = admit_train(_honest(), SITE, REGISTERED, EXPECTED)
    assert verdict.rejection is None
    assert verdict.drops == []
    assert verdict.update is not None
    assert (verdict.update.num_examples, verdict.update.train_loss) == (10, 0.5)
    for name, a in REFERENCE.items():
        np.testing.assert_array_equal(verdict.update.arrays[name], a + np.asarray(1, a.dtype))
    assert list(verdict.update.arrays) == list(REFERENCE)


def test_the_order_of_a_foreign_record_does_not_matter() -> None:
    reply = _honest()
    arrays = reply.content.array_records["arrays"]
    reply.content["arrays"] = ArrayRecord(dict(reversed(list(arrays.items()))))
    verdict = admit_train(reply, SITE, REGISTERED, EXPECTED)
    assert verdict.update is not None
    assert list(verdict.update.arrays) == list(REFERENCE)


def test_the_norm_is_of_the_difference_and_of_controls_by_themselves() -> None:
    reply = _honest()
    far = REFERENCE["weight"] + np.float32(99.0 / math.sqrt(6))
    reply.content.array_records["arrays"]["weight"] = Array(far)
    assert admit_train(reply, SITE, REGISTERED, EXPECTED).update is not None
    too_far = REFERENCE["weight"] + np.float32(101.0 / math.sqrt(6))
    reply.content.array_records["arrays"]["weight"] = Array(too_far)
    rejection = admit_train(reply, SITE, REGISTERED, EXPECTED).rejection
    assert rejection is not None
    assert (rejection.code, rejection.reason) == (402, "update norm: must be at most 100, got 101")

    reply = _honest()
    reply.content.array_records["arrays"]["control/weight"] = Array(
        np.full((2, 3), 1e6, np.float32)
    )
    rejection = admit_train(reply, SITE, REGISTERED, EXPECTED).rejection
    assert rejection is not None
    assert rejection.reason.startswith("control norm")


@pytest.mark.parametrize(
    ("examples", "admitted"), [(1, True), (100, True), (101, False), (True, False)]
)
def test_a_site_may_claim_what_it_registered_and_no_more(examples: Any, admitted: bool) -> None:
    reply = _honest()
    if examples is True:
        # Flower's record refuses a bool, a hostile peer's bytes might not.
        reply.content.metric_records["metrics"].__dict__["_data"]["num-examples"] = True
    else:
        reply.content.metric_records["metrics"]["num-examples"] = examples
    assert (admit_train(reply, SITE, REGISTERED, EXPECTED).update is not None) is admitted


@pytest.mark.parametrize(("steps", "admitted"), [(4000, True), (2**62, False), (-(2**63), False)])
def test_an_integer_tensor_may_step_but_not_leap(steps: int, admitted: bool) -> None:
    reply = _honest()
    reply.content.array_records["arrays"]["steps"] = Array(np.asarray(steps, np.int64))
    assert (admit_train(reply, SITE, REGISTERED, EXPECTED).update is not None) is admitted


def test_an_empty_reply_and_an_error_are_typed() -> None:
    error = Message(Error(code=413, reason="FE-413"), reply_to=_request())
    rejection = admit_train(error, SITE, REGISTERED, EXPECTED).rejection
    assert rejection is not None
    assert (rejection.code, rejection.outcome) == (410, "error")
    assert "FE-413" in rejection.reason


def _evaluation(**metrics: Any) -> Message:
    return _reply(config=_config(), metrics=MetricRecord({"num-examples": 10, **metrics}))


def test_counters_beyond_the_examples_are_dropped() -> None:
    reply = _evaluation(**{"correct": 11.0, "examples": 10.0, "loss-sum": 3.5, "auc": 1.0})
    verdict = admit_evaluate(reply, SITE, REGISTERED, EXPECTED)
    assert verdict.evaluation is not None
    assert verdict.evaluation.counters == {"examples": 10.0, "loss-sum": 3.5}
    assert sorted(d.metric for d in verdict.drops) == ["auc", "correct"]


@pytest.mark.parametrize("value", [float("nan"), -1.0, 1e30])
def test_a_bad_counter_is_dropped_and_named(value: float) -> None:
    reply = _evaluation(**{"correct": 9.0, "examples": 10.0, "loss-sum": value})
    verdict = admit_evaluate(reply, SITE, REGISTERED, EXPECTED)
    assert verdict.evaluation is not None
    assert "loss-sum" not in verdict.evaluation.counters
    assert [d.metric for d in verdict.drops] == ["loss-sum"]


def _registration(**changes: Any) -> Message:
    config = {"run-id": RUN, "server-round": 0, "site": SITE}
    metrics: dict[str, Any] = {
        "num-train-examples": 10,
        "num-test-examples": 5,
        "feature-total": [50.0, 5.0],
        "feature-total-of-squares": [260.0, 4.0],
    }
    for key, value in changes.items():
        (config if key in config else metrics)[key] = value
    return _reply(config=ConfigRecord({**config}), metrics=MetricRecord({**metrics}))


BOUNDS = (Bound("age", 0.0, 10.0), Bound("sex", 0.0, 1.0))


def test_a_registration_is_admitted() -> None:
    admitted = admit_registration(_registration(), "node 1", RUN, AdmissionSection(), BOUNDS)
    assert isinstance(admitted, Registration)
    assert admitted.statistics is not None
    assert admitted.statistics.standardise().mean == (5.0, 0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"site": "../../etc"},
        {"site": "Site 1"},
        {"site": ""},
        {"num-train-examples": 0},
        {"num-train-examples": 1_000_000_000},
        {"num-train-examples": -3},
        {"num-train-examples": 2.5},
        {"num-test-examples": float("nan")},
        {"feature-total": [float("nan"), 5.0]},
        {"feature-total": [1e30, 5.0]},
        {"feature-total": [50.0]},
        {"feature-total": 3},
        {"feature-total-of-squares": [1.0, 4.0]},
        {"feature-total-of-squares": [1e12, 4.0]},
        {"run-id": "r-other"},
    ],
)
def test_a_bad_registration_is_refused(change: dict[str, Any]) -> None:
    refused = admit_registration(_registration(**change), "node 1", RUN, AdmissionSection(), BOUNDS)
    assert isinstance(refused, Rejection)


def test_printable_text_is_short_and_plain() -> None:
    assert printable("a\x1b[31m\nb\u202e") == "a?[31m?b?"
    assert len(printable("x" * 10_000)) == 64
    assert len(printable(list(range(10_000)))) == 64


# Generated replies: an honest one, altered up to three times. Few draws each, as there are ten thousand.

_VALUES: list[Any] = [
    0, 1, -1, 10, 101, 2**31, 2**70, -(2**70), 0.0, -0.0, 0.5, -1.0, 10.0, 1e30, 1e308, math.nan, math.inf, -math.inf,
    [], [1], [1.5, math.nan], "", "many", "\x00", "\u202e", RUN, SITE, b"", b"\xff", True, [True], ["a"],
]  # fmt: skip
_KEYS = [
    "num-examples",
    "train-loss",
    "run-id",
    "server-round",
    "site",
    *COUNTERS,
    "auc",
    "",
    "x" * 500,
]
_TENSORS = [*REFERENCE, "renamed", ""]


def _arrays_to_send() -> list[Array]:
    made = []
    for shape in ((2, 3), (), (1,), (3, 2)):
        for value in (0.0, 1e30, math.nan, math.inf, -math.inf):
            for dtype in ("float32", "int64", "float16"):
                with np.errstate(all="ignore"):
                    made.append(Array(np.full(shape, value).astype(dtype)))
    good = Array(np.ones((2, 3), np.float32))
    for data in (
        b"",
        b"\x93NUMPY",
        good.data[:-1],
        good.data + b"x",
        good.data[:40],
        b"\x00" * 200,
    ):
        made += [Array("float32", (2, 3), stype, data) for stype in ("numpy.ndarray", "pickle", "")]
    made += [
        Array("float32", (10**12,), "numpy.ndarray", good.data),
        Array("O", (2, 3), "numpy.ndarray", good.data),
    ]
    return made


_ARRAYS = _arrays_to_send()
_alterations = st.one_of(
    st.tuples(st.just("tensor"), st.sampled_from(_TENSORS), st.sampled_from(_ARRAYS)),
    st.tuples(st.just("bytes"), st.sampled_from(list(REFERENCE)), st.binary(max_size=64)),
    st.tuples(st.just("metrics"), st.sampled_from(_KEYS), st.sampled_from(_VALUES)),
    st.tuples(st.just("metrics"), st.sampled_from(_KEYS), st.floats()),
    st.tuples(st.just("config"), st.sampled_from(_KEYS), st.sampled_from(_VALUES)),
    st.tuples(
        st.just("without"),
        st.sampled_from(["arrays", "metrics", "config"]),
        st.sampled_from(_KEYS + _TENSORS),
    ),
    st.tuples(
        st.just("swap"), st.sampled_from(["arrays", "metrics", "config", "more"]), st.integers(0, 3)
    ),
    st.tuples(st.just("error"), st.integers(-(2**31), 2**31), st.text(max_size=9)),
)


def _alter(content: dict[str, Any], kind: str, name: Any, value: Any) -> None:
    try:
        match kind:
            case "tensor":
                content["arrays"][name] = value
            case "bytes":
                content["arrays"][name] = Array("float32", (2, 3), "numpy.ndarray", value)
            case "metrics" | "config":
                content[kind][name] = value
            case "without":
                del content[name][value]
            case "swap":
                records = (ArrayRecord(), MetricRecord(), ConfigRecord(), None)
                content[name] = records[value]
                if value == 3:
                    del content[name]
    except (KeyError, TypeError, ValueError):
        # Flower's own records refuse it, so no message can hold it.
        return


def _altered(alterations: Iterable[tuple[str, Any, Any]]) -> Message:
    content: dict[str, Any] = dict(_honest().content.items())
    for kind, name, value in alterations:
        if kind == "error":
            return Message(Error(name, value), reply_to=_request())
        _alter(content, kind, name, value)
    return Message(RecordDict(content), reply_to=_request())


def _through_the_gate(reply: Message) -> bool:
    """Whether the update is admitted; fails where the gate does not keep its promise."""
    verdict = admit_train(reply, SITE, REGISTERED, EXPECTED)
    assert (verdict.update is None) != (verdict.rejection is None)
    if verdict.update is not None:
        update = verdict.update
        assert 1 <= update.num_examples <= REGISTERED
        assert update.train_loss is None or 0 <= update.train_loss <= 10_000
        for name, reference in REFERENCE.items():
            assert update.arrays[name].shape == reference.shape
            assert update.arrays[name].dtype == reference.dtype
            assert np.isfinite(update.arrays[name]).all()
        difference = (update.arrays["weight"] - REFERENCE["weight"]).astype(np.float64)
        assert np.linalg.norm(difference) <= 100
    if verdict.rejection is not None:
        assert verdict.rejection.code in CATALOGUE
        assert len(verdict.rejection.reason) < 400
        assert verdict.rejection.reason.isprintable()
    evaluation = admit_evaluate(reply, SITE, REGISTERED, EXPECTED)
    assert (evaluation.evaluation is None) != (evaluation.rejection is None)
    if evaluation.evaluation is not None:
        assert all(math.isfinite(v) and v >= 0 for v in evaluation.evaluation.counters.values())
    registration = admit_registration(reply, "node 1", RUN, AdmissionSection(), BOUNDS)
    assert isinstance(registration, Registration | Rejection)
    return verdict.update is not None


@pytest.mark.slow
@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.lists(_alterations, min_size=1, max_size=3))
def test_generated_replies(alterations: list[tuple[str, Any, Any]]) -> None:
    _through_the_gate(_altered(alterations))


def _pick(random: np.random.Generator, among: Sequence[Any]) -> Any:
    return among[int(random.integers(len(among)))]


def _text(random: np.random.Generator) -> str:
    points = random.integers(0, sys.maxunicode + 1, int(random.integers(10)))
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def _random_alteration(random: np.random.Generator) -> tuple[str, Any, Any]:
    """One of ``_alterations``, without the search of Hypothesis; floats are any eight bytes."""
    match kind := _pick(
        random, ("tensor", "bytes", "value", "float", "config", "without", "swap", "error")
    ):
        case "tensor":
            return kind, _pick(random, _TENSORS), _pick(random, _ARRAYS)
        case "bytes":
            return kind, _pick(random, list(REFERENCE)), random.bytes(int(random.integers(65)))
        case "value":
            return "metrics", _pick(random, _KEYS), _pick(random, _VALUES)
        case "float":
            return "metrics", _pick(random, _KEYS), struct.unpack("d", random.bytes(8))[0]
        case "config":
            return kind, _pick(random, _KEYS), _pick(random, _VALUES)
        case "without":
            record = _pick(random, ("arrays", "metrics", "config"))
            return kind, record, _pick(random, _KEYS + _TENSORS)
        case "swap":
            record = _pick(random, ("arrays", "metrics", "config", "more"))
            return kind, record, int(random.integers(4))
        case _:
            return kind, int(random.integers(-(2**31), 2**31 + 1)), _text(random)


@pytest.mark.slow
def test_ten_thousand_generated_replies() -> None:
    random, admitted = np.random.default_rng(7), 0
    for _ in range(10_000):
        alterations = [_random_alteration(random) for _ in range(int(random.integers(1, 4)))]
        reply = _altered(alterations)
        try:
            admitted += _through_the_gate(reply)
        except Exception as error:
            error.add_note(f"alterations: {alterations}")
            raise
    # Neither all nor none: the generator reaches both sides of the gate.
    assert 500 < admitted < 9_500


@pytest.mark.parametrize(
    ("code", "reason", "number"),
    [
        (418, "FE-418", 418),
        (420, "secret text", 420),
        (2, "ValueError: ('FE-419 the bundle is not approved', '/secret/path')", 419),
        (2, "FE-999 or FE-4190 or XFE-4", None),
        (2, "x" * 5000 + " FE-419", None),
        (2, None, None),
        (8, "FE-419", None),
        (7, "", None),
    ],
)
def test_a_sites_error_is_reported_with_its_title_and_without_its_text(
    code: int, reason: Any, number: int | None
):
    words = reported_words(Error(code=code, reason=reason))
    assert "secret" not in words
    if number is None:
        assert "without a known number" in words
    else:
        assert f"FE-{number} ({CATALOGUE[number].title})" in words


@pytest.mark.parametrize(
    ("consumers", "server", "spent"),
    [
        (1.5, 2.5, (1.5, 2.5, 1e-5)),
        # A server that gets updates before the noise.
        (1.5, math.inf, (1.5, math.inf, 1e-5)),
        (math.inf, math.inf, None),
        (math.inf, 2.5, None),
        (1.5, -math.inf, None),
        (1.5, math.nan, None),
        (-1.0, math.inf, None),
        (1e10, math.inf, None),
    ],
)
def test_only_against_the_server_epsilon_may_be_infinite(
    consumers: float, server: float, spent: tuple[float, ...] | None
) -> None:
    expected = replace(EXPECTED, private=True)
    names = ("epsilon-consumers", "epsilon-server", "epsilon-delta")
    reply = _honest(**dict(zip(names, (consumers, server, 1e-5), strict=True)))
    del reply.content.metric_records["metrics"]["train-loss"]
    verdict = admit_train(reply, SITE, REGISTERED, expected)
    assert (verdict.update.epsilon, len(verdict.drops)) == (spent, 0 if spent else 3)
