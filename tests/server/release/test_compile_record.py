"""compile.json and the files beside it: read as written, and anything else refused."""

import hashlib
import json

import pytest

from fedge.server.release import compile_record
from fedge.server.release.compile_record import Compiled, Dropped, content, dump, load
from fedge.shared.bundle.manifest_artefacts import Artefact, Engine, Latency, Qualification, Score
from fedge.shared.errors import ReleaseError

DATA = b"engine"
ENGINE = Artefact(
    "model.fp16.engine", "tensorrt-rtx-fp16", hashlib.sha256(DATA).hexdigest(), len(DATA), 20,
    Engine("tensorrt-rtx", "1.7", (86, 89)), Qualification(False, "no GPU"),
)  # fmt: skip
EXECUTED = Qualification(
    True, "", 0.1, 1.0, 0.99, 50.0, Latency(1, 2, 1, 1, "cpu"), Score("accuracy", 0.9, 0.91, 40)
)
COMPILED = Compiled(
    "digits", "b" * 64, ("cpu-int8",), "0.1.0", "a CPU", (ENGINE,),
    (Dropped("model.int8.onnx", "onnx-int8", "is no faster", 7, EXECUTED), Dropped("x", "y", "z")),
    ("tensorrt",),
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / compile_record.FILE).write_bytes(dump(COMPILED))
    (tmp_path / ENGINE.name).write_bytes(DATA)
    return tmp_path


def test_what_is_written_is_read(folder):
    assert load(folder) == COMPILED
    assert content(folder, ENGINE) == DATA


@pytest.mark.parametrize("data", [b"engin3", b"engine ", b""])
def test_a_changed_artefact_is_refused(folder, data):
    (folder / ENGINE.name).write_bytes(data)
    with pytest.raises(ReleaseError, match=r"FE-610 .*model.fp16.engine"):
        content(folder, ENGINE)


def test_a_missing_artefact_is_refused(folder):
    (folder / ENGINE.name).unlink()
    with pytest.raises(ReleaseError, match="FE-610"):
        content(folder, ENGINE)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "fedge.compile/2"},
        {"kept": [{}]},
        {"kept": 3},
        {"dropped": [{"name": "x", "kind": "y", "reason": "z", "bytes": True}]},
        {"targets": None},
        {"failed": None},
    ],
)
def test_a_record_of_something_else_is_refused(folder, change):
    path = folder / compile_record.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ReleaseError, match="FE-610"):
        load(folder)


def test_a_folder_without_a_record_is_refused(tmp_path):
    with pytest.raises(ReleaseError, match="FE-610"):
        load(tmp_path)
