from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedge.edge.outputs import parity
from fedge.shared.bundle.bundle import open_bundle
from fedge.shared.bundle.manifest_artefacts import (
    ONNX_FP16,
    ONNX_INT8,
    ONNX_INT8_SYMMETRIC,
    TRT_INT8,
)
from fedge.shared.crypto.dsse import load_public
from fedge.shared.errors import BundleError
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema

OUTPUT = OutputSchema(labels=("x", "y", "z"), activation="softmax")


@pytest.mark.slow
def test_batches_differ_and_those_too_large_to_hold_are_left_out(
    image_bundle: Any, trust: Any
) -> None:
    manifest = open_bundle(image_bundle, load_public(trust)).manifest
    one, two = parity.examples(manifest, manifest.preprocessing, (1, 2))
    assert (one.shape, two.shape) == ((1, 1, 2, 3), (2, 1, 2, 3))
    assert not np.array_equal(one[0], two[0])
    large = replace(manifest, input=InputSchema(shape=(2**13, 2**11)), preprocessing=())
    assert [len(b) for b in parity.examples(large, (), (1, 7))] == [1]


def test_difference_counts_labels_and_the_largest_gap() -> None:
    reference = [np.asarray([[1.0, 2, 3]]), np.asarray([[0.0, -8, 1], [5, 1, 1]])]
    logits = [np.asarray([[1.0, 2, 3.5]]), np.asarray([[2.0, -8, 1], [5, 1, 1]])]
    diff = parity.difference(logits, reference, OUTPUT, "a")
    assert (diff.max_abs_difference, diff.largest_logit) == (2.0, 8.0)
    assert diff.agreement == pytest.approx(2 / 3)
    logits[1][0, 0] = np.nan
    with pytest.raises(BundleError) as error:
        parity.difference(logits, reference, OUTPUT, "a")
    assert error.value.code == 709


def test_what_is_too_far_off_is_refused() -> None:
    close = parity.Difference(0.09, 10.0, 1.0)
    parity.check(ONNX_FP16, close, "a")
    with pytest.raises(BundleError) as error:
        parity.check(ONNX_FP16, replace(close, max_abs_difference=0.11), "a")
    assert error.value.code == 710
    assert error.value.message == "a: must be within 0.1 of the fp32 graph, got 0.11"


def test_int8_must_give_the_labels_of_fp32_and_others_need_not() -> None:
    reference = [np.tile([1.0, 0.9, 0.8], (10, 1))]
    for wrong, refused in ((1, False), (2, True), (10, True)):
        logits = [reference[0].copy()]
        logits[0][:wrong] = [0.8, 0.9, 1.0]  # within a quarter of the largest, every label another
        diff = parity.difference(logits, reference, OUTPUT, "a")
        assert diff.agreement == pytest.approx(1 - wrong / 10)
        assert diff.contradicted == pytest.approx(wrong / 10)
        assert not parity.obstacle(ONNX_FP16, replace(diff, max_abs_difference=0.0))
        for kind in (ONNX_INT8, ONNX_INT8_SYMMETRIC, TRT_INT8):
            assert bool(parity.obstacle(kind, diff)) is refused
    with pytest.raises(BundleError) as error:
        parity.check(ONNX_INT8, diff, "a")
    assert error.value.code == 710
    assert error.value.message == (
        "a: must agree with the fp32 graph's labels on 90% of the inputs, got 0%"
    )


def test_a_tie_is_no_contradiction() -> None:
    reference = [np.asarray([[1.0, 0.995, 0], [1.0, 0.5, 0.995], [0, 0, 1]])]
    logits = [np.asarray([[0.99, 1.0, 0], [0.9, 1.0, 0.9], [0, 0, 1]])]
    diff = parity.difference(logits, reference, OUTPUT, "a")
    assert diff.agreement == pytest.approx(1 / 3)
    # The second row takes a label that fp32 clearly puts last.
    assert diff.contradicted == pytest.approx(1 / 3)
    sigmoid = OutputSchema(labels=("no", "yes"), activation="sigmoid", threshold=0.25)
    border = np.log(1 / 3)
    reference = [np.asarray([[border + 0.01], [border + 0.5], [4.0]])]
    logits = [np.asarray([[border - 0.1], [border - 0.1], [4.0]])]
    diff = parity.difference(logits, reference, sigmoid, "a")
    assert diff.agreement == pytest.approx(1 / 3)
    assert diff.contradicted == pytest.approx(1 / 3)
