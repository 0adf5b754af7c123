"""From a finished run to a signed bundle: load, export, compare, time, sign."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from fedge.server.aggregation.privacy_cost import is_secret_sample
from fedge.server.release import compile_record, qualification
from fedge.server.release.compile_record import Compiled
from fedge.server.release.placeholder_manifest import statistics_options
from fedge.server.report.noised_figures import below_noise_floor
from fedge.server.report.page.render import write as write_report
from fedge.server.runs import trained_model
from fedge.server.runs.directory import RunDirectory
from fedge.server.runs.trained_model import Trained
from fedge.shared.bundle.bundle import Part, write_bundle
from fedge.shared.bundle.manifest import Manifest, Parity
from fedge.shared.bundle.manifest_artefacts import ONNX_FP32, Artefact, Latency
from fedge.shared.bundle.manifest_privacy import Privacy
from fedge.shared.crypto.dsse import key_id, load_private, new_key, public_path
from fedge.shared.errors import BundleError, ReleaseError, RunError, UsageError
from fedge.shared.files import write_atomically

MODEL: Final = "model.onnx"
RELEASE: Final = "release.json"


@dataclass(frozen=True)
class ReleaseSummary:
    """The result of a release.

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


def release(
    run_dir: Path,
    key: Path,
    out: Path,
    *,
    artifacts: Path | None = None,
    serial: int | None = None,
    replace_out: bool = False,
) -> ReleaseSummary:
    """Release the model of a finished run.

    Writes ``out`` and the run directory's release.json, and renders the run's report again.

    Args:
        run_dir: as `fedge simulate` has written it.
        key: private key in PEM.
        out: the bundle.
        artifacts: output of `fedge compile` for this run; its artefacts go into the bundle.
        serial: of the bundle, above that of the run's last release; unless given, seconds from 1970 to the end of the
            run, which rise from run to run, or one more than the last release's.
        replace_out: whether an existing ``out`` may be replaced.

    Raises:
        ConfigError: 209, not a run directory.
        UsageError: 102, ``serial`` is not above the last release's.
        RunError: 504, the run's files are damaged; 505, it is not finished.
        ReleaseError: 602 to 607; 610, ``artifacts`` are of another model, or were changed.
        BundleError: 705, together they are larger than a device takes.
    """
    directory = RunDirectory(run_dir)
    private = load_private(key)
    if out.exists() and not replace_out:
        raise ReleaseError(605, f"{out}: must not exist yet")
    if not out.parent.is_dir():
        raise ReleaseError(606, f"{out}: must lie in a folder that exists")
    model = trained_model.from_run(run_dir)
    config = directory.load_config()
    contributors = _contributors(model.run, sample_is_secret=is_secret_sample(config.privacy))
    manifest, onnx = _prepare(directory, model, contributors)
    manifest = replace(manifest, serial=_serial(directory, manifest.created, serial))
    manifest = replace(manifest, latency=_timed(manifest, onnx))
    contents = {MODEL: onnx}
    if artifacts is not None:
        compiled, contents = _compiled(artifacts, manifest)
        manifest = replace(manifest, artefacts=compiled.kept)
    part = write_bundle(out, manifest, contents, private, replace=replace_out)
    if artifacts is not None:
        # The report shows what was released, not what was compiled last.
        directory.write_json(run_dir / compile_record.FILE, compiled.to_json())
    summary = ReleaseSummary(part, key_id(private.public_key()), manifest)
    directory.write_json(run_dir / RELEASE, summary.to_json())
    write_report(run_dir)
    return summary


def _serial(directory: RunDirectory, created: str, requested: int | None) -> int:
    """The serial of the next release, above that of the last."""
    path = directory.path / RELEASE
    last = 0
    if path.is_file():
        try:
            last = int(trained_model.read_json(path)["manifest"].get("serial", 0))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunError(504, f"{RELEASE}: does not parse ({error!r})") from None
    if requested is None:
        return max(int(datetime.fromisoformat(created).timestamp()), last + 1)
    if requested <= last:
        raise UsageError(
            102, f"--serial: must be above {last}, that of the last release, got {requested}"
        )
    return requested


