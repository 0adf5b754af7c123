from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedge.edge.inputs import csv_rows, npy_rows, row_rules
from fedge.edge.inputs.reader import read_examples, read_statistics
from fedge.edge.inputs.row_rules import RowRules
from fedge.shared.errors import InputError
from fedge.shared.preprocessing.schema import Feature, InputSchema
from fedge.shared.preprocessing.steps import OneHot, Standardise

IMAGE = RowRules.from_schema(InputSchema(shape=(2, 3)), ())
TABLE = RowRules.from_schema(
    InputSchema(
        shape=(3,),
        features=(
            Feature("age", low=0, high=100),
            Feature("pain", low=1, high=3, categories=(1.0, 2.0, 3.0)),
            Feature("pulse", low=0, high=200),
        ),
    ),
    (),
)
ROWS = [[50.0, 1.0, 90.0], [61.5, 3.0, -0.25]]


def _read(path: Path, rules: RowRules) -> np.ndarray[Any, Any]:
    chunks = list(read_examples(str(path), rules))
    assert all(chunk.dtype == np.float32 for chunk in chunks)
    return np.concatenate(chunks)


def _code(path: Path, rules: RowRules) -> tuple[int, str]:
    with pytest.raises(InputError) as error:
        _read(path, rules)
    assert "\n" not in error.value.message
    return error.value.code, error.value.message


@pytest.fixture
def npy(tmp_path: Path) -> Callable[[Any], Path]:
    def save(array: Any) -> Path:
        np.save(tmp_path / "x.npy", array, allow_pickle=True)
        return tmp_path / "x.npy"

    return save


@pytest.fixture
def table(tmp_path: Path) -> Callable[[str | bytes], Path]:
    def write(text: str | bytes) -> Path:
        (tmp_path / "x.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path / "x.csv"

    return write


Npy = Callable[[Any], Path]
Csv = Callable[[str | bytes], Path]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(4, 2, 3),
        np.arange(24, dtype=np.float32).reshape(4, 6),
        np.arange(24, dtype=np.float64).reshape(4, 2, 3),
        np.arange(24, dtype=np.float16).reshape(4, 2, 3),
        np.arange(24, dtype=">f8").reshape(4, 2, 3),
        np.arange(24, dtype=np.uint8).reshape(4, 2, 3),
        np.arange(24, dtype=np.int64).reshape(4, 6),
        np.asfortranarray(np.arange(24, dtype=np.float32).reshape(4, 2, 3)),
        np.arange(48, dtype=np.float32).reshape(8, 2, 3)[:4],
    ],
)
def test_arrays_of_fitting_shapes_and_types_are_read(npy: Npy, array: Any) -> None:
    expected = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    np.testing.assert_array_equal(_read(npy(array), IMAGE), expected)


@pytest.mark.parametrize("shape", [(2, 3), (6,), (1, 2, 3), (1, 6)])
def test_one_example_needs_no_batch_axis(npy: Npy, shape: tuple[int, ...]) -> None:
    found = _read(npy(np.arange(6, dtype=np.float32).reshape(shape)), IMAGE)
    np.testing.assert_array_equal(found, np.arange(6, dtype=np.float32).reshape(1, 2, 3))


@pytest.mark.parametrize(
    ("array", "code", "named"),
    [
        (np.zeros((4, 3, 2)), 802, "(n, 2, 3) or (n, 6), got (4, 3, 2)"),
        (np.zeros((4, 5)), 802, "got (4, 5)"),
        (np.zeros(()), 802, "got ()"),
        (np.zeros((0, 6)), 802, "must hold a row"),
        (np.zeros((1,) * 20), 802, "…"),
        (np.zeros((2, 6), complex), 803, "c16"),
        (np.zeros((2, 6), bool), 803, "b1"),
        (np.zeros((2, 6), "U3"), 803, "U3"),
        (np.zeros((2, 6), "M8[s]"), 803, "plain array"),
        (np.zeros((2, 6), [("a", "f4")]), 803, "plain array"),
        (np.full((2, 6), None), 803, "|O"),
        (
            np.full((2, 6), 2**24 + 1),
            803,
            "row 0, column 0: must fit float32 exactly, got 16777217",
        ),
        (np.full((2, 6), 2**64 - 1, np.uint64), 803, "exactly"),
        (np.full((2, 6), -(2**53) - 1), 803, "exactly"),
        (np.full((2, 6), 1e300), 803, "must fit float32, got 1e+300"),
    ],
)
def test_other_arrays_are_refused(npy: Npy, array: Any, code: int, named: str) -> None:
    found, message = _code(npy(array), IMAGE)
    assert found == code
    assert named in message


