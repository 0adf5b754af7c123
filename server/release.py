"""From a finished run to a signed bundle: load, export, compare, time, sign."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from fedge.server import report
from fedge.server.central_terms import secret_sample
from fedge.server.export import export_onnx, opset_of, parity
from fedge.server.report.noised import lost
from fedge.server.run_directory import RunDirectory
from fedge.shared import arrays, preprocess
from fedge.shared.bounded import read_bounded, reason
from fedge.shared.bundle import Part, write_bundle
from fedge.shared.errors import BundleError, ConfigError, ReleaseError, RunError
from fedge.shared.manifest import ONNX_FP32, Artefact, Latency, Manifest
from fedge.shared.manifest_privacy import Privacy
from fedge.shared.manifest_rules import network_shape
from fedge.shared.signing import key_id, load_private, new_key, public_path
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.task import Task

MODEL: Final = "model.onnx"
RELEASE: Final = "release.json"
BENCH_DEADLINE: Final = 180.0  # seconds
BENCH_SECONDS: Final = 10  # after which no further run is timed
BENCH_RUNS: Final = 500
_JSON_LIMIT: Final = 64 * 2**20
_PART: Final = "run.json"


@dataclass(frozen=True)
class ReleaseSummary:
    """What a release made.

    Attributes:
        bundle: name, size and hash of the file.
        key_id: of the key that signed.
        manifest: as signed.
    """

    bundle: Part
    key_id: str
    manifest: Manifest

    def to_json(self) -> dict[str, Any]:
        """The summary as plain JSON values, as release.json holds it."""
        return {
            "bundle": {
                "file": self.bundle.name,
                "bytes": self.bundle.bytes,
                "sha256": self.bundle.sha256,
            },
            "key_id": self.key_id,
            "manifest": self.manifest.to_json(),
        }


def release(run_dir: Path, key: Path, out: Path, *, replace_out: bool = False) -> ReleaseSummary:
    """Release the model of a finished run.

    Writes ``out`` and the run directory's release.json, and renders the run's report again.

    Args:
        run_dir: as `fedge simulate` has written it.
        key: private key in PEM.
        out: the bundle.
        replace_out: whether an existing ``out`` may be replaced.

    Raises:
        ConfigError: 209, not a run directory.
        RunError: 504, the run's files are damaged; 505, it is not finished.
        ReleaseError: 602 to 607.
    """
    directory = RunDirectory(run_dir)
    if not run_dir.is_dir() or not directory.run.is_file():
        raise ConfigError(209, f"{run_dir}: must be a run directory, got no {_PART} in it")
    private = load_private(key)
    if out.exists() and not replace_out:
        raise ReleaseError(605, f"{out}: must not exist yet")
    if not out.parent.is_dir():
        raise ReleaseError(606, f"{out}: must lie in a folder that exists")
    run = _read_json(directory.run)
    if run.get("state") != "finished":
        done, rounds = run.get("rounds_done"), run.get("rounds")
        raise RunError(505, f"{run_dir}: must be finished, got {done} of {rounds} rounds")
    config = directory.load_config()
    contributors = _contributors(run, secret=secret_sample(config.privacy))
    manifest, onnx = _prepare(directory, run, contributors)
    latency = _timed(manifest, onnx)
    manifest = replace(manifest, latency=latency)
    part = write_bundle(out, manifest, {MODEL: onnx}, private, replace=replace_out)
    summary = ReleaseSummary(part, key_id(private.public_key()), manifest)
    directory.write_json(run_dir / RELEASE, summary.to_json())
    report.write(run_dir)
    return summary


def load_network(path: Path, task: Task, sha256: str) -> nn.Module:
    """The task's network with the weights of a safetensors file.

    Raises:
        RunError: 504, the file is damaged, or not that of the task's network.
    """
    loaded = arrays.read(path, sha256)
    with torch.random.fork_rng(devices=[]):
        network = task.network()
    expected = {name: (tuple(t.shape), t.numpy().dtype) for name, t in network.state_dict().items()}
    found = {name: (a.shape, a.dtype) for name, a in loaded.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise RunError(
                504,
                f"{path.name}: {name} must be {_tensor(expected.get(name))}, "
                f"got {_tensor(found.get(name))}",
            )
    network.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in loaded.items()})
    return network.eval()


def _contributors(run: dict[str, Any], *, secret: bool = False) -> tuple[str, ...]:
    """Names of the sites whose update counted in a round at least.

    Args:
        run: of run.json.
        secret: whose updates counted must not be told, as epsilon rests on that; then all registered sites.

    Raises:
        RunError: 504, run.json does not tell; 505, there is none.
    """
    try:
        names = tuple(
            sorted(s for s, told in run["sites"].items() if secret or int(told["rounds"]) > 0)
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(504, f"{_PART}: sites cannot be read ({error!r})") from None
    if not names:
        raise RunError(505, f"{_PART}: must name a site whose update counted, got none")
    return names


def _tensor(described: tuple[tuple[int, ...], Any] | None) -> str:
    return "absent" if described is None else f"{described[1]} {list(described[0])}"


def _prepare(
    directory: RunDirectory, run: dict[str, Any], contributors: tuple[str, ...]
) -> tuple[Manifest, bytes]:
    """The manifest without latency, and the exported model."""
    task = get_task(str(run.get("task")))
    config = _read(directory.config)
    metrics = _metrics(_read_json(directory.metrics))
    try:
        steps = preprocess.from_json(run["preprocessing"])
        shape = network_shape(task.input, steps)
        network = load_network(directory.model, task, str(run["model_sha256"]))
        onnx = export_onnx(network, shape)
        sha256 = hashlib.sha256(onnx).hexdigest()
        manifest = Manifest(
            task=task.name,
            run=run["run"],
            strategy=run["strategy"],
            rounds=run["rounds_done"],
            sites=contributors,
            created=run["finished"],
            fedge=version("fedge"),
            config_sha256=hashlib.sha256(config).hexdigest(),
            model_sha256=run["model_sha256"],
            artefacts=(Artefact(MODEL, ONNX_FP32, sha256, len(onnx), opset_of(onnx)),),
            input=task.input,
            output=task.output,
            preprocessing=steps,
            metrics=metrics,
            parity=parity(network, onnx, shape),
            privacy=_privacy(directory, contributors),
        )
        return Manifest.from_bytes(manifest.to_bytes()), onnx
    except BundleError as error:
        raise RunError(504, f"{_PART}: {error.message}") from None
    except (KeyError, TypeError) as error:
        raise RunError(504, f"{_PART}: does not parse ({error!r})") from error


def _privacy(directory: RunDirectory, sites: tuple[str, ...]) -> Privacy | None:
    """What the run's configuration and the sites' last words say of differential privacy."""
    section = directory.load_config().privacy
    if section.mechanism == "off":
        return None
    last: dict[str, str] = {}
    try:
        for line in directory.rounds.read_text(encoding="utf-8").splitlines():
            last |= json.loads(line).get("privacy_ledgers", {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(504, f"{directory.rounds.name}: cannot be read ({error!r})") from None
    # A digest comes with an update, so that to have one tells that a site was drawn.
    told = () if secret_sample(section) else sites
    return Privacy(
        section.mechanism,
        section.noise_multiplier,
        section.clipping_bound,
        {site: last[site] for site in told if site in last},
        section.epsilon,
        section.delta if section.epsilon is not None else None,
        section.unit,
        section.sampling_rate if section.mechanism == "central" else None,
        section.min_separation if section.mechanism == "central-mf" else None,
        section.corrupt_sites if section.mechanism == "distributed" else None,
        section.metrics,
        section.metrics_noise_multiplier,
        section.statistics,
    )


def _metrics(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The last round's metrics, those that could be computed and that noise leaves something of."""
    try:
        noise = metrics["final"].get("noise")
        return {
            kind: {
                name: float(value)
                for name, value in metrics["final"][kind].items()
                if value is not None and not (noise and lost(noise[kind].get(name, math.inf)))
            }
            for kind in ("pooled", "site_mean")
        }
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(504, f"metrics.json: does not parse ({error!r})") from None


