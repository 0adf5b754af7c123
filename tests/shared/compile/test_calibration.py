"""calibration.json: the same bytes for the same figures, and nothing else is read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fedge.shared.bundle.manifest_artefacts import ONNX_FP32, ONNX_INT8
from fedge.shared.compile import calibration
from fedge.shared.compile.calibration import Absent, Calibration, Counted
from fedge.shared.errors import RunError

SHA = "ab" * 32
COUNTED = Counted(
    SHA,
    2,
    90,
    {"correct": 80.0, "examples": 90.0},
    {"accuracy": 8 / 9},
    reference={"accuracy": 0.9},
)
COMPLETE = Calibration(
    "r-1",
    SHA,
    SHA,
    "exact",
    ("site-1", "site-2"),
    300,
    {"relu": (0.0, 4.25), "input": (-1.0, 1.0)},
    "",
    {ONNX_FP32: COUNTED, ONNX_INT8: replace(COUNTED, sites=None, noise={"accuracy": 0.01})},
    ("site-2",),
    (Absent("site-3", "ranges", 429, "another graph"),),
)


def test_what_is_written_is_read_and_has_one_spelling(tmp_path):
    data = calibration.dump(COMPLETE)
    (tmp_path / calibration.FILE).write_bytes(data)
    read = calibration.load(tmp_path / calibration.FILE)
    assert read == COMPLETE
    assert calibration.dump(read) == data
    other = replace(COMPLETE, ranges=dict(reversed((COMPLETE.ranges or {}).items())))
    assert calibration.dump(other) == data
    assert json.loads(data)["absent"][0]["code"] == "FE-429"


def test_what_was_not_had_is_read_too():
    nothing = Calibration("r-1", SHA, None, "noised", reason="no ranges: no site's count")
    assert calibration.parse(calibration.dump(nothing)) == nothing


def test_what_is_left_out_is_bounded():
    many = replace(COMPLETE, absent=(Absent("a", "ranges", 409, "x" * 5000),) * 3000)
    read = calibration.parse(calibration.dump(many))
    assert len(read.absent) == calibration.MAX_ABSENT
    assert len(read.absent[0].reason) == 1000


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"more": 1},
        {"mode": "guessed"},
        {"model_sha256": SHA[1:]},
        {"graph_sha256": 5},
        {"examples": -1},
        {"examples": True},
        {"sites": "site-1"},
        {"sites": [1]},
        {"ranges": {"relu": [1.0, 0.0]}},
        {"ranges": {"relu": [0.0]}},
        {"ranges": {"relu": [0.0, "1"]}},
        {"ranges": {"relu": [0.0, 1e999]}},
        {"ranges": {str(i): [0, 1] for i in range(3000)}},
        {"candidates": {"tensorrt-int8": {}}},
        {"candidates": {ONNX_INT8: {"sha256": SHA}}},
        {"candidates": {ONNX_INT8: {**vars(COUNTED), "reference": [0.9]}}},
        {"candidates": {ONNX_INT8: {**vars(COUNTED), "reference": {"accuracy": "0.9"}}}},
        {"absent": [{}]},
        {"absent": [None] * 1001},
        {"reason": "x" * 2000},
    ],
)
def test_anything_else_is_refused(change):
    value = json.loads(calibration.dump(COMPLETE)) | change
    text = json.dumps(value)
    with pytest.raises(RunError, match=r"calibration\.json") as caught:
        calibration.parse(text.encode())
    assert caught.value.code == 504


def test_a_damaged_or_missing_file_is_refused(tmp_path):
    path = tmp_path / calibration.FILE
    for data in (b"", b"{", b"[]", calibration.dump(COMPLETE)[:-9], b"[" * 100_000):
        path.write_bytes(data)
        with pytest.raises(RunError, match="must"):
            calibration.load(path)
    path.write_bytes(b" " * (calibration.MAX_BYTES + 1))
    with pytest.raises(RunError, match="cannot be read"):
        calibration.load(path)
    with pytest.raises(RunError, match="cannot be read"):
        calibration.load(tmp_path / "none")
