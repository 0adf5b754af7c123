"""Tensors for Flower's messages: the same bytes as Flower writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import Array
from numpy.typing import NDArray

from fedge.shared.wire.npy import encode

VALUES = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


@pytest.mark.parametrize(
    "a",
    [
        VALUES,
        VALUES.astype(np.float64),
        VALUES.astype(np.float16),
        VALUES.astype(np.int64),
        VALUES > 3,
        np.asarray(np.float32(3.5)),
        np.zeros((0, 4), np.float32),
        np.asfortranarray(VALUES),
        VALUES[:, ::2],
        VALUES.astype(">f4"),
    ],
)
def test_the_bytes_are_those_that_flower_writes(a: NDArray[Any]) -> None:
    made, flowers = encode(a), Array(a)
    assert (made.dtype, tuple(made.shape), made.stype) == (
        flowers.dtype,
        tuple(flowers.shape),
        flowers.stype,
    )
    assert made.data == flowers.data
    np.testing.assert_array_equal(made.numpy(), a)


def test_objects_are_refused_as_flower_does() -> None:
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        encode(np.array([{}], dtype=object))
