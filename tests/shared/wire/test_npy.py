"""Foreign tensors: exactly the expected one, or a refusal, and never an allocation on somebody's word."""

from __future__ import annotations

import io
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.shared.wire.npy import UndecodableError, decode

SHAPE, DTYPE = (3, 4), np.dtype(np.float32)
HONEST = np.arange(12, dtype=np.float32).reshape(SHAPE)


def npy(a: np.ndarray[Any, Any], *, version: tuple[int, int] | None = None) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, a, version=version)
    return file.getvalue()


def labelled(
    data: bytes,
    shape: tuple[int, ...] = SHAPE,
    stype: str = "numpy.ndarray",
    dtype: str = "float32",
) -> Array:
    return Array(dtype=dtype, shape=shape, stype=stype, data=data)


def header(text: str) -> bytes:
    body = (text + " " * 200 + "\n").encode("latin1")
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body


@pytest.mark.parametrize(
    "a",
    [
        HONEST,
        np.asfortranarray(HONEST),
        np.asarray(1.5, dtype=np.float64),
        np.zeros((0, 3), dtype=np.float32),
        np.arange(5, dtype=np.int64),
        np.array([True, False]),
        np.ones((2, 2), dtype=np.float16),
    ],
)
def test_an_honest_tensor_comes_back_writable_and_in_c_order(a: np.ndarray[Any, Any]):
    plain, second = npy(a), npy(a, version=(2, 0))
    for data in (Array(a).data, plain, second):
        array = labelled(data, a.shape, dtype=str(a.dtype))
        made = decode(array, a.shape, a.dtype)
        assert made.dtype == a.dtype
        assert made.shape == a.shape
        assert made.flags.c_contiguous
        assert made.flags.writeable
        np.testing.assert_array_equal(made, a)


@pytest.mark.parametrize(
    "a",
    [
        np.ones(1, np.float32),
        np.ones((1, 1), np.float32),
        np.ones((4, 3), np.float32),
        np.ones(12, np.float32),
        np.ones((3, 4, 1), np.float32),
        np.asarray(1.0, np.float32),
    ],
)
def test_another_shape_is_refused_even_where_numpy_would_broadcast(a: np.ndarray[Any, Any]):
    with pytest.raises(UndecodableError, match="shape"):
        decode(Array(a), SHAPE, DTYPE)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int32", ">f4", "complex64", "S4", "V4"])
def test_another_type_is_refused(dtype: str):
    a = np.zeros(SHAPE, dtype=dtype)
    with pytest.raises(UndecodableError):
        decode(Array(dtype=dtype, shape=SHAPE, stype="numpy.ndarray", data=npy(a)), SHAPE, DTYPE)


@pytest.mark.parametrize("stype", ["", "torch.Tensor", "pickle", "numpy.ndarray "])
def test_another_serialisation_is_refused(stype: str):
    with pytest.raises(UndecodableError, match=r"numpy\.ndarray"):
        decode(labelled(npy(HONEST), stype=stype), SHAPE, DTYPE)


def test_the_label_must_agree_with_the_bytes():
    with pytest.raises(UndecodableError, match="labelled"):
        decode(labelled(npy(HONEST), shape=(4, 3)), SHAPE, DTYPE)
    with pytest.raises(UndecodableError, match="labelled"):
        decode(labelled(npy(HONEST.T.copy()), shape=SHAPE), SHAPE, DTYPE)


@pytest.mark.parametrize(
    "data",
    [npy(HONEST)[:-1], npy(HONEST)[:-4], npy(HONEST) + b"\0", npy(HONEST) + npy(HONEST), npy(HONEST)[:20]],
    ids=["a byte short", "an element short", "a byte more", "twice", "cut in the header"],
)  # fmt: skip
def test_the_length_must_fit(data: bytes):
    with pytest.raises(UndecodableError):
        decode(labelled(data), SHAPE, DTYPE)


def test_pickled_objects_are_refused_and_never_run(tmp_path: Path):
    trace = tmp_path / "ran"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    trap = pickle.dumps(Trap())
    objects = io.BytesIO()
    np.lib.format.write_array(objects, np.full(SHAPE, Trap(), dtype=object), allow_pickle=True)
    claim = header("{'descr': '|O', 'fortran_order': False, 'shape': (3, 4), }")
    for data in (trap, objects.getvalue(), claim + trap, npy(HONEST)[:-48] + trap):
        with pytest.raises(UndecodableError):
            decode(labelled(data), SHAPE, DTYPE)
    assert not trace.exists()
    pickle.loads(trap)  # noqa: S301 - the twin: the trap does work where it is opened
    assert trace.exists()


@pytest.mark.parametrize("shape", ["(1000000000000,)", "(1000000, 1000000)", "(3, 4)", "(-1, 4)"])
def test_a_header_claims_and_nothing_is_allocated(shape: str):
    text = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}"
    array = labelled(header(text), shape=(1000, 1000))
    tracemalloc.start()
    try:
        with pytest.raises(UndecodableError):
            decode(array, (1000, 1000), np.dtype(np.float64))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000, "the expected tensor has 8 MB; even that is not allocated for a claim"


def test_more_bytes_than_expected_are_refused_before_they_are_read():
    array = labelled(npy(HONEST) + bytes(5_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(UndecodableError, match="must hold 48 bytes"):
            decode(array, SHAPE, DTYPE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 200_000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00\xff\xff",
        b"\x93NUMPY\x03\x00" + npy(HONEST)[8:],
        b"\x93NUMPY\x09\x00" + npy(HONEST)[8:],
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"{" * 100,
        header("(" * 3000),
        header("-" * 3800 + "1"),
        header("[]"),
        header("{'descr': '<f4', 'fortran_order': False}"),
        header("{'descr': '<f4', 'fortran_order': 'no', 'shape': (3, 4), }"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (3L, 4L), }"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': 12, }"),
        header("{'descr': 'nonsense', 'fortran_order': False, 'shape': (3, 4), }"),
        header("{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3, 4), }"),
        header("__import__('os').abort()"),
    ],
)
def test_hostile_headers_are_refused(data: bytes):
    with pytest.raises(UndecodableError):
        decode(labelled(data + bytes(48)), SHAPE, DTYPE)


@settings(max_examples=200)
@given(data=st.binary(max_size=400))
def test_arbitrary_bytes_are_refused(data: bytes):
    with pytest.raises(UndecodableError):
        decode(labelled(data), SHAPE, DTYPE)


@settings(max_examples=200)
@given(body=st.text(max_size=120), tail=st.binary(max_size=60))
def test_arbitrary_headers_are_refused(body: str, tail: bytes):
    encoded = body.encode("utf-8")
    data = b"\x93NUMPY\x01\x00" + len(encoded).to_bytes(2, "little") + encoded + tail
    with pytest.raises(UndecodableError):
        decode(labelled(data), SHAPE, DTYPE)


@settings(max_examples=200)
@given(
    place=st.integers(0, len(npy(HONEST)) - 1),
    byte=st.integers(0, 255),
    cut=st.integers(0, len(npy(HONEST))),
)
def test_a_damaged_tensor_is_refused_or_is_still_of_the_expected_kind(
    place: int, byte: int, cut: int
):
    data = bytearray(npy(HONEST))
    data[place] = byte
    for damaged in (bytes(data), bytes(data[:cut])):
        try:
            made = decode(labelled(damaged), SHAPE, DTYPE)
        except UndecodableError:
            continue
        assert made.shape == SHAPE
        assert made.dtype == DTYPE
        assert len(damaged) == len(data)
