from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedge.edge.backends import trial
from fedge.edge.backends.backend import CPU, CUDA, Shapes
from fedge.edge.backends.candidates import Candidate
from fedge.edge.backends.device import cpu_name
from fedge.edge.backends.onnx_graph import OnnxBackend
from fedge.edge.backends.trial import Timing, try_out
from fedge.shared.errors import BundleError

SHAPES = Shapes((1, 2, 3), 3)
BATCHES = [np.random.default_rng(n).random((n, 1, 2, 3)).astype(np.float32) for n in (1, 5)]


def _candidate(extra: Any, data: bytes, place: str = CPU) -> Candidate:
    return Candidate(extra("m.onnx", "onnx-int8", data).artefact, place)


@pytest.mark.slow
def test_a_child_gives_the_same_logits_and_times_them(extra: Any, graphs: dict[str, bytes]) -> None:
    data = graphs["int8"]
    candidate = _candidate(extra, data)
    found = try_out(candidate, data, BATCHES, SHAPES, deadline=120, timing=Timing(20, 5))
    here = OnnxBackend(candidate.artefact, data, SHAPES)
    assert [b.shape for b in found.logits] == [(1, 3), (5, 3)]
    for batch, logits in zip(BATCHES, found.logits, strict=True):
        np.testing.assert_array_equal(here.run(batch), logits)
    assert found.p50_ms is not None and found.p99_ms is not None
    assert 0 < found.p50_ms <= found.p99_ms
    assert 10 < found.peak_rss_mb < 2000
    assert found.device == cpu_name()


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        ("killer", "crashed (SIGFPE)"),
        ("garbage", "must be an ONNX model, got other bytes"),
        ("fragile", "fails to run"),
    ],
)
def test_a_failure_is_a_result(
    extra: Any, graphs: dict[str, bytes], graph: str, reason: str
) -> None:
    data = graphs[graph]
    with pytest.raises(BundleError) as error:
        try_out(_candidate(extra, data), data, BATCHES, SHAPES, deadline=120)
    assert error.value.code == 710
    assert error.value.message.startswith("m.onnx on CPU: ")
    assert reason in error.value.message


@pytest.mark.usefixtures("no_gpu")
def test_a_place_that_the_device_lacks_is_a_failure(extra: Any, graphs: dict[str, bytes]) -> None:
    data = graphs["fp32"]
    with pytest.raises(BundleError, match="m.onnx on CUDA: has no CUDA driver"):
        try_out(_candidate(extra, data, CUDA), data, BATCHES, SHAPES, deadline=120)


@pytest.mark.slow
def test_a_child_that_does_not_end_is_killed(extra: Any, graphs: dict[str, bytes]) -> None:
    data = graphs["endless"]
    start = time.perf_counter()
    with pytest.raises(BundleError, match="did not answer within 1 seconds"):
        try_out(_candidate(extra, data), data, BATCHES, SHAPES, deadline=1)
    assert time.perf_counter() - start < 60


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "{}",
        "[]",
        "not json",
        '{"device": "x", "p50_ms": null, "p99_ms": null, "peak_rss_mb": 1}\nshort',
        '{"device": "x", "p50_ms": "fast", "p99_ms": 1, "peak_rss_mb": 1}\n' + 72 * "x",
    ],
)
def test_an_invalid_answer_is_a_failure(extra: Any, answer: str) -> None:
    with pytest.raises(BundleError, match="ended without an answer"):
        trial._answer(_candidate(extra, b"x"), answer.encode(), [1, 5], 3)


def test_what_cannot_be_started_is_a_failure(
    extra: Any, graphs: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(BundleError, match="cannot be tried"):
        try_out(_candidate(extra, graphs["int8"]), graphs["int8"], BATCHES, SHAPES)


PARENT = """
import os, subprocess, sys
child = subprocess.Popen(
    [sys.executable, "-P", "-m", "fedge.edge.backends.trial_child"], stdin=int(sys.argv[1])
)
print(child.pid, flush=True)
child.wait()
"""


def _alive(pid: int) -> bool:
    try:
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("soon", [True, False])
def test_a_child_dies_with_its_parent(extra: Any, graphs: dict[str, bytes], soon: bool) -> None:
    """Whether it is in a run that never ends, or the parent ended before the child's prctl."""
    data = graphs["endless"]
    read_end, write_end = os.pipe()
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(read_end)], stdout=subprocess.PIPE, pass_fds=(read_end,)
    )
    assert parent.stdout is not None
    try:
        child = int(parent.stdout.readline())
        header = {
            "parent": parent.pid,
            "artefact": _candidate(extra, data).artefact.to_json(),
            "place": CPU,
            "input": [1, 2, 3],
            "logits": 3,
            "threads": 1,
            "batches": [1],
            "runs": 0,
        }
        if soon:
            parent.kill()
            parent.wait(60)
        os.write(write_end, json.dumps(header).encode() + b"\n" + data + BATCHES[0].tobytes())
        if not soon:
            end = time.monotonic() + 120
            while b"onnxruntime" not in Path(f"/proc/{child}/maps").read_bytes():
                assert time.monotonic() < end
                time.sleep(0.02)
            time.sleep(1.0)  # from there it is soon in the run
            assert _alive(child)
            parent.kill()
            parent.wait(60)
        end = time.monotonic() + 120
        while _alive(child):
            assert time.monotonic() < end
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait(60)
        parent.stdout.close()
        os.close(read_end)
        os.close(write_end)
