"""Which targets are reported as failed: those whose build failed and that have no other artefact."""

import functools
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedge.server.release import artefacts
from fedge.server.release.artefacts import Builder
from fedge.shared.compile import tensorrt
from fedge.shared.compile.quantisation import activations
from fedge.shared.compile.targets import parse
from fedge.shared.compile.tensorrt_process import Built
from fedge.shared.errors import ReleaseError


@pytest.fixture(scope="module")
def fp32():
    """A product and a rectifier of three values."""
    weights = numpy_helper.from_array(np.eye(3, dtype=np.float32), "w")
    nodes = [
        helper.make_node("MatMul", ["input", "w"], ["product"]),
        helper.make_node("Relu", ["product"], ["logits"]),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3])
        for name in ("input", "logits")
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.fixture
def outcome(fp32):
    """What a list of targets gives, with activation ranges unless told otherwise."""

    def of(targets, *, calibrated=True):
        ranges = dict.fromkeys(activations(fp32), (-1.0, 1.0)) if calibrated else None
        return Builder(fp32, 20, ranges, lambda *_: None).build(parse(targets))

    return of


def unmet(outcome):
    return [str(target) for target in outcome.unmet]


def reasons(outcome):
    return {f.kind: f.reason for f in outcome.failed}


@pytest.fixture
def crash(monkeypatch):
    """Every builder of engines ends by a signal."""
    command = (sys.executable, "-c", "import os; os.abort()")
    child = functools.partial(tensorrt.build_in_child, command=command)
    monkeypatch.setattr(artefacts, "build_in_child", child)


@pytest.mark.usefixtures("crash")
def test_a_target_whose_builder_crashes_is_told_and_its_graphs_are_no_substitute(outcome):
    found = outcome("cpu-int8,tensorrt-rtx:sm86")
    assert unmet(found) == ["tensorrt-rtx:sm86"]
    kinds = [b.artefact.kind for b in found.built]
    assert kinds == ["onnx-fp32", "onnx-int8", "onnx-fp16", "onnx-int8-symmetric"]
    told = reasons(found)
    assert "FE-611" in told["tensorrt-rtx-fp16"]
    assert "SIGABRT" in told["tensorrt-rtx-fp16"]


def test_an_axis_without_sizes_costs_the_engines_only(fp32):
    model = onnx.load_model_from_string(fp32)
    for end in (*model.graph.input, *model.graph.output):
        end.type.tensor_type.shape.dim.insert(
            1, onnx.TensorShapeProto.Dimension(dim_param="length")
        )
    builder = Builder(bytes(model.SerializeToString()), 20, None, lambda *_: None)
    found = builder.build(parse("onnx,tensorrt-rtx:sm86"))
    assert unmet(found) == ["tensorrt-rtx:sm86"]
    assert "FE-611" in reasons(found)["tensorrt-rtx-fp16"]
    assert "must hold the graph's open axis 'length'" in reasons(found)["tensorrt-rtx-fp16"]
    assert [b.artefact.kind for b in found.built] == ["onnx-fp32", "onnx-fp16"]


def test_one_of_two_engines_is_enough(outcome, monkeypatch):
    """INT8 of most networks does not build for sm75; fp16 does."""
    calls = []

    def child(onnx, **_):
        calls.append(onnx)
        if len(calls) == 2:
            raise ReleaseError(611, "tensorrt-rtx: cannot build the engine")
        return Built(b"engine", None, "1.7", (75,))

    monkeypatch.setattr(artefacts, "build_in_child", child)
    found = outcome("tensorrt-rtx:sm75")
    assert "FE-611" in reasons(found)["tensorrt-rtx-int8"]
    assert unmet(found) == []


def test_what_the_device_builds_is_no_failure(outcome, monkeypatch):
    def child(onnx, **_):
        raise ReleaseError(608, "tensorrt: must be installed: pip install tensorrt")

    monkeypatch.setattr(artefacts, "build_in_child", child)
    found = outcome("tensorrt,cpu-fp32,onnx")
    assert "the device builds it" in reasons(found)["tensorrt-fp16"]
    assert unmet(found) == []
    # Without ranges there is no INT8 to fail.
    found = outcome("tensorrt", calibrated=False)
    assert "no activation ranges" in reasons(found)["tensorrt-int8"]
    assert unmet(found) == []


def test_a_graph_that_cannot_be_converted_fails_what_is_made_of_it(outcome, monkeypatch):
    def derived(kind, graph, ranges):
        raise ReleaseError(611, f"{kind}: cannot be converted")

    monkeypatch.setattr(artefacts, "derived", derived)
    found = outcome("cpu-int8,tensorrt")
    assert unmet(found) == ["cpu-int8", "tensorrt"]
    assert [b.artefact.kind for b in found.built] == ["onnx-fp32"]
    assert "FE-611" in reasons(found)["tensorrt-fp16"]
