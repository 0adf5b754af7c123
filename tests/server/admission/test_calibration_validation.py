"""What sites report about the final model is validated before anything is merged."""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedge.server.admission.calibration_validation import admit_ranges, admit_scores
from fedge.server.admission.validation_result import Expected
from fedge.shared import protocol
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.config.sections import AdmissionSection
from fedge.shared.privacy.mechanisms import noised_counts

SHA, OTHER = "ab" * 32, "cd" * 32
EXACT = Expected("r-1", 3, {}, AdmissionSection.model_validate({"max-loss": 100.0}))
NAMES = tuple(
    f"{k}/{c}" for k in ("onnx-fp32", "onnx-int8") for c in ("ran", "examples", "loss-sum")
)
DIGESTS = {"onnx-fp32": SHA, "onnx-int8": OTHER}


def reply(values, config=None, **more):
    request = Message(RecordDict({}), dst_node_id=1, message_type=protocol.CALIBRATE)
    answered = {"site": "site-1", "run-id": "r-1", "server-round": 3, "task": "t", **(config or {})}
    content = RecordDict(
        {"config": ConfigRecord(answered), "metrics": MetricRecord(values), **more}
    )
    return Message(content, reply_to=request)


def ranged(low=(-1.0, 0.0), high=(1.0, 0.0), count=10, graph=SHA, expected=EXACT, **values):
    metrics = {"num-examples": count, "range-low": list(low), "range-high": list(high), **values}
    return admit_ranges(
        reply(metrics, {"graph-sha256": graph}), "site-1", 10, expected, SHA, 2, bound=50.0
    )


def test_ranges_in_form_are_admitted():
    found, verdict = ranged()
    assert verdict.rejection is None
    assert found.num_examples == 10
    assert found.values.tolist() == [[-1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"graph": OTHER}, 429),
        ({"graph": 7}, 429),
        ({"low": [0.0]}, 411),
        ({"low": [float("nan"), 0.0]}, 401),
        ({"high": [float("inf"), 0.0]}, 401),
        ({"low": [2.0, 0.0]}, 401),
        ({"high": [51.0, 0.0]}, 401),
        ({"count": 11}, 403),
        ({"count": 0}, 403),
    ],
)
def test_other_ranges_are_rejected_by_number(changes, code):
    found, verdict = ranged(**changes)
    assert found is None
    assert verdict.rejection.code == code
    assert verdict.rejection.site == "site-1"


def scored(values, digests=(SHA, OTHER), count=10):
    metrics = {"num-examples": count, "counts": values}
    answer = reply(metrics, {"candidate-sha256": list(digests)})
    return admit_scores(answer, "site-1", 10, EXACT, DIGESTS, NAMES)


GOOD = [1.0, 10.0, 5.0, 1.0, 10.0, 6.0]


def test_scores_in_form_are_admitted():
    found, verdict = scored(GOOD)
    assert verdict.rejection is None
    assert found.absent == []
    assert found.counters["onnx-int8"] == {"ran": 1.0, "examples": 10.0, "loss-sum": 6.0}


@pytest.mark.parametrize(
    ("values", "digests", "code"),
    [
        ([*GOOD[:3], 0.0, 0.0, 0.0], (SHA, OTHER), 413),
        ([*GOOD[:3], 0.0, 0.0, 0.0], (SHA, ""), 413),
        ([*GOOD[:3], 0.0, 0.0, 0.0], (SHA, SHA), 429),
        (GOOD, (SHA, SHA), 429),
        ([*GOOD[:3], 0.5, 10.0, 6.0], (SHA, OTHER), 405),
        ([*GOOD[:3], 1.0, 9.0, 6.0], (SHA, OTHER), 405),
        ([*GOOD[:3], 1.0, 10.0, 1001.0], (SHA, OTHER), 405),
        ([*GOOD[:3], 1.0, 10.0, -1.0], (SHA, OTHER), 405),
    ],
)
def test_a_bad_candidate_is_left_out_by_number_and_the_other_counts(values, digests, code):
    found, verdict = scored(values, digests)
    assert verdict.rejection is None
    assert list(found.counters) == ["onnx-fp32"]
    ((site, subject, number),) = [(a.site, a.of, a.code) for a in found.absent]
    assert (site, subject, number) == ("site-1", "onnx-int8", code)


@pytest.mark.parametrize(
    ("values", "digests"),
    [(GOOD[:-1], (SHA, OTHER)), ([*GOOD, 1.0], (SHA, OTHER)), (GOOD, (SHA,)), (GOOD, ())],
)
def test_a_reply_of_another_length_is_rejected(values, digests):
    found, verdict = scored(values, digests)
    assert found is None
    assert verdict.rejection.code == 411


def test_noised_counts_may_lie_beyond_their_range_as_far_as_noise_goes():
    section = PrivacySection.model_validate(
        {
            "mechanism": "local",
            "noise-multiplier": 1.0,
            "metrics": "noised",
            "metrics-noise-multiplier": 1.0,
        }
    )
    names = tuple(f"bin-{i}" for i in range(8))
    noised = noised_counts.plan(section, names, 1, 2.0)
    assert noised.stddev == 2.0
    expected = Expected("r-1", 3, {}, AdmissionSection(), counters=names, noised=noised)
    spent = {"epsilon-consumers": 1.0, "epsilon-server": 1.0, "epsilon-delta": 1e-5}
    found, verdict = ranged(count=1, expected=expected, counts=[-15.0] * 4 + [16.0] * 4, **spent)
    assert found.values.tolist() == [-15.0] * 4 + [16.0] * 4
    assert verdict.evaluation.epsilon == (1.0, 1.0, 1e-5)
    for bad in ([-17.0] + [0.0] * 7, [0.0] * 7, [float("nan")] * 8, [18.0] + [0.0] * 7):
        found, verdict = ranged(count=1, expected=expected, counts=bad, **spent)
        assert found is None
        assert verdict.rejection.code in (401, 411)
