from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedge.edge.runtime.model import EdgeModel
from fedge.server.release import pipeline as release_module
from fedge.server.release import qualification
from fedge.server.release.pipeline import release
from fedge.server.runs.directory import RunDirectory
from fedge.server.runs.trained_model import load_network
from fedge.shared.bundle.bundle import Bundle, open_bundle
from fedge.shared.bundle.manifest import Manifest
from fedge.shared.cli import main
from fedge.shared.config import reader
from fedge.shared.crypto.dsse import load_public, new_key
from fedge.shared.errors import ConfigError, FedgeError, ReleaseError, RunError
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.steps import Standardise
from fedge.shared.tasks.registry import get_task
from fedge.shared.wire import tensors


@dataclass
class Run:
    """A finished run of an untrained network, as `fedge simulate` would leave it."""

    path: Path
    network: nn.Module

    def change(self, name: str, **changes: Any) -> None:
        path = self.path / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _write_run(path: Path, name: str, standardise: Standardise | None = None) -> Run:
    task = get_task(name)
    torch.manual_seed(0)
    network = task.network().eval()
    data = tensors.encode({key: t.numpy() for key, t in network.state_dict().items()})
    steps = preprocessing.fitted(task.preprocessing, standardise or Standardise())
    path.mkdir()
    (path / "model.safetensors").write_bytes(data)
    (path / "config.toml").write_text(reader.dump(reader.from_tree({"task": {"name": name}})))
    run = {
        "run": "r-1",
        "state": "finished",
        "task": name,
        "strategy": "FedAvg",
        "rounds": 2,
        "rounds_done": 2,
        "sites": {
            s: {"train_examples": 3, "test_examples": 1, "rounds": 2} for s in ("site-2", "site-1")
        },
        "preprocessing": [step.to_json() for step in steps],
        "started": "2026-11-21T20:00:00Z",
        "finished": "2026-11-21T20:01:00Z",
        "model_sha256": hashlib.sha256(data).hexdigest(),
        "fedge": "0.1.0",
        "flower": "1.41.0",
    }
    (path / "run.json").write_text(json.dumps(run))
    values = {"accuracy": 0.5, "loss": 2.25, "auc": None}
    metrics = {
        "run": "r-1",
        "final": {"round": 2, "per_site": {}, "site_mean": values, "pooled": values},
    }
    (path / "metrics.json").write_text(json.dumps(metrics))
    return Run(path, network)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "release.key"
    new_key(path)
    return path


@pytest.fixture
def trust(key: Path) -> Path:
    return key.with_name("release.key.pub")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, key: Path) -> tuple[Run, Path]:
    """A run of digits and its bundle, made by the command."""
    folder = tmp_path_factory.mktemp("released")
    run = _write_run(folder / "run", "digits")
    out = folder / "model.fedge"
    assert main.main(["release", str(run.path), "--key", str(key), "--out", str(out)]) == 0
    return run, out


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return _write_run(tmp_path / "run", "breast-cancer", Standardise((1.0,) * 30, (2.0,) * 30))


def _open(out: Path, trust: Path) -> Bundle:
    return open_bundle(out, load_public(trust))


@pytest.mark.slow
def test_the_bundle_holds_the_runs_model(released: tuple[Run, Path], trust: Path) -> None:
    run, out = released
    bundle = _open(out, trust)
    manifest = bundle.manifest
    assert (manifest.run, manifest.task, manifest.strategy) == ("r-1", "digits", "FedAvg")
    assert (manifest.rounds, manifest.sites) == (2, ("site-1", "site-2"))
    assert manifest.created == "2026-11-21T20:01:00Z"
    # Seconds from 1970 to then: a later run has a higher one.
    assert manifest.serial == 1795291260
    assert manifest.builders.keys() == {"torch", "onnx", "onnxscript", "onnxruntime"}
    assert manifest.metrics["pooled"] == {"accuracy": 0.5, "loss": 2.25}
    for name, sha256 in (
        ("config.toml", manifest.config_sha256),
        ("model.safetensors", manifest.model_sha256),
    ):
        assert hashlib.sha256((run.path / name).read_bytes()).hexdigest() == sha256
    assert 0 <= manifest.parity.max_abs_difference <= manifest.parity.tolerance == 1e-4
    assert manifest.latency is not None
    assert 0 < manifest.latency.p50_ms <= manifest.latency.p99_ms < 1000

    task = get_task("digits")
    x = task.load(None).features[:100]
    found = EdgeModel.from_bundle(bundle).predict(x)
    with torch.no_grad():
        ready = torch.from_numpy(preprocessing.apply(task.preprocessing, x))
        expected = torch.softmax(run.network(ready).double(), dim=1).numpy()
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)


