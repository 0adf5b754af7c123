import contextlib
import json
import math
import socket
import struct
import threading
import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.shared.wire import frames
from fedge.shared.wire.frames import Request, WireError

BUNDLE = "0f" * 32


def body(parts):
    joined = b"".join(parts)
    assert struct.unpack(">Q", joined[:8]) == (len(joined) - 8,)
    return joined[8:]


def frame(head, buffers=b""):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack(">I", len(text)) + text + buffers


def content():
    return RecordDict(
        {
            "arrays": ArrayRecord(
                {"w": Array(np.arange(6, dtype=np.float32).reshape(2, 3)), "n": Array(np.array(4))}
            ),
            "config": ConfigRecord(
                {"a": 1, "b": 1.0, "c": True, "d": "text", "e": b"\x00\xff", "f": [b"x", b""]}
                | {"g": [1.5, -0.0], "h": [True, False], "i": ["ü", ""], "j": [2, 3], "k": b""}
            ),
            "metrics": MetricRecord({"x": 3, "y": 0.1, "z": [0.1, math.inf], "i": [1, 2]}),
        }
    )


def same(one, other):
    """Equal to the bit, types included."""
    assert list(one) == list(other)
    for name, record in one.items():
        assert type(record) is type(other[name])
        assert list(record) == list(other[name])
        for key, value in record.items():
            found = other[name][key]
            assert repr(found) == repr(value)
            if isinstance(value, Array):
                assert (found.dtype, found.shape, found.stype, found.data) == (
                    value.dtype, value.shape, value.stype, value.data,
                )  # fmt: skip


def test_a_request_comes_back_to_the_bit():
    found = frames.decode_request(body(frames.encode_request(Request("train", content(), BUNDLE))))
    assert (found.kind, found.bundle) == ("train", BUNDLE)
    same(content(), found.content)


def test_a_reply_comes_back_to_the_bit():
    same(content(), frames.decode_reply(body(frames.encode_reply(content()))))
    assert frames.decode_reply(body(frames.encode_reply(417))) == 417
    assert len(frames.decode_reply(body(frames.encode_reply(RecordDict())))) == 0


@given(st.floats(allow_nan=False), st.integers(-(2**63), 2**63 - 1), st.text(max_size=50))
def test_any_value_comes_back(real, whole, text):
    record = RecordDict(
        {"m": MetricRecord({"f": real, "i": whole}), "c": ConfigRecord({"s": text, "l": [real]})}
    )
    same(record, frames.decode_reply(body(frames.encode_reply(record))))


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(data):
    for decode in (frames.decode_request, frames.decode_reply):
        with contextlib.suppress(WireError):
            decode(data)


@pytest.mark.slow
@settings(max_examples=400)
@given(st.data())
def test_a_damaged_frame_is_read_or_refused(data):
    whole = bytearray(body(frames.encode_request(Request("train", content(), BUNDLE))))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(whole)))
    for damaged in (whole, whole[:cut]):
        with contextlib.suppress(WireError):
            frames.decode_request(damaged)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner),
)


@pytest.mark.slow
@given(_JSON, st.sampled_from(["arrays", "metrics", "config", "other"]))
def test_any_json_is_read_or_refused(tree, kind):
    heads = [
        tree,
        {"records": tree},
        {"records": [["r", kind, tree]]},
        {"records": [["r", kind, [["x", tree]]]]},
        {"records": [["r", kind, [["x", "float32", tree, "numpy.ndarray", 0]]]]},
    ]
    for head in heads:
        with contextlib.suppress(WireError):
            frames.decode_reply(frame(head))


