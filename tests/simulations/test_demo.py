"""The whole chain as a newcomer sees it: `fedge demo`, with the device in an environment made from the wheel."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fedge.shared.errors import UsageError
from fedge.simulations import demo_device

PROGRAM = "import sys; from fedge.shared.cli.main import main; sys.exit(main())"


@pytest.mark.slow
def test_the_whole_chain(edge_env: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "demo", "--edge", str(edge_env)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines() + done.stderr.splitlines()
    assert len(lines) <= 25, "\n".join(lines)
    assert all(len(line) <= 100 for line in lines)
    report = tmp_path / done.stdout.splitlines()[-1]
    assert done.stdout.endswith("\nruns/demo/report.html\n")

    result = json.loads((report.parent / "edge.json").read_text())
    assert result["environment"]["torch"] is False
    assert result["environment"]["flwr"] is False
    assert result["rows"] > 400
    assert result["agreement"] == 1.0
    metrics = json.loads((report.parent / "metrics.json").read_text())
    assert result["metrics"]["accuracy"] == pytest.approx(
        metrics["final"]["pooled"]["accuracy"], abs=1e-12
    )
    assert metrics["final"]["pooled"]["accuracy"] > 0.95

    page = report.read_text()
    for part in ("model.onnx", "site-8", "verified", "parity"):
        assert part.lower() in page.lower(), part
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)

    bundle, trust = report.parent / "model.fedge", report.parent / "demo.key.pub"
    data = bytearray(bundle.read_bytes())
    data[len(data) // 2] ^= 1
    bundle.write_bytes(data)
    refused = subprocess.run(
        [
            edge_env / "fedge-edge",
            "predict",
            bundle,
            "--trust",
            trust,
            "--input",
            report.parent / "test-examples.npy",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert "model.onnx" in refused.stderr


def test_a_folder_without_fedge_edge_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as raised:
        demo_device.find(tmp_path)
    assert raised.value.code == 105


@pytest.mark.slow
def test_a_device_that_fails_is_an_error_with_its_own_words(tmp_path: Path) -> None:
    own = demo_device.find(None)
    (tmp_path / "x.fedge").write_bytes(b"not a bundle")
    (tmp_path / "k.pub").write_text("no key")
    with pytest.raises(UsageError) as raised:
        own.verify(tmp_path / "x.fedge", tmp_path / "k.pub")
    assert raised.value.code == 106
    assert "FE-7" in raised.value.message
