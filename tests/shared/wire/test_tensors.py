"""Named arrays: the same bytes for the same weights, whole files or none, damage refused."""

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.shared.errors import RunError
from fedge.shared.wire.tensors import Spec, digest, encode, read, specs


@pytest.fixture
def arrays() -> dict[str, np.ndarray[Any, Any]]:
    return {
        "fc.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "fc.bias": np.array([0.5, -0.5], dtype=np.float64),
        "scale": np.array(3.25, dtype=np.float32),
        "seen": np.array(7, dtype=np.int64),
        "empty": np.zeros((0, 3), dtype=np.float32),
    }


def test_specs_tell_shape_and_type(arrays):
    assert specs(arrays)["fc.weight"] == Spec((2, 3), "float32")
    assert specs(arrays)["scale"] == Spec((), "float32")


def test_round_trip_keeps_values_shapes_and_types(arrays, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(encode(arrays))
    back = read(path)
    assert back.keys() == arrays.keys()
    for name, a in arrays.items():
        assert back[name].dtype == a.dtype
        assert back[name].shape == a.shape
        np.testing.assert_array_equal(back[name], a)


def test_bytes_depend_on_values_only_not_on_order_or_layout(arrays):
    shuffled = {k: arrays[k] for k in reversed(arrays)}
    shuffled["fc.weight"] = np.asfortranarray(shuffled["fc.weight"])
    assert encode(shuffled) == encode(arrays)
    assert digest(shuffled) == digest(arrays) == hashlib.sha256(encode(arrays)).hexdigest()


def test_digest_sees_one_changed_bit(arrays):
    before = digest(arrays)
    arrays["fc.weight"][0, 0] = np.nextafter(np.float32(0), np.float32(1))
    assert digest(arrays) != before


def test_no_metadata_in_the_file(arrays):
    data = encode(arrays)
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert set(header) == set(arrays)


def test_read_checks_the_digest(arrays, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(encode(arrays))
    assert read(path, digest(arrays)).keys() == arrays.keys()
    with pytest.raises(RunError) as refused:
        read(path, "0" * 64)
    assert refused.value.code == 504


def _bf16() -> bytes:
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * 4


@pytest.mark.parametrize("data", [b"", b"no tensors", encode({"a": np.ones(3)})[:-1], _bf16()])
def test_what_does_not_parse_is_damage(data: bytes, tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(RunError, match="a.safetensors") as refused:
        read(path)
    assert refused.value.code == 504


def test_a_missing_file_is_damage(tmp_path: Path):
    with pytest.raises(RunError) as refused:
        read(tmp_path / "a.safetensors")
    assert refused.value.code == 504