def _timed(manifest: Manifest, onnx: bytes) -> Latency:
    """Time the model as a device would: `fedge-edge bench` in a process of its own, on a bundle of its own."""
    with tempfile.TemporaryDirectory(prefix="fedge-release-") as name:
        folder = Path(name)
        key, bundle = folder / "key", folder / "model.fedge"
        new_key(key)
        write_bundle(bundle, manifest, {MODEL: onnx}, load_private(key))
        command = [sys.executable, "-P", "-m", "fedge.edge", "bench", str(bundle), "--json"]
        command += ["--trust", str(public_path(key)), "--runs", str(BENCH_RUNS)]
        command += ["--seconds", str(BENCH_SECONDS), *_statistics(manifest, folder)]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=BENCH_DEADLINE,
                check=False,
                text=True,
            )
        except subprocess.TimeoutExpired:
            raise ReleaseError(
                604, f"{MODEL}: must be timed within {BENCH_DEADLINE:g} seconds"
            ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise ReleaseError(604, f"{MODEL}: fedge-edge bench failed ({lines[-1]})")
    result = json.loads(done.stdout)
    return Latency(
        p50_ms=float(result["p50_ms"]),
        p99_ms=float(result["p99_ms"]),
        batch=int(result["batch"]),
        threads=int(result["threads"]),
        device=str(result["device"]),
    )


def _statistics(manifest: Manifest, folder: Path) -> list[str]:
    """Options that stand in for a site's own statistics; the time does not depend on their values."""
    if not manifest.site_statistics:
        return []
    shape = network_shape(manifest.input, manifest.preprocessing)
    path = folder / "statistics.json"
    path.write_text(json.dumps({"mean": [0.0] * shape[0], "std": [1.0] * shape[0]}))
    return ["--statistics", str(path)]


def _read(path: Path) -> bytes:
    try:
        return read_bounded(path, _JSON_LIMIT)
    except OSError as error:
        raise RunError(504, f"{path.name}: cannot be read ({reason(error)})") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read(path))
    except (ValueError, RecursionError):
        raise RunError(504, f"{path.name}: must be JSON") from None
    if not isinstance(value, dict):
        raise RunError(504, f"{path.name}: must be a JSON object")
    return value
