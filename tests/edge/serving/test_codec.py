from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from fedge.edge.serving import inference_protocol
from fedge.edge.serving.codec import OUTPUTS, Decoder, Signature, decode, encode
from fedge.shared.errors import FedgeError, InputError
from fedge.shared.preprocessing.schema import OutputSchema

IMAGE = Signature("image", "b" * 12, (2, 3), 6, 3, 3, 4)
SOFTMAX = OutputSchema(labels=("x", "y", "z"), activation="softmax")


def code_of(found: Any) -> int:
    with pytest.raises(InputError) as caught:
        decode(found if isinstance(found, bytes) else found.SerializeToString(), IMAGE)
    return caught.value.code


def test_a_clients_tensor_is_read_without_a_copy(request_of: Callable[..., Any]) -> None:
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    found = decode(request_of(x, id="7", model_version="b" * 12).SerializeToString(), IMAGE)
    np.testing.assert_array_equal(found.examples, x)
    assert not found.examples.flags.owndata
    assert (found.outputs, found.id, found.timeout) == (OUTPUTS, "7", None)


def test_typed_contents_are_the_same_as_raw_bytes(request_of: Callable[..., Any]) -> None:
    x = np.random.default_rng(0).normal(size=(3, 2, 3)).astype(np.float32)
    proto = request_of(x)
    del proto.raw_input_contents[:]
    proto.inputs[0].contents.fp32_contents.extend(x.ravel().tolist())
    proto.outputs.add(name="label")
    proto.parameters["timeout"].int64_param = 1500
    proto.parameters["anything"].string_param = "x"
    found = decode(proto.SerializeToString(), IMAGE)
    np.testing.assert_array_equal(found.examples, x)
    assert found.outputs == ("label",)
    assert found.timeout == pytest.approx(0.0015)


