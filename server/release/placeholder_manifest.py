"""A manifest without provenance, with which a device can open artefacts before there is a release."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

from fedge.server.runs.trained_model import Trained
from fedge.shared.bundle import generated_examples
from fedge.shared.bundle.manifest import Manifest, Parity
from fedge.shared.bundle.manifest_artefacts import Artefact
from fedge.shared.preprocessing.steps import Standardise


def placeholder_manifest(
    model: Trained, parity: Parity, artefacts: tuple[Artefact, ...]
) -> Manifest:
    """A manifest for a temporary bundle that is signed by a temporary key.

    Args:
        model: whose graphs the artefacts are.
        parity: of the fp32 graph with the network.
        artefacts: of the bundle.
    """
    return Manifest(
        task=model.task.name,
        run="compile",
        strategy="none",
        rounds=0,
        sites=(),
        created="1970-01-01T00:00:00Z",
        fedge=version("fedge"),
        config_sha256="0" * 64,
        model_sha256=model.sha256,
        artefacts=artefacts,
        input=model.task.input,
        output=model.task.output,
        preprocessing=model.steps,
        metrics={},
        parity=parity,
    )


def statistics_options(manifest: Manifest, folder: Path) -> list[str]:
    """Command-line options that pass statistics of generated examples, for a model that takes a site's own.

    Args:
        manifest: of the bundle.
        folder: takes statistics.json where it is needed.
    """
    if not manifest.site_statistics:
        return []
    steps = generated_examples.stand_in(manifest.input, manifest.preprocessing)
    (step,) = (s for s in steps if isinstance(s, Standardise))
    path = folder / "statistics.json"
    path.write_text(json.dumps({"mean": list(step.mean), "std": list(step.std)}))
    return ["--statistics", str(path)]
