"""`fedge export`: the bare graph of a run, equal to the network, and nothing written over."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from fedge.shared.cli.main import main
from fedge.shared.config import reader
from fedge.shared.tasks.registry import get_task
from fedge.shared.wire import tensors

pytestmark = pytest.mark.slow


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, torch.nn.Module]:
    """A finished run of an untrained network."""
    task = get_task("digits")
    torch.manual_seed(0)
    network = task.network().eval()
    data = tensors.encode({key: t.numpy() for key, t in network.state_dict().items()})
    path = tmp_path / "run"
    path.mkdir()
    (path / "model.safetensors").write_bytes(data)
    (path / "config.toml").write_text(reader.dump(reader.from_tree({"task": {"name": "digits"}})))
    told = {
        "run": "r-1", "state": "finished", "task": "digits", "rounds": 1, "rounds_done": 1,
        "preprocessing": [step.to_json() for step in task.preprocessing],
        "model_sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    (path / "run.json").write_text(json.dumps(told))
    return path, network


def test_the_graph_is_the_network(run, tmp_path, capsys):
    path, network = run
    assert main(["export", str(path), "--out", str(tmp_path / "model.onnx")]) == 0
    told = capsys.readouterr().out
    assert "within" in told
    assert "nothing signs it" in told
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    (found,) = session.run(["logits"], {"input": x})
    with torch.no_grad():
        np.testing.assert_allclose(found, network(torch.from_numpy(x)).numpy(), atol=1e-5)
    # A checkpoint alone gives the same bytes.
    weights = tmp_path / "alone.safetensors"
    weights.write_bytes((path / "model.safetensors").read_bytes())
    words = ["export", str(weights), "--task", "digits", "--out", str(tmp_path / "again.onnx")]
    assert main(words) == 0
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "model.onnx").read_bytes()


def test_nothing_is_written_over_and_no_run_is_no_source(run, tmp_path, capsys):
    path, _ = run
    (tmp_path / "taken.onnx").write_text("mine")
    for words, label in (
        ([str(path), "--out", str(tmp_path / "taken.onnx")], "FE-605"),
        ([str(path), "--out", str(tmp_path / "no" / "model.onnx")], "FE-606"),
        ([str(path), "--task", "digits", "--out", str(tmp_path / "a.onnx")], "FE-102"),
        ([str(tmp_path), "--out", str(tmp_path / "a.onnx")], "FE-209"),
    ):
        assert main(["export", *words]) in (1, 2)
        assert label in capsys.readouterr().err
    assert (tmp_path / "taken.onnx").read_text() == "mine"
    assert not (tmp_path / "a.onnx").exists()