def export(source: Path, out: Path, *, task: str | None = None) -> tuple[Parity, int]:
    """Write the bare fp32 graph of a run's model, or of a checkpoint.

    Args:
        source: a run's directory, or a safetensors file.
        out: the file, which must not exist yet.
        task: of a checkpoint that lies in no run's directory.

    Returns:
        How far the graph is from the trained network, and its size in bytes.

    Raises:
        ConfigError, RunError: as ``trained_model``.
        ReleaseError: 603, 607, the graph is not the network, or it cannot be exported; 605, 606, ``out`` exists or
            cannot be written.
    """
    if out.exists():
        raise ReleaseError(605, f"{out}: must not exist yet")
    if not out.absolute().parent.is_dir():
        raise ReleaseError(606, f"{out}: must lie in a folder that exists")
    if task is not None and source.is_dir():
        raise UsageError(102, "--task: must be left out with a run's directory")
    model = (
        trained_model.from_run(source)
        if source.is_dir()
        else trained_model.from_checkpoint(source, task)
    )
    # Imported late: a wrong path is refused without torch.
    from fedge.shared.compile.onnx_export import export_onnx
    from fedge.shared.compile.parity import parity

    graph = export_onnx(model.network, model.shape)
    found = parity(model.network, graph, model.shape, examples=model.examples)
    try:
        write_atomically(out, graph)
    except OSError as error:
        raise ReleaseError(606, f"{out}: cannot be written ({error.strerror})") from None
    return found, len(graph)


def _compiled(folder: Path, manifest: Manifest) -> tuple[Compiled, dict[str, bytes]]:
    """The record of `fedge compile` for this model, and the bytes of its artefacts.

    Raises:
        ReleaseError: 610, it is of another model, or was changed.
    """
    compiled = compile_record.load(folder)
    if compiled.model_sha256 != manifest.model_sha256:
        raise ReleaseError(610, f"{folder}: must be of the run's model, got another")
    (own,) = manifest.artefacts
    if not any(a.name == own.name and a.sha256 == own.sha256 for a in compiled.kept):
        raise ReleaseError(610, f"{folder}: must hold the {own.name} of this model, got another")
    return compiled, {a.name: compile_record.content(folder, a) for a in compiled.kept}


def _contributors(run: dict[str, Any], *, sample_is_secret: bool = False) -> tuple[str, ...]:
    """Names of the sites whose update counted in at least one round.

    Args:
        run: values of run.json.
        sample_is_secret: whether epsilon assumes that the sampled sites stay secret; then all registered sites are
            named.

    Raises:
        RunError: 504, run.json holds no valid sites; 505, there is none.
    """
    try:
        names = tuple(
            sorted(
                name
                for name, site in run["sites"].items()
                if sample_is_secret or int(site["rounds"]) > 0
            )
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(504, f"{trained_model.RUN}: sites cannot be read ({error!r})") from None
    if not names:
        raise RunError(505, f"{trained_model.RUN}: must name a site whose update counted, got none")
    return names


def _prepare(
    directory: RunDirectory, model: Trained, contributors: tuple[str, ...]
) -> tuple[Manifest, bytes]:
    """The manifest without latency, and the exported model."""
    # Imported late: a wrong path or key is refused without torch.
    from fedge.shared.compile.onnx_export import builder_versions, export_onnx, opset_of
    from fedge.shared.compile.parity import parity

    task, run = model.task, model.run
    config = trained_model.read(directory.config)
    metrics = _metrics(trained_model.read_json(directory.metrics))
    try:
        onnx = export_onnx(model.network, model.shape)
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
            preprocessing=model.steps,
            metrics=metrics,
            parity=parity(model.network, onnx, model.shape, examples=model.examples),
            privacy=_privacy(directory, contributors),
            builders=builder_versions(),
        )
        return Manifest.from_bytes(manifest.to_bytes()), onnx
    except BundleError as error:
        raise RunError(504, f"{trained_model.RUN}: {error.message}") from None
    except (KeyError, TypeError) as error:
        raise RunError(504, f"{trained_model.RUN}: does not parse ({error!r})") from error


def _privacy(directory: RunDirectory, sites: tuple[str, ...]) -> Privacy | None:
    """The manifest's privacy statement, from the run's configuration and the sites' last ledger digests."""
    section = directory.load_config().privacy
    if section.mechanism == "off":
        return None
    last: dict[str, str] = {}
    try:
        for line in directory.rounds.read_text(encoding="utf-8").splitlines():
            last |= json.loads(line).get("privacy_ledgers", {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(504, f"{directory.rounds.name}: cannot be read ({error!r})") from None
    # A digest comes with an update, so having one reveals that a site was sampled.
    named = () if is_secret_sample(section) else sites
    return Privacy(
        section.mechanism,
        section.noise_multiplier,
        section.clipping_bound,
        {site: last[site] for site in named if site in last},
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
    """The last round's metrics, without those that could not be computed or lie below the noise floor."""
    try:
        noise = metrics["final"].get("noise")
        return {
            kind: {
                name: float(value)
                for name, value in metrics["final"][kind].items()
                if value is not None
                and not (noise and below_noise_floor(noise[kind].get(name, math.inf)))
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
        options = statistics_options(manifest, folder)
        timed = qualification.bench(bundle, public_path(key), MODEL, options)
    if timed.failure:
        raise ReleaseError(604, f"{MODEL}: fedge-edge bench failed ({timed.failure})")
    return qualification.latency_of(timed)