def array(name="w", dtype="float32", shape=(1,), stype="numpy.ndarray", size=4):
    return {"records": [["a", "arrays", [[name, dtype, list(shape), stype, size]]]]}


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"\0\0\0",
        struct.pack(">I", 2**31) + b"{}",
        frame(b"[" * 200_000),
        frame(b'{"records": ' + b"9" * 5000 + b"}"),
        frame(b"\xff"),
        frame({}),
        frame({"records": [], "code": 413}),
        frame({"records": {}}),
        frame({"records": [["a", "config", []], ["a", "config", []]]}),
        frame({"records": [["a", "config", [["x", 1], ["x", 2]]]]}),
        frame({"records": [["a", "config", [["x" * 1025, 1]]]]}),
        frame({"records": [[f"r{i}", "config", []] for i in range(17)]}),
        frame({"records": [["a", "config", [["x", None]]]]}),
        frame({"records": [["a", "config", [["x", 2**63]]]]}),
        frame({"records": [["a", "config", [["x", {"bytes": "?"}]]]]}),
        frame({"records": [["a", "config", [["x", {"pickle": "gASVAA=="}]]]]}),
        frame({"records": [["a", "config", [["x", [[1]]]]]]}),
        frame({"records": [["a", "config", [["x", [1, "a"]]]]]}),
        frame({"records": [["a", "metrics", [["x", "text"]]]]}),
        frame({"records": [["a", "pickle", []]]}),
        frame({"records": []}, b"left over"),
        frame(array(), b"123"),
        frame(array(), b"12345"),
        frame(array(size=-1)),
        frame(array(size=2**62), b"1234"),
        frame(array(size=True), b"1"),
        frame(array(shape=[1] * 33), b"1234"),
        frame(array(shape=[-1]), b"1234"),
        frame(array(shape=[1.0]), b"1234"),
        frame(array(dtype=3), b"1234"),
        frame(array(stype="x" * 1025), b"1234"),
        frame({"code": 413}, b"more"),
        frame({"code": "413"}),
        frame({"code": True}),
        frame({"code": 10**6}),
    ],
)
def test_malformed_replies_are_refused(bad):
    with pytest.raises(WireError):
        frames.decode_reply(bad)


@pytest.mark.parametrize("change", [{"kind": "Train!"}, {"kind": 1}, {"bundle": "xy"}, {"x": 1}])
def test_malformed_requests_are_refused(change):
    with pytest.raises(WireError):
        frames.decode_request(frame({"kind": "train", "bundle": "", "records": []} | change))


def test_what_no_frame_can_hold_is_refused_before_it_is_sent():
    long = RecordDict({"c": ConfigRecord({"x" * 2000: 1})})
    with pytest.raises(WireError):
        frames.encode_reply(long)
    many = RecordDict({f"r{i}": ConfigRecord() for i in range(20)})
    with pytest.raises(WireError):
        frames.encode_reply(many)
    with pytest.raises(WireError):
        frames.encode_request(Request("train", RecordDict(), "not a digest"))


# Framing


@pytest.fixture
def pair():
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def soon(seconds=60.0):
    return time.monotonic() + seconds


def test_a_large_frame_passes_in_pieces(pair):
    parts = [struct.pack(">Q", 9_000_000), b"a" * 4_000_000, b"b" * 5_000_000]
    sender = threading.Thread(target=frames.send, args=(pair[0], parts, soon()))
    sender.start()
    found = frames.receive(pair[1], 10**7, soon())
    sender.join()
    assert found == parts[1] + parts[2]


def test_a_claimed_length_allocates_nothing(pair):
    pair[0].sendall(struct.pack(">Q", 2**50) + b"x")
    with pytest.raises(frames.TooLargeError):
        frames.receive(pair[1], 2**20, soon())
    pair[0].sendall(struct.pack(">Q", 2**50) + b"x")
    pair[0].close()
    with pytest.raises(frames.WireError):  # the byte left over is read as a length
        frames.receive(pair[1], frames.MAX_FRAME, soon())


def test_a_connection_that_ends_or_stalls_is_noticed(pair):
    pair[0].sendall(struct.pack(">Q", 100) + b"half")
    with pytest.raises(TimeoutError):
        frames.receive(pair[1], 1000, soon(0.1))
    pair[0].close()
    with pytest.raises(EOFError):
        frames.receive(pair[1], 1000, soon())


def test_drops_do_not_move_the_deadline(pair):
    def drip():
        for _ in range(900):
            try:
                pair[0].send(b"\0")
            except OSError:
                return
            time.sleep(0.05)

    thread = threading.Thread(target=drip)
    thread.start()
    # Drops that moved it would be enough after 45 s.
    with pytest.raises(TimeoutError):
        frames._exactly(pair[1], 900, soon(0.3))
    pair[1].close()
    thread.join()


def test_a_reader_that_does_not_read_is_noticed(pair):
    with pytest.raises(TimeoutError):
        frames.send(pair[0], [b"x" * 10**7], soon(0.2))