def test_release_json_and_report_tell_of_the_bundle(
    released: tuple[Run, Path], trust: Path
) -> None:
    run, out = released
    found = json.loads((run.path / "release.json").read_text())
    sha256 = hashlib.sha256(out.read_bytes()).hexdigest()
    assert found["bundle"] == {"file": "model.fedge", "bytes": out.stat().st_size, "sha256": sha256}
    bundle = _open(out, trust)
    assert found["key_id"] == bundle.key_id
    assert found["manifest"] == bundle.manifest.to_json()
    assert sha256 in (run.path / "report.html").read_text()


@pytest.mark.slow
def test_a_second_release_differs_in_its_latency_and_has_a_higher_serial(
    released: tuple[Run, Path],
    key: Path,
    trust: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, out = released
    folder = tmp_path / "copy"
    shutil.copytree(run.path, folder)
    again = tmp_path / "again.fedge"
    argv = ["release", str(folder), "--key", str(key), "--out", str(again), "--json"]
    assert main.main(argv) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / "release.json").read_text())
    first, second = _open(out, trust), _open(again, trust)
    assert first.artefacts == second.artefacts

    def without_latency(bundle: Bundle) -> Manifest:
        return dataclasses.replace(bundle.manifest, latency=None, serial=0)

    assert without_latency(first) == without_latency(second)
    assert second.manifest.serial == first.manifest.serial + 1
    # One that a device could not tell from the last is refused before anything is written.
    third = tmp_path / "third.fedge"
    argv = ["release", str(folder), "--key", str(key), "--out", str(third), "--serial"]
    assert main.main([*argv, str(second.manifest.serial)]) == 2
    assert f"--serial: must be above {second.manifest.serial}" in capsys.readouterr().err
    assert not third.exists()
    assert main.main([*argv, str(second.manifest.serial + 5)]) == 0


@pytest.mark.slow
def test_a_model_for_sites_own_statistics_is_released(
    tmp_path: Path, key: Path, trust: Path
) -> None:
    run = _write_run(tmp_path / "run", "heart")
    summary = release(run.path, key, tmp_path / "model.fedge")
    assert summary.manifest.site_statistics
    assert summary.manifest.latency is not None
    bundle = _open(tmp_path / "model.fedge", trust)
    own = Standardise((1.0,) * 13, (2.0,) * 13)
    model = EdgeModel.from_bundle(bundle, statistics=own)
    x = np.asarray([[50, 1, 2, 120, 200, 0, 1, 150, 0, 1]], np.float32)
    with torch.no_grad():
        ready = torch.from_numpy(preprocessing.apply(model.steps, x))
        expected = torch.sigmoid(run.network(ready)).item()
    assert model.predict(x).probabilities[0, 1] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("section", "of_mechanism"),
    [
        ({"mechanism": "example"}, {"unit": "example"}),
        ({"mechanism": "local"}, {"unit": "site"}),
        ({"mechanism": "central", "sampling-rate": 0.5}, {"unit": "site", "sampling_rate": 0.5}),
        ({"mechanism": "central-mf", "min-separation": 2}, {"unit": "site", "min_separation": 2}),
        ({"mechanism": "distributed", "corrupt-sites": 1}, {"unit": "site", "corrupt_sites": 1}),
    ],
)
def test_the_statement_holds_all_that_epsilon_and_its_limits_follow_from(
    section: dict[str, Any], of_mechanism: dict[str, Any], run: Run
) -> None:
    """A noise multiplier without the chance to be drawn, or beside exact metrics, reads as a guarantee."""
    tree: dict[str, Any] = {
        "task": {"name": "breast-cancer"},
        "privacy": {
            **section, "noise-multiplier": 1.0, "metrics": "noised", "metrics-noise-multiplier": 9.0,
            "statistics": "unprotected",
        },
        "secure-aggregation": {"enabled": section["mechanism"] == "distributed"},
    }  # fmt: skip
    directory = RunDirectory(run.path)
    directory.config.write_text(reader.dump(reader.from_tree(tree)))
    directory.rounds.write_text("")
    found = release_module._privacy(directory, ("site-1",))
    assert found is not None
    assert found.to_json() == {
        "mechanism": section["mechanism"],
        "noise_multiplier": 1.0,
        "clipping_bound": 1.0,
        "ledgers": {},
        "metrics": "noised",
        "metrics_noise_multiplier": 9.0,
        "statistics": "unprotected",
        **of_mechanism,
    }