def test_large_whole_numbers_that_fit_are_accepted(npy: Npy) -> None:
    array = np.asarray([[2**24, -(2**24), 2**40, 2**62, 0, 1]])
    np.testing.assert_array_equal(
        _read(npy(array), IMAGE).ravel(), array.ravel().astype(np.float32)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_what_is_not_finite_is_named(npy: Npy, bad: float, kind: Any) -> None:
    array = np.zeros((1500, 6), kind)
    array[1400, 4] = bad
    assert _code(npy(array), IMAGE) == (804, f"row 1400, column 4: must be finite, got {bad!r}")


def test_rows_come_in_chunks(npy: Npy) -> None:
    array = np.arange(2500 * 6, dtype=np.float32).reshape(2500, 6)
    chunks = list(read_examples(str(npy(array)), IMAGE))
    assert [len(chunk) for chunk in chunks] == [1024, 1024, 452]
    np.testing.assert_array_equal(np.concatenate(chunks).reshape(2500, 6), array)
    assert RowRules.from_schema(InputSchema(shape=(2**23,)), ()).chunk == 1


def test_a_header_that_lies_is_refused(npy: Npy, tmp_path: Path) -> None:
    path = npy(np.zeros((4, 6), np.float32))
    data = path.read_bytes()
    for change in (data[:-1], data + b"\0", data[:100]):
        path.write_bytes(change)
        assert _code(path, IMAGE)[0] in (801, 803)
    for old, new, code in (
        (b"(4, 6)", b"(9, 6)", 801),
        (b"(4, 6), }", b"(999999999, 6), }", 805),
        (b"(4, 6), }" + b" " * 40, b"(4, 6), }" + b"(" * 40, 803),
        (b"False", b"1==1 ", 803),
        (b"'<f4'", b"'|O' ", 803),
    ):
        assert old in data
        padding = len(new) - len(old)
        changed = data.replace(old + b" " * max(padding, 0), new)
        path.write_bytes(changed)
        assert _code(path, IMAGE)[0] == code, new


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff{")
    assert _code(path, IMAGE)[0] == 805
    path.write_bytes(b"\x93NUMPY\x09\x00\x10\x00")
    assert _code(path, IMAGE)[0] == 801


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    np.save(tmp_path / "x.npy", np.asarray([Bomb()], dtype=object), allow_pickle=True)
    assert _code(tmp_path / "x.npy", IMAGE)[0] == 803
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "text",
    [
        "50,1,90\n61.5,3,-0.25\n",
        "50,1,90\n61.5,3,-0.25",
        "50 , 1, 90\r\n\r\n6.15e1,3.0,-.25\r\n",
        '"50","1","90"\n61.5,3,-0.25\n\n',
        "age,pain,pulse\n50,1,90\n61.5,3,-0.25\n",
        "pulse,age,pain\n90,50,1\n-0.25,61.5,3\n",
        "\ufeffpulse , age,pain\n90,50,1\n-0.25,61.5,3\n",
    ],
)
def test_tables_are_read_with_and_without_a_header(table: Csv, text: str) -> None:
    np.testing.assert_array_equal(_read(table(text), TABLE), np.asarray(ROWS, np.float32))


def test_images_are_read_from_flat_rows(table: Csv) -> None:
    found = _read(table("0,1,2,3,4,5\n"), IMAGE)
    np.testing.assert_array_equal(found, np.arange(6, dtype=np.float32).reshape(1, 2, 3))


@pytest.mark.parametrize(
    ("text", "code", "named"),
    [
        ("", 802, "must hold a row"),
        ("age,pain,pulse\n", 802, "must hold a row"),
        ("age,pain,puls\n1,1,1\n", 802, "unknown column 'puls'; the nearest is 'pulse'"),
        ("age,zzz,pulse\n1,1,1\n", 802, "known are age, pain, pulse"),
        ("age,pulse\n1,1\n", 802, "missing column 'pain'"),
        ("age,pain,pulse,age\n1,1,1,1\n", 802, "column 'age' must stand once"),
        ("age;pain;pulse\n1;1;1\n", 802, "unknown column"),
        ("1,1\n", 802, "line 1: must hold 3 cells, got 2"),
        ("1,1,1\n1,1,1,1\n", 802, "line 2: must hold 3 cells, got 4"),
        ("1,1,1\n1,x,1\n", 803, "line 2, column 'pain': must be a number, got 'x'"),
        ("pulse,age,pain\n,1,1\n", 803, "line 2, column 'pulse': must be a number, got ''"),
        ("1,1,1_000\n", 803, "column 'pulse': must be a number, got '1_000'"),
        ("1,1,1e39\n", 803, "row 0, column 'pulse': must fit float32"),
        ("1,1,nan\n", 804, "row 0, column 'pulse': must be finite"),
        ("1,1,1\n1,1,-inf\n", 804, "row 1, column 'pulse'"),
        ("1,1,1\n1,4,1\n", 806, "row 1, column 'pain': must be one of 1, 2, 3, got 4"),
        ('1,"1\n,1\n', 802, "line 1"),
        ("1,1,1\r2,1,1\r", 802, "line 1"),
        (b"\xff\xfe1,1,1\n", 801, "UTF-8"),
        ("1,1,\0\n", 803, "column 'pulse'"),
        ("1," * 40_000 + "1\n", 805, "line 1: must be at most"),
    ],
)
def test_other_tables_are_refused(table: Csv, text: str | bytes, code: int, named: str) -> None:
    found, message = _code(table(text), TABLE)
    assert found == code, message
    assert named in message


def test_a_header_over_nameless_columns_is_refused(table: Csv) -> None:
    found, message = _code(table("a,b,c,d,e,f\n0,1,2,3,4,5\n"), IMAGE)
    assert (found, "no names" in message) == (802, True)


def test_categories_of_a_one_hot_step_are_checked(npy: Npy) -> None:
    rules = RowRules.from_schema(InputSchema(shape=(2,)), (OneHot(((0, (1.0, 2.0)),)),))
    assert _read(npy(np.asarray([[1.0, 9.0]])), rules).tolist() == [[1, 9]]
    assert _code(npy(np.asarray([[1.0, 9.0], [5.0, 9.0]])), rules)[1].startswith("row 1, column 0")


def test_standard_input_is_csv(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.TextIOWrapper(io.BytesIO(b"50,1,90\n61.5,3,-0.25\n"))
    monkeypatch.setattr(sys, "stdin", text)
    np.testing.assert_array_equal(
        np.concatenate(list(read_examples("-", TABLE))), np.asarray(ROWS, np.float32)
    )


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for name in ("folder.npy", "folder.csv"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    for name in ("folder.npy", "folder.csv", "pipe.csv", "missing.npy", "x.txt", "x"):
        assert _code(tmp_path / name, TABLE)[0] == 801


def test_limits_on_rows_and_bytes(
    npy: Npy, table: Csv, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for module in (csv_rows, npy_rows):
        monkeypatch.setattr(module, "MAX_ROWS", 2)
    assert len(_read(npy(np.asarray(ROWS)), TABLE)) == 2
    assert _code(npy(np.asarray(ROWS + ROWS)), TABLE)[0] == 805
    assert len(_read(table("1,1,1\n" * 2), TABLE)) == 2
    assert _code(table("1,1,1\n" * 3), TABLE)[0] == 805
    with (tmp_path / "sparse.csv").open("wb") as file:
        file.truncate(row_rules.MAX_BYTES + 1)
    assert _code(tmp_path / "sparse.csv", TABLE)[0] == 805


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"mean": [1], "std": []}',
        '{"mean": [], "std": []}',
        '{"mean": [1], "std": [-1]}',
        '{"mean": [NaN], "std": [1]}',
        '{"mean": [true], "std": [1]}',
        '{"mean": ["1"], "std": [1]}',
        '{"mean": 1, "std": 1}',
        '{"mean": [1e999], "std": [1]}',
        '{"mean": [' + "9" * 400 + '], "std": [1]}',
        "[" * 10_000,
        "\xff",
    ],
)
def test_other_statistics_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "s.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as error:
        read_statistics(tmp_path / "s.json")
    assert error.value.code == 807


def test_statistics_are_read(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"mean": [1, 2.5], "std": [0, 1], "rows": 7}))
    assert read_statistics(path) == Standardise((1.0, 2.5), (0.0, 1.0))
    with pytest.raises(InputError, match="cannot be read"):
        read_statistics(tmp_path)


@pytest.mark.slow
@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from([".npy", ".csv"]), st.integers(0, 200))
def test_any_bytes_are_read_or_refused(tmp_path: Path, noise: bytes, suffix: str, at: int) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.asarray(ROWS, np.float32))
    good = buffer.getvalue() if suffix == ".npy" else b"pulse,age,pain\n90,50,1\n"
    path = tmp_path / f"x{suffix}"
    for data in (noise, good[:at] + noise, good[:at] + noise + good[at + len(noise) :]):
        path.write_bytes(data)
        try:
            assert np.isfinite(_read(path, TABLE)).all()
        except InputError as error:
            assert 801 <= error.code <= 806
