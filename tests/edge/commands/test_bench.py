from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedge.edge.backends.device import cpu_name
from fedge.edge.cli import main
from fedge.shared.bundle.manifest_artefacts import Engine, Latency, Qualification

Capture = pytest.CaptureFixture[str]
NOT_EXECUTED = Qualification(False, "needs a GPU")


@pytest.fixture
def path(compiled: Any, extra: Any, graphs: dict[str, bytes]) -> Path:
    engine = Engine("tensorrt-rtx", "1.7.1.116", (86, 89))
    proved = Qualification(
        True,
        max_abs_difference=0.01,
        tolerance=0.25,
        agreement=0.995,
        latency=Latency(0.25, 0.5, 1, 1, "cpu"),
    )
    found: Path = compiled(
        extra("model.int8.onnx", "onnx-int8", graphs["int8"], proved),
        extra("killer.onnx", "onnx-int8-symmetric", graphs["killer"], None),
        extra("garbage.onnx", "onnx-fp16", graphs["garbage"], None),
        extra("model.engine", "tensorrt-rtx-fp16", b"engine", NOT_EXECUTED, engine),
    )
    return found


def child(path: Path, trust: Path, name: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "fedge.edge", "bench", str(path), "--trust", str(trust)]
    command += ["--artifact", name, "--parity", "--json", "--runs", "20", "--seconds", "1"]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_one_artefact_is_timed_alone_and_then_compared(
    path: Path, trust: Path, capsys: Capture
) -> None:
    done = child(path, trust, "model.int8.onnx")
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert (found["artefact"], found["backend"], found["device"]) == (
        "model.int8.onnx",
        "model.int8.onnx on CPU",
        cpu_name(),
    )
    assert 0 < found["max_abs_difference"] < 0.2 < found["largest_logit"]
    assert 0.9 < found["agreement"] <= 1
    assert 0 < found["p50_ms"] <= found["p99_ms"]

    argv = ["bench", str(path), "--trust", str(trust), "--runs", "10"]
    assert main([*argv, "--artifact", "model.onnx", "--parity"]) == 0
    text = capsys.readouterr().out
    assert "backend    model.onnx on CPU, " in text
    assert "parity     within 0 of fp32, whose largest logit is " in text
    assert "100 % the same labels" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.engine", "FE-710 "),
        ("garbage.onnx", "FE-708 garbage.onnx: "),
        ("missing.onnx", "FE-706 artefact: must be one of model.onnx, model.int8.onnx, "),
    ],
)
def test_what_does_not_run_is_one_line(
    path: Path, trust: Path, capsys: Capture, name: str, message: str
) -> None:
    argv = ["bench", str(path), "--trust", str(trust), "--artifact", name, "--json"]
    assert main(argv) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(message)
    assert ("`fedge-edge verify BUNDLE` lists them" in err) == (name == "missing.onnx")


@pytest.mark.slow
def test_a_crash_ends_the_child_by_its_signal(path: Path, trust: Path) -> None:
    done = child(path, trust, "killer.onnx")
    assert (done.returncode, done.stdout) == (-8, "")


def test_verify_shows_the_results_of_each_artefact(
    path: Path, trust: Path, capsys: Capture
) -> None:
    assert main(["verify", str(path), "--trust", str(trust)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(maxsplit=1)[1] for line in lines if line.startswith("artefact ")]
    assert [line.partition(": ")[0] for line in rows] == [
        "model.onnx",
        "model.int8.onnx",
        "killer.onnx",
        "garbage.onnx",
        "model.engine",
    ]
    assert rows[0].endswith("bytes, the graph that others are compared with")
    assert rows[1].endswith(
        "executed, within 0.01 (allowed 0.25), 99.5 % the same labels, p50 0.25 ms, p99 0.5 ms"
    )
    assert rows[2].endswith("bytes, not executed")
    assert rows[4] == (
        "model.engine: tensorrt-rtx-fp16, 6 bytes, for sm86 sm89 by tensorrt-rtx 1.7.1.116,"
        " not executed (needs a GPU)"
    )