def _fails(kind: type[FedgeError], code: int, run_dir: Path, key: Path, out: Path) -> str:
    before = out.read_bytes() if out.exists() else None
    with pytest.raises(kind) as error:
        release(run_dir, key, out)
    assert error.value.code == code, error.value.message
    assert (out.read_bytes() if out.exists() else None) == before
    assert not (run_dir / "release.json").exists()
    return error.value.message


def test_what_is_no_run_directory_is_refused(tmp_path: Path, key: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name in ("empty", "file", "missing"):
        _fails(ConfigError, 209, tmp_path / name, key, tmp_path / "model.fedge")


def test_an_unfinished_run_is_refused(run: Run, key: Path, tmp_path: Path) -> None:
    run.change("run.json", state="running", rounds_done=1, finished=None, model_sha256=None)
    assert "1 of 2 rounds" in _fails(RunError, 505, run.path, key, tmp_path / "m")


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda run: _flip(run.path / "model.safetensors"),
        lambda run: (run.path / "model.safetensors").unlink(),
        lambda run: (run.path / "run.json").write_text("{"),
        lambda run: (run.path / "run.json").write_text("[]"),
        lambda run: (run.path / "metrics.json").unlink(),
        lambda run: (run.path / "metrics.json").write_text("{}"),
        lambda run: run.change("run.json", preprocessing=[{"op": "system"}]),
        lambda run: run.change(
            "run.json", preprocessing=[{"op": "standardise", "mean": [1], "std": [1]}]
        ),
        lambda run: run.change("run.json", preprocessing=None),
        lambda run: run.change("run.json", model_sha256="0" * 64),
    ],
)
def test_a_damaged_run_is_refused(
    run: Run, key: Path, tmp_path: Path, damage: Callable[[Run], object]
) -> None:
    damage(run)
    _fails(RunError, 504, run.path, key, tmp_path / "m")


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    task = get_task("breast-cancer")
    good = {key: t.numpy() for key, t in task.network().state_dict().items()}
    first = next(iter(good))
    path = tmp_path / "model.safetensors"
    for weights, named in (
        ({**good, "more": np.zeros(1, np.float32)}, "more must be absent"),
        ({key: a for key, a in good.items() if key != first}, "got absent"),
        ({**good, first: good[first].astype(np.float64)}, "got float64"),
        ({**good, first: good[first][:1]}, f"{first} must be"),
    ):
        data = tensors.encode(weights)
        path.write_bytes(data)
        with pytest.raises(RunError) as error:
            load_network(path, task, hashlib.sha256(data).hexdigest())
        assert error.value.code == 504
        assert named in error.value.message
    data = tensors.encode(good)
    path.write_bytes(data)
    network = load_network(path, task, hashlib.sha256(data).hexdigest())
    for name, tensor in network.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), good[name])


@pytest.mark.slow
def test_a_model_that_gives_nan_is_not_released(run: Run, key: Path, tmp_path: Path) -> None:
    weights = {
        name: np.full_like(t.numpy(), np.nan) for name, t in run.network.state_dict().items()
    }
    data = tensors.encode(weights)
    (run.path / "model.safetensors").write_bytes(data)
    run.change("run.json", model_sha256=hashlib.sha256(data).hexdigest())
    _fails(ReleaseError, 603, run.path, key, tmp_path / "m")


def test_key_and_output_are_checked_first(run: Run, key: Path, tmp_path: Path) -> None:
    _fails(ReleaseError, 602, run.path, tmp_path / "missing", tmp_path / "m")
    _fails(ReleaseError, 602, run.path, key.with_name("release.key.pub"), tmp_path / "m")
    (tmp_path / "m").write_text("precious")
    _fails(ReleaseError, 605, run.path, key, tmp_path / "m")
    _fails(ReleaseError, 606, run.path, key, tmp_path / "no" / "m")


@pytest.mark.slow
def test_a_model_that_takes_too_long_to_time_is_not_released(
    run: Run, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qualification, "BENCH_DEADLINE", 0.01)
    assert "model.onnx" in _fails(ReleaseError, 604, run.path, key, tmp_path / "m")


def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["release", str(tmp_path), "--key", str(key), "--out", str(tmp_path / "m")]
    assert main.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("FE-209 ")
    assert err.count("\n") == 1
