import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
from builders import refused
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.client.data import npy_files
from fedge.client.data.dataset import require_task_data
from fedge.shared.errors import DataError


@pytest.fixture
def folder(tmp_path, data):
    npy_files.write(tmp_path / "share", data)
    return tmp_path / "share"


def test_what_is_written_is_read_to_the_bit(folder, data):
    found = npy_files.read(folder)
    for part in fields(data):
        one, other = getattr(data, part.name), getattr(found, part.name)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    assert sorted(path.name for path in folder.iterdir()) == [
        "test-features.npy",
        "test-labels.npy",
        "train-features.npy",
        "train-labels.npy",
    ]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_missing_file_is_named(folder):
    (folder / "test-labels.npy").unlink()
    assert "test-labels.npy" in refused(301, npy_files.read, folder)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 2), np.float64),
        np.zeros((3, 2), ">f4"),
        np.asfortranarray(np.zeros((3, 2), np.float32)),
        np.array([{}], dtype=object),
        np.zeros((3, 2), np.float32),
    ],
)
def test_other_arrays_are_refused(folder, array):
    np.save(folder / "train-features.npy", array)
    refused(302, npy_files.read, folder)


def test_damaged_files_are_refused_before_they_are_read(folder):
    path = folder / "train-labels.npy"
    good = path.read_bytes()
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }\n"
    lie = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    for bad in (b"", good[:-1], good + b"x", pickle.dumps([1]), lie, b"\x93NUMPY\x09\x00" + good):
        path.write_bytes(bad)
        refused(302, npy_files.read, folder)


@pytest.mark.slow
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 127), st.integers(0, 255))
def test_any_header_is_read_or_refused(folder, position, value):
    path = folder / "train-labels.npy"
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[position] = value
    path.write_bytes(damaged)
    try:
        npy_files.read(folder)
    except DataError as error:
        assert error.code == 302
    finally:
        path.write_bytes(good)


def test_examples_must_fit_the_task(task, data):
    require_task_data(task, data)
    wide = replace(data, train_features=np.zeros((37, 3), np.float32))
    assert "must have shape (2,)" in refused(302, require_task_data, task, wide)
    assert "0 to 1" in refused(
        302, require_task_data, task, replace(data, test_labels=data.test_labels + 1)
    )
    empty = replace(data, test_features=data.test_features[:0], test_labels=data.test_labels[:0])
    refused(303, require_task_data, task, empty)
