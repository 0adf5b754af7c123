from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fedge.edge.backends.graph_file import refuse_external_data
from fedge.shared.errors import BundleError

INSIDE = numpy_helper.from_array(np.ones(3, np.float32), "w")


def _outside() -> TensorProto:
    tensor = numpy_helper.from_array(np.ones(3, np.float32), "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    return tensor


def _model(place: str, tensor: TensorProto) -> bytes:
    """A model that holds the tensor in one of the places where ONNX allows one."""
    constant = helper.make_node("Constant", [], ["c"], value=tensor)
    inner = helper.make_graph([constant], "inner", [], [])
    graph = helper.make_graph([], "g", [], [])
    match place:
        case "initializer":
            graph.initializer.append(tensor)
        case "attribute":
            graph.node.append(constant)
        case "sparse":
            graph.sparse_initializer.add().values.CopyFrom(tensor)
        case "subgraph":
            node = graph.node.add(op_type="If")
            node.attribute.append(helper.make_attribute("then_branch", inner))
    model = helper.make_model(graph)
    if place == "function":
        model.functions.add(name="f").node.append(constant)
    if place == "training":
        model.training_info.add().algorithm.CopyFrom(inner)
    return bytes(model.SerializeToString())


PLACES = ("initializer", "attribute", "sparse", "subgraph", "function", "training")


@pytest.mark.parametrize("place", PLACES)
def test_weights_in_other_files_are_refused(place: str) -> None:
    refuse_external_data(_model(place, INSIDE), "model.onnx")
    with pytest.raises(BundleError) as error:
        refuse_external_data(_model(place, _outside()), "model.onnx")
    assert error.value.code == 706
    assert error.value.message.startswith("model.onnx: ")


@pytest.mark.parametrize("data", [b"\xff", b"\x3a\x7f", b"\x0b", b"\x80" * 20, b"\x3a\x05ab"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError) as error:
        refuse_external_data(data, "model.onnx")
    assert error.value.code == 708


def test_deep_nesting_is_refused() -> None:
    data = b""
    for _ in range(200):  # graph -> node -> attribute -> graph
        for tag in (b"\x32", b"\x2a", b"\x0a"):
            data = tag + onnx_varint(len(data)) + data
    with pytest.raises(BundleError) as error:
        refuse_external_data(b"\x3a" + onnx_varint(len(data)) + data, "model.onnx")
    assert error.value.code == 708


def onnx_varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


@settings(max_examples=300)
@given(st.binary(max_size=100), st.integers(0, 60))
def test_any_bytes_end_in_a_verdict(noise: bytes, at: int) -> None:
    good = _model("subgraph", INSIDE)
    for data in (noise, good[:at] + noise + good[at:]):
        try:
            refuse_external_data(data, "model.onnx")
        except BundleError as error:
            assert error.code in (706, 708)


def test_the_test_uses_the_format_of_onnx() -> None:
    assert (
        onnx.load_model_from_string(_model("initializer", INSIDE)).graph.initializer[0].name == "w"
    )
