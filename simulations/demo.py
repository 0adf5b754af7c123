"""The whole chain on one machine: eight sites, a federation, a signed bundle, and a device that runs it."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedge.client.data.dataset import SiteData, site_shares
from fedge.server.release.pipeline import ReleaseSummary, release
from fedge.server.report.page.render import write as write_report
from fedge.server.runs.directory import RunDirectory
from fedge.server.runs.listener import Listener
from fedge.shared.config.federation import Config
from fedge.shared.config.reader import load
from fedge.shared.crypto.dsse import new_key
from fedge.shared.preprocessing import steps
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.task import Task
from fedge.shared.wire.tensors import read
from fedge.simulations.demo_device import Device
from fedge.simulations.engine import simulate


def configuration() -> Config:
    """The configuration of the demonstration."""
    with as_file(files("fedge.simulations") / "demo.toml") as path:
        return load(path)


def federate(out: Path, listener: Listener) -> RunDirectory:
    """Train over the sites.

    Args:
        out: the run directory, new or empty.
        listener: called with the run's events.
    """
    return simulate(configuration(), out, listener=listener)


def sign(directory: RunDirectory) -> ReleaseSummary:
    """Create a key for this demonstration, export the model, check parity, and sign a bundle."""
    key = directory.path / "demo.key"
    new_key(key)
    return release(directory.path, key, directory.path / "model.fedge")


def run_on(device: Device, directory: RunDirectory) -> dict[str, Any]:
    """Verify and run the bundle on the device over all sites' test examples; write edge.json and the report.

    Args:
        device: environment that runs the bundle.
        directory: of the finished run, with the signed bundle.
    """
    bundle, trust = directory.path / "model.fedge", directory.path / "demo.key.pub"
    config = directory.load_config()
    task = get_task(config.task.name)
    features, labels = _test_examples(list(site_shares(config, task).values()))
    examples = directory.path / "test-examples.npy"
    np.save(examples, features, allow_pickle=False)
    environment = device.inventory()
    device.verify(bundle, trust)
    predicted, seconds = device.predict(bundle, trust, examples)
    result: dict[str, Any] = {
        "verified": True,
        "rows": len(labels),
        "metrics": {"accuracy": float(np.mean(predicted == labels))},
        "agreement": float(np.mean(predicted == _trained_labels(directory, task, features))),
        "seconds": round(seconds, 4),
        "environment": environment,
        "bench": device.bench(bundle, trust),
    }
    directory.write_json(directory.path / "edge.json", result)
    write_report(directory.path)
    return result


def _test_examples(shares: list[SiteData]) -> tuple[NDArray[Any], NDArray[Any]]:
    features = np.concatenate([share.test_features for share in shares])
    return features, np.concatenate([share.test_labels for share in shares])


def _trained_labels(directory: RunDirectory, task: Task, features: NDArray[Any]) -> NDArray[Any]:
    network = task.network()
    weights = {k: torch.from_numpy(a) for k, a in read(directory.model).items()}
    network.load_state_dict(weights)
    network.eval()
    with torch.no_grad():
        logits = network(torch.from_numpy(steps.apply(task.preprocessing, features)))
    return np.asarray(logits.argmax(dim=1).numpy())
