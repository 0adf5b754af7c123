"""Half precision and eight bits: near the fp32 graph, the same bytes each time, and what is refused."""

import hashlib
import logging
import os
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnxruntime.quantization.calibrate import CalibrationDataReader, create_calibrator
from torch import nn

from fedge.shared.bundle.manifest import GRAPH_INPUT
from fedge.shared.bundle.onnx_session import load_onnxruntime
from fedge.shared.compile.onnx_export import export_onnx
from fedge.shared.compile.quantisation import activations, quantise, to_fp16
from fedge.shared.errors import ReleaseError
from fedge.shared.models.cnn import CNN
from fedge.shared.models.dcgan import Generator
from fedge.shared.models.recurrent import RecurrentClassifier

CLASSES = 5
SHAPES = {"cnn": (1, 8, 8), "lstm": (16, 4)}


def examples(count, shape, seed):
    """Noisy copies of a pattern for each class."""
    patterns = np.random.default_rng(0).standard_normal((CLASSES, *shape))
    generator = np.random.default_rng(seed)
    y = generator.integers(0, CLASSES, count)
    x = patterns[y] + 0.8 * generator.standard_normal((count, *shape))
    return x.astype(np.float32), y


class Reader(CalibrationDataReader):
    def __init__(self, x):
        self.left = [{GRAPH_INPUT: x}]

    def get_next(self):
        return self.left.pop() if self.left else None


@pytest.fixture(scope="module", params=SHAPES)
def trained(request, tmp_path_factory):
    """A graph that separates the classes, its ranges as onnxruntime finds them, and held-out examples."""
    shape = SHAPES[request.param]
    torch.manual_seed(0)
    if request.param == "cnn":
        network = CNN(channels=1, side=8, classes=CLASSES, width=8, hidden=16)
    else:
        network = RecurrentClassifier(features=4, classes=CLASSES, hidden=16)
    x, y = examples(256, shape, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for so little work others only wait
    steps = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(80):
        loss = nn.functional.cross_entropy(network(torch.from_numpy(x)), torch.from_numpy(y))
        steps.zero_grad()
        loss.backward()
        steps.step()
    torch.set_num_threads(threads)
    graph = export_onnx(network, shape)
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "model.onnx").write_bytes(graph)
    calibrator = create_calibrator(
        folder / "model.onnx", augmented_model_path=str(folder / "augmented.onnx")
    )
    calibrator.collect_data(Reader(x))
    found = calibrator.compute_data()
    ranges = {
        name: tuple(value.item() for value in data.range_value) for name, data in found.items()
    }
    return graph, ranges, *examples(256, shape, 2)


def run(graph, x):
    onnxruntime = load_onnxruntime()
    onnxruntime.set_default_logger_severity(4)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session.run(None, {GRAPH_INPUT: x})[0]


def operators(graph):
    return [node.op_type for node in onnx.load_model_from_string(graph).graph.node]


@pytest.mark.slow
def test_all_forms_are_near_the_fp32_graph(trained):
    graph, ranges, x, y = trained
    logits = run(graph, x)
    accuracy = np.mean(logits.argmax(1) == y)
    assert accuracy > 0.85
    largest = np.abs(logits).max()
    for converted, tolerance in (
        (to_fp16(graph), 2e-3),
        (quantise(graph, ranges, symmetric=False), 0.04),
        (quantise(graph, ranges, symmetric=True), 0.04),
    ):
        found = run(converted, x)
        assert found.dtype == np.float32
        assert 0 < np.abs(found - logits).max() <= tolerance * largest
        assert np.mean(found.argmax(1) == logits.argmax(1)) >= 0.99
        assert abs(np.mean(found.argmax(1) == y) - accuracy) <= 0.01


def test_ranges_too_narrow_show(trained):
    """So that the test above would find out ranges that are not used."""
    graph, ranges, x, _ = trained
    logits = run(graph, x)
    narrow = {name: (low / 20, high / 20) for name, (low, high) in ranges.items()}
    for symmetric in (False, True):
        found = run(quantise(graph, narrow, symmetric=symmetric), x)
        assert np.abs(found - logits).max() > 0.1 * np.abs(logits).max()


def test_the_forms_are_what_their_targets_parse(trained):
    graph, ranges, _, _ = trained
    for symmetric in (False, True):
        converted = onnx.load_model_from_string(quantise(graph, ranges, symmetric=symmetric)).graph
        points = [t for t in converted.initializer if "zero_point" in t.name]
        kinds = {t.data_type for t in points}
        if symmetric:
            assert kinds == {TensorProto.INT8}
            assert not any(np.any(onnx.numpy_helper.to_array(t)) for t in points)
        else:
            assert kinds == {TensorProto.UINT8, TensorProto.INT8, TensorProto.INT32}
        scales = [t for t in converted.initializer if t.name.endswith("weight_scale")]
        assert scales and all(t.dims for t in scales), "a scale for each channel"


def test_ranges_are_asked_for_no_more_tensors_than_are_quantised(trained):
    graph, ranges, _, _ = trained
    names = activations(graph)
    assert names == activations(graph)
    assert set(names) <= set(ranges)
    assert "logits" not in names
    found = {
        node.input[0]
        for symmetric in (False, True)
        for node in onnx.load_model_from_string(
            quantise(graph, ranges, symmetric=symmetric)
        ).graph.node
        if node.op_type == "QuantizeLinear"
    }
    # A convolution's own output has another name before it is quantised.
    assert {name.removesuffix("_QuantizeLinear_Input") for name in found} == set(names)
    for symmetric in (False, True):
        exact = quantise(graph, {name: ranges[name] for name in names}, symmetric=symmetric)
        assert exact == quantise(graph, ranges, symmetric=symmetric)