def test_a_request_that_begins_as_an_earlier_one_is_read_alike(
    request_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = Decoder(IMAGE)
    rng = np.random.default_rng(3)
    first = request_of(rng.normal(size=(2, 2, 3)).astype(np.float32))
    first.outputs.add(name="label")
    first.parameters["timeout"].int64_param = 1500
    decoder.decode(first.SerializeToString())
    with monkeypatch.context() as patch:
        patch.setattr("fedge.edge.serving.codec.decode", None)  # it is not parsed again
        for _ in range(3):
            x = rng.normal(size=(2, 2, 3)).astype(np.float32)
            first.raw_input_contents[0] = x.tobytes()
            found = decoder.decode(first.SerializeToString())
            np.testing.assert_array_equal(found.examples, x)
            assert found.examples.flags.aligned
            assert (found.outputs, found.id) == (("label",), "")
            assert found.timeout == pytest.approx(0.0015)
    other = request_of(x[:, ::-1])  # as long or not, it begins in another way
    other.outputs.add(name="logits")
    assert decoder.decode(other.SerializeToString()).outputs == ("logits",)


def test_numbers_that_only_seem_to_come_last_are_not_remembered(
    request_of: Callable[..., Any],
) -> None:
    x = np.arange(6, dtype=np.float32).reshape(1, 2, 3)
    decoy = b"\x3a\x18" + bytes(24)  # as raw contents of as many zeros would be
    stranger = b"\xa2\x06" + bytes([len(decoy)])  # an unknown field holds it
    data = request_of(x).SerializeToString() + stranger + decoy
    decoder = Decoder(IMAGE)
    for _ in range(3):
        np.testing.assert_array_equal(decoder.decode(data).examples, x)


@pytest.mark.parametrize("raw", [True, False])
def test_a_remembered_beginning_changes_no_refusal(
    request_of: Callable[..., Any], raw: bool
) -> None:
    x = np.ones((2, 2, 3), np.float32)
    proto = request_of(x)
    if not raw:
        del proto.raw_input_contents[:]
        proto.inputs[0].contents.fp32_contents.extend(x.ravel().tolist())
    data, decoder = proto.SerializeToString(), Decoder(IMAGE)
    decoder.decode(data)
    for place in range(len(data)):
        for flip in (1, 0x80):
            changed = bytearray(data)
            changed[place] ^= flip
            assert _outcome(decoder.decode, changed) == _outcome(
                lambda data: decode(data, IMAGE), changed
            )


def _outcome(read: Callable[[bytes], Any], data: bytearray) -> Any:
    try:
        found = read(bytes(data))
    except InputError as error:
        return error.code, error.message
    return found.examples.tobytes(), found.examples.shape, found.outputs, found.id, found.timeout


def _set(path: str, value: Any) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        *owners, last = path.split(".")
        for owner in owners:
            proto = proto[int(owner)] if owner.isdigit() else getattr(proto, owner)
        if isinstance(value, list):
            del getattr(proto, last)[:]
            getattr(proto, last).extend(value)
        else:
            setattr(proto, last, value)

    return change


def _parameter(owner: str, name: str) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        proto.outputs.add(name="label")
        getattr(proto, owner)[0].parameters[name].int64_param = 1

    return change


def _outputs(*names: str) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        for name in names:
            proto.outputs.add(name=name)

    return change


@pytest.mark.parametrize(
    ("code", "change"),
    [
        (802, _set("inputs.0.shape", [2, 3, 2])),
        (802, _set("inputs.0.shape", [2, 6])),
        (802, _set("inputs.0.shape", [0, 2, 3])),
        (802, _set("inputs.0.shape", [-1, 2, 3])),
        (802, _set("inputs.0.shape", [])),
        (802, _set("inputs.0.shape", [1] * 1000)),
        (802, _set("inputs.0.shape", [1, 2, 3])),
        (802, _set("raw_input_contents", [b"1234567"])),
        (802, _set("raw_input_contents", [])),
        (803, _set("inputs.0.datatype", "INT64")),
        (803, _set("inputs.0.datatype", "fp32")),
        (803, lambda r: (r.ClearField("raw_input_contents"), _set("inputs.0.contents.int_contents", [1])(r))),
        (802, lambda r: (r.ClearField("raw_input_contents"), _set("inputs.0.contents.fp32_contents", [1.0])(r))),
        (805, _set("inputs.0.shape", [5, 2, 3])),
        (805, _set("inputs.0.shape", [2**62, 2, 3])),
        (810, _set("inputs.0.contents.fp32_contents", [1.0] * 12)),
        (810, _set("raw_input_contents", [b"", b""])),
        (810, _set("model_name", "another")),
        (810, _set("model_name", "x" * 10**6)),
        (810, _set("model_version", "1")),
        (810, _set("id", "x" * 257)),
        (810, _set("inputs.0.name", "x")),
        (810, lambda r: r.ClearField("inputs")),
        (810, lambda r: r.inputs.add(name="input")),
        (810, _outputs("logits", "logits")),
        (810, _outputs("x")),
        (810, _outputs(*OUTPUTS, "logits")),
        (810, _parameter("outputs", "classification")),
        (810, _parameter("inputs", "shared_memory_region")),
    ],
)  # fmt: skip
def test_invalid_requests_are_refused_by_number(
    request_of: Callable[..., Any], code: int, change: Callable[[Any], Any]
) -> None:
    proto = request_of(np.zeros((2, 2, 3), np.float32))
    change(proto)
    with pytest.raises(InputError) as caught:
        decode(proto.SerializeToString(), IMAGE)
    assert caught.value.code == code
    assert len(caught.value.message) < 200


def test_typed_contents_of_two_kinds_are_refused(request_of: Callable[..., Any]) -> None:
    proto = request_of(np.zeros((1, 2, 3), np.float32))
    del proto.raw_input_contents[:]
    proto.inputs[0].contents.fp32_contents.extend([0.0] * 6)
    decode(proto.SerializeToString(), IMAGE)
    proto.inputs[0].contents.bytes_contents.append(b"x")
    assert code_of(proto) == 803


def test_bytes_that_are_no_message_are_refused() -> None:
    assert code_of(b"\xff" * 20) == 810
    assert code_of(b"") == 810


def test_an_answer_is_what_the_published_protocol_reads(request_of: Callable[..., Any]) -> None:
    x = np.zeros((2, 2, 3), np.float32)
    proto = request_of(x, id="mark")
    for name in ("label", "logits", "probabilities"):
        proto.outputs.add(name=name)
    found = decode(proto.SerializeToString(), IMAGE)
    logits = np.array([[0.0, 1.0, 2.0], [3.0, 0.0, 0.0]], np.float32)
    answer = service_pb2.ModelInferResponse.FromString(encode(found, logits, IMAGE, SOFTMAX))
    assert (answer.model_name, answer.model_version, answer.id) == ("image", "b" * 12, "mark")
    listed = [(o.name, o.datatype, list(o.shape)) for o in answer.outputs]
    assert listed == [
        ("label", "INT64", [2]),
        ("logits", "FP32", [2, 3]),
        ("probabilities", "FP32", [2, 3]),
    ]
    label, raw, probabilities = answer.raw_output_contents
    assert np.frombuffer(label, np.int64).tolist() == [2, 0]
    assert raw == logits.tobytes()
    np.testing.assert_allclose(
        np.frombuffer(probabilities, np.float32).reshape(2, 3).sum(axis=1), 1, rtol=1e-6
    )


@pytest.mark.parametrize("rows", [1, 127, 128, 20_000])
def test_lengths_of_every_size_are_written_right(request_of: Callable[..., Any], rows: int) -> None:
    signature = Signature("image", "b" * 12, (2, 3), 6, 3, 3, rows)
    found = decode(request_of(np.zeros((rows, 2, 3), np.float32)).SerializeToString(), signature)
    logits = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    answer = service_pb2.ModelInferResponse.FromString(encode(found, logits, signature, SOFTMAX))
    assert answer.raw_output_contents[0] == logits.tobytes()
    assert len(answer.raw_output_contents[2]) == 8 * rows


def test_the_messages_agree_with_the_published_ones() -> None:
    """Every declared field has the published number, type and repetition."""
    published = {
        "ModelRequest": "ModelMetadataRequest",
        "TensorMetadata": "ModelMetadataResponse.TensorMetadata",
        "InferInputTensor": "ModelInferRequest.InferInputTensor",
        "InferRequestedOutputTensor": "ModelInferRequest.InferRequestedOutputTensor",
        "InferOutputTensor": "ModelInferResponse.InferOutputTensor",
    }
    pool = service_pb2.DESCRIPTOR.pool
    for line in inference_protocol._TABLE.strip().splitlines():
        name = line.split()[0]
        if name.startswith("Health"):
            continue
        theirs = pool.FindMessageTypeByName(f"inference.{published.get(name, name)}")
        for field in inference_protocol.message(name).DESCRIPTOR.fields:
            same = theirs.fields_by_name[field.name]
            enumeration = same.enum_type is not None  # a number on the wire
            assert field.number == same.number, (name, field.name)
            assert field.is_repeated == same.is_repeated
            assert field.type == (field.TYPE_INT32 if enumeration else same.type)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        decode(data, IMAGE)
    except FedgeError as error:
        assert error.code in (802, 803, 805, 810)


@settings(max_examples=300)
@given(st.data())
def test_a_request_with_changed_bytes_is_read_or_refused(data: st.DataObject) -> None:
    kinds = service_pb2.ModelInferRequest
    x = np.ones((2, 2, 3), np.float32)
    proto = kinds(
        model_name="image",
        id="a",
        inputs=[kinds.InferInputTensor(name="input", datatype="FP32", shape=x.shape)],
        outputs=[kinds.InferRequestedOutputTensor(name="label")],
        raw_input_contents=[x.tobytes()],
    )
    found = bytearray(proto.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(found) - 1))
        match data.draw(st.sampled_from(["flip", "cut", "insert"])):
            case "flip":
                found[at] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del found[at : at + data.draw(st.integers(1, 5))]
            case "insert":
                found[at:at] = data.draw(st.binary(max_size=5))
        if not found:
            break
    try:
        answer = decode(bytes(found), IMAGE)
    except FedgeError as error:
        assert error.code in (802, 803, 805, 810)
    else:
        assert 1 <= len(answer.examples) <= IMAGE.max_batch
        assert answer.examples.shape[1:] == IMAGE.shape
