"""Graphs in a child process: what they give, and every way in which one fails without harm to the others."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from fedge.client.training import onnx_runs
from fedge.client.training.onnx_runs import GraphFailedError, Terms
from fedge.shared import failpoints
from fedge.shared.compile.activation_observer import observed

X = np.array([[1.0, -2.0], [3.0, 0.5], [-4.0, 8.0]], np.float32)
TERMS = Terms(60.0, 1)


def graph(*nodes, output="logits", more=()):
    shape = ["batch", 2]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("input", output)]
    made = helper.make_graph(list(nodes), "g", value[:1], value[1:], list(more))
    opset = [helper.make_opsetid("", 18)]
    return helper.make_model(made, opset_imports=opset, ir_version=9).SerializeToString()


DOUBLE = graph(helper.make_node("Add", ["input", "input"], ["logits"]))
ROOT = graph(helper.make_node("Sqrt", ["input"], ["logits"]))


def endless():
    """Counts for hours."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["on"]),
            helper.make_node("Sin", ["value"], ["next"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("value", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, None),
        ],
    )
    more = [
        helper.make_tensor("times", TensorProto.INT64, [], [2**40]),
        helper.make_tensor("true", TensorProto.BOOL, [], [1]),
    ]
    return graph(
        helper.make_node("Loop", ["times", "true", "input"], ["logits"], body=body), more=more
    )


@pytest.mark.slow
def test_each_graph_gives_its_logits_or_why_there_are_none():
    graphs = [DOUBLE, b"no graph", ROOT, DOUBLE]
    good, broken, nan, again = onnx_runs.logits(graphs, X, 2, TERMS)
    assert np.array_equal(good, 2 * X)
    assert np.array_equal(again, good)
    assert isinstance(broken, GraphFailedError)
    assert "finite" in str(nan)
    (narrow,) = onnx_runs.logits([DOUBLE], X, 3, TERMS)
    assert "must be of shape (3, 3), got (3, 2)" in str(narrow)


@pytest.mark.slow
def test_logits_that_are_not_finite_are_given_where_that_is_asked_for():
    (rooted,) = onnx_runs.logits([ROOT], X, 2, TERMS, finite=False)
    assert np.array_equal(np.isfinite(rooted), X >= 0)
    (narrow,) = onnx_runs.logits([DOUBLE], X, 3, TERMS, finite=False)
    assert "must be of shape (3, 3), got (3, 2)" in str(narrow)


@pytest.mark.slow
def test_a_crash_is_a_result_and_the_others_get_another_child(monkeypatch):
    monkeypatch.setenv(failpoints.VARIABLE, "graph-run:2")
    first, crashed, third = onnx_runs.logits([DOUBLE, DOUBLE, DOUBLE], X, 2, TERMS)
    assert np.array_equal(first, 2 * X)
    assert str(crashed) == "crashed (SIGKILL)"
    assert np.array_equal(third, 2 * X)


@pytest.mark.slow
def test_a_graph_that_hangs_is_ended_alone():
    hung, good = onnx_runs.logits([endless(), DOUBLE], X, 2, Terms(1.0, 1))
    assert str(hung) == "must be run within 1 s"
    assert np.array_equal(good, 2 * X)


@pytest.mark.slow
def test_an_observed_graph_tells_how_far_each_example_goes():
    two = graph(
        helper.make_node("Add", ["input", "input"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["logits"]),
    )
    found = onnx_runs.extremes(observed(two, ("input", "sum", "logits")), X, 3, TERMS)
    by_hand = [
        np.stack([a.min(axis=1), a.max(axis=1)], 1) for a in (X, 2 * X, np.maximum(2 * X, 0))
    ]
    assert np.array_equal(found, np.stack(by_hand, axis=1))
    with pytest.raises(GraphFailedError):
        onnx_runs.extremes(b"no graph", X, 3, TERMS)


def test_only_tensors_of_the_graph_are_observed():
    for tensors in ((), ("another",)):
        with pytest.raises(ValueError, match="must be of the graph"):
            observed(DOUBLE, tensors)