def test_a_tensor_without_a_range_is_named(trained):
    graph, ranges, _, _ = trained
    name = activations(graph)[-1]
    with pytest.raises(ReleaseError, match=f"FE-609 .*'{name}'"):
        quantise(graph, {k: v for k, v in ranges.items() if k != name}, symmetric=False)
    with pytest.raises(ReleaseError, match="FE-609"):
        quantise(graph, {}, symmetric=True)


@pytest.mark.parametrize(
    "found", [(1.0, 0.5), (float("nan"), 1.0), (0.0, float("inf")), (-1e39, 0.0)]
)
def test_a_range_that_is_none_is_refused(trained, found):
    graph, ranges, _, _ = trained
    name = activations(graph)[0]
    with pytest.raises(ValueError, match=f"{name}: must have a finite range"):
        quantise(graph, {**ranges, name: found}, symmetric=False)


def test_constant_activations_make_no_nan(trained):
    graph, ranges, x, _ = trained
    for symmetric in (False, True):
        for value in (0.0, 1e-42, 3.0):
            constant = dict.fromkeys(ranges, (value, value))
            assert np.isfinite(run(quantise(graph, constant, symmetric=symmetric), x)).all()


def test_the_bytes_are_the_same_in_another_process_and_hold_no_metadata(trained, tmp_path):
    graph, ranges, _, _ = trained
    (tmp_path / "model.onnx").write_bytes(graph)
    program = f"""
import hashlib, sys
from pathlib import Path
from fedge.shared.compile.quantisation import quantise, to_fp16
graph, ranges = Path(sys.argv[1]).read_bytes(), {ranges!r}
made = [to_fp16(graph), *(quantise(graph, ranges, symmetric=s) for s in (False, True))]
print(*(hashlib.sha256(data).hexdigest() for data in made))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.onnx")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
        env={**os.environ, "PYTHONHASHSEED": "11"},
    )
    converted = [to_fp16(graph), *(quantise(graph, ranges, symmetric=s) for s in (False, True))]
    assert done.stdout.split() == [hashlib.sha256(data).hexdigest() for data in converted]
    assert done.stderr == ""
    for data in converted:
        model = onnx.load_model_from_string(data)
        assert not model.metadata_props and not model.doc_string and not model.graph.value_info
        assert str(tmp_path).encode() not in data
        assert model.producer_name == onnx.load_model_from_string(graph).producer_name


def test_the_process_keeps_its_log(trained, capfd):
    graph, ranges, _, _ = trained
    before = list(logging.getLogger().handlers)
    quantise(graph, ranges, symmetric=False)
    to_fp16(graph)
    assert logging.getLogger().handlers == before
    assert capfd.readouterr() == ("", "")


def test_sums_and_norms_stay_in_float32(trained):
    graph, _, _, _ = trained
    half = onnx.shape_inference.infer_shapes(onnx.load_model_from_string(to_fp16(graph))).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*half.value_info, *half.output]}
    found = {node.op_type: types[node.output[0]] for node in half.node}
    assert found["Gemm"] == TensorProto.FLOAT16
    summed = {"InstanceNormalization", "ReduceMean"} & found.keys()
    assert summed and all(found[kind] == TensorProto.FLOAT for kind in summed)


def graph_of(*nodes, constants=(), shape=("batch", 4)):
    converted = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)],
        constants,
    )  # fmt: skip
    return helper.make_model(
        converted, opset_imports=[helper.make_opsetid("", 20)]
    ).SerializeToString()


@pytest.mark.slow
def test_a_relu_leaves_one_range_with_what_it_follows():
    """As a network with batch normalisation has it, which is folded into its convolution."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten()
    )
    graph = export_onnx(network, (1, 6, 6))
    names = activations(graph)
    assert len(names) == 3  # the input, what the Relu gives, and the second convolution's output
    converted = quantise(graph, dict.fromkeys(names, (0.0, 2.0)), symmetric=False)
    assert "Relu" not in operators(converted)
    assert "Relu" in operators(quantise(graph, dict.fromkeys(names, (0.0, 2.0)), symmetric=True))


def test_products_of_two_activations_are_left_as_they_are():
    graph = graph_of(
        helper.make_node("Transpose", ["input"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["input", "t"], ["logits"]),
        shape=("batch", 4, 4),
    )
    for call in (activations, lambda g: quantise(g, {}, symmetric=False)):
        with pytest.raises(ReleaseError, match="FE-611 int8: must hold .*MatMul"):
            call(graph)


@pytest.mark.slow
def test_what_cpus_have_no_eight_bits_for_is_not_passed_off_as_int8():
    torch.manual_seed(0)
    graph = export_onnx(Generator(side=8, latent=4, width=4), (4,))
    ranges = dict.fromkeys(activations(graph), (-2.0, 2.0))
    assert "QuantizeLinear" in operators(quantise(graph, ranges, symmetric=True))
    with pytest.raises(ReleaseError, match="FE-611"):
        quantise(graph, ranges, symmetric=False)


@pytest.mark.parametrize("data", [b"noise", b""])
def test_what_is_no_graph_is_refused(data):
    for call in (to_fp16, activations, lambda g: quantise(g, {}, symmetric=True)):
        with pytest.raises(ReleaseError, match="FE-611"):
            call(data)
