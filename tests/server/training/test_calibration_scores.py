"""A candidate's figures stand beside those of the fp32 graph over the same sites, or beside none."""

from __future__ import annotations

import pytest

from fedge.server.training import calibration_scores as scores
from fedge.shared.bundle.manifest_artefacts import ONNX_FP32, ONNX_INT8
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.privacy.mechanisms import noised_counts
from fedge.shared.tasks.registry import get_task

TASK = get_task("digits")
DIGESTS = {ONNX_FP32: "ab" * 32, ONNX_INT8: "cd" * 32}


def of(correct, examples=100.0, ran=1.0):
    return {"ran": ran, "correct": correct, "examples": examples, "loss-sum": 10.0}


def test_a_candidate_that_failed_at_the_hard_site_is_held_against_the_easy_one_alone():
    easy, hard = {ONNX_FP32: of(95.0), ONNX_INT8: of(90.0)}, {ONNX_FP32: of(55.0)}
    scored = scores.counted(TASK, DIGESTS, [easy, hard], None, 1)
    int8, fp32 = scored[ONNX_INT8], scored[ONNX_FP32]
    # Over all sites fp32 has 75 of 100, beside which INT8 would look better than it is.
    assert (fp32.metrics["accuracy"], fp32.reference["accuracy"]) == (0.75, 0.75)
    assert (int8.sites, int8.num_examples) == (1, 100)
    assert (int8.metrics["accuracy"], int8.reference["accuracy"]) == (0.90, 0.95)


def test_a_candidate_that_ran_where_fp32_did_not_has_nothing_to_be_compared_with():
    both, alone = {ONNX_FP32: of(95.0), ONNX_INT8: of(90.0)}, {ONNX_INT8: of(99.0)}
    scored = scores.counted(TASK, DIGESTS, [both, alone], None, 1)
    assert scored[ONNX_INT8].metrics["accuracy"] == 0.945
    assert scored[ONNX_INT8].reference == {}
    scored = scores.counted(TASK, DIGESTS, [alone], None, 1)
    assert (set(scored), scored[ONNX_INT8].reference) == ({ONNX_INT8}, {})


@pytest.mark.parametrize(
    ("ran", "examples", "same"), [(3.0, 300.0, True), (2.0, 300.0, False), (3.0, 290.0, False)]
)
def test_of_a_masked_sum_sites_and_examples_must_agree(ran, examples, same):
    values = {ONNX_FP32: of(270.0, 300.0, 3.0), ONNX_INT8: of(260.0, examples, ran)}
    summed = {f"{k}/{name}": v for k, counters in values.items() for name, v in counters.items()}
    scored = scores.counted(TASK, DIGESTS, [scores.by_kind(summed)], None, 3)
    assert scored[ONNX_INT8].reference.get("accuracy") == (0.9 if same else None)
    assert scored[ONNX_INT8].sites == ran


def test_one_that_ran_nowhere_is_left_out_and_noise_leaves_no_reference():
    summed = {f"{ONNX_INT8}/{name}": 0.0 for name in of(0.0)}
    assert scores.by_kind(summed) == {}
    section = PrivacySection.model_validate(
        {
            "mechanism": "example",
            "noise-multiplier": 1.0,
            "metrics": "noised",
            "metrics-noise-multiplier": 1.0,
        }
    )
    names = tuple(f"{kind}/{name}" for kind in DIGESTS for name in ("correct", "examples"))
    noised = noised_counts.plan(section, names)
    part = {kind: {"correct": 900.0, "examples": 1000.0} for kind in DIGESTS}
    scored = scores.counted(TASK, DIGESTS, [part], noised, 1)
    assert scored[ONNX_INT8].metrics == {"accuracy": 0.9}
    assert (scored[ONNX_INT8].sites, scored[ONNX_INT8].reference) == (None, {})
