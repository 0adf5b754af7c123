"""The steps of `fedge compile`: export, build, qualify, select, and write everything into one folder."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from fedge.server.release import compile_record, qualification
from fedge.server.release.artefacts import Builder, Built, Progress
from fedge.server.release.compile_record import Compiled
from fedge.server.release.placeholder_manifest import placeholder_manifest, statistics_options
from fedge.server.report.page.render import write as write_report
from fedge.server.runs import trained_model
from fedge.server.runs.trained_model import Trained
from fedge.shared.bundle.bundle import write_bundle
from fedge.shared.bundle.manifest import Parity
from fedge.shared.bundle.manifest_artefacts import (
    ONNX_FP32,
    ONNX_INT8,
    Artefact,
    Qualification,
    Score,
)
from fedge.shared.compile import calibration
from fedge.shared.compile.calibration import Calibration
from fedge.shared.compile.targets import Target
from fedge.shared.crypto.dsse import load_private, new_key, public_path
from fedge.shared.errors import ReleaseError, UsageError
from fedge.shared.files import write_atomically

_log = logging.getLogger(__name__)


def compile_model(
    source: Path,
    targets: Sequence[Target],
    out: Path,
    *,
    task: str | None = None,
    budget: float = qualification.METRIC_BUDGET,
    keep_slower: bool = False,
    progress: Progress,
) -> Compiled:
    """Compile a run's model, or a checkpoint.

    Writes ``out`` whole or not at all: the kept artefacts and compile.json. A run's directory gets a copy of the
    record, which its report shows.

    Args:
        source: a run's directory, or a safetensors file.
        targets: what to compile for.
        out: a folder that must not exist yet, in one that does.
        task: of a checkpoint that lies in no run's directory.
        budget: most that an artefact may lose of the task's metric, see ``qualification.verdict``.
        keep_slower: keep an INT8 graph for CPUs that is no faster on this machine; the device times it again.
        progress: called during long steps.

    Returns:
        The record; a target that could not be built is named in its ``failed``, and raises nothing.

    Raises:
        UsageError: 102, a task is named for a run.
        ConfigError: 209, ``source`` is no run and no task is named.
        RunError: 504, 505, the run or file is damaged, or the run not finished.
        ReleaseError: 603, the graph is not the network; 604, it cannot be executed; 605, 606, ``out`` exists or
            cannot be written; 607, the network cannot be exported; 608, a target cannot be built here; 609, INT8 was
            asked for and there are no ranges; 611, a graph cannot be converted.
        BundleError: 705, what was built is larger than a device takes.
    """
    if task is not None and source.is_dir():
        raise UsageError(102, "--task: must be left out with a run's directory")
    if os.path.lexists(out):
        raise ReleaseError(605, f"{out}: must not exist yet")
    if not out.absolute().parent.is_dir():
        raise ReleaseError(606, f"{out}: must lie in a folder that exists")
    model = (
        trained_model.from_run(source)
        if source.is_dir()
        else trained_model.from_checkpoint(source, task)
    )
    # Imported late: a wrong path is refused without torch.
    from fedge.shared.compile.onnx_export import export_onnx, opset_of
    from fedge.shared.compile.parity import parity

    progress("model.onnx", "exporting", 0.0)
    fp32 = export_onnx(model.network, model.shape)
    fp32_parity = parity(model.network, fp32, model.shape, examples=model.examples)
    calibrated = _calibration(model)
    ranges = calibrated.ranges if calibrated else None
    if ranges is None and any(ONNX_INT8 in t.kinds(calibrated=False) for t in targets):
        raise ReleaseError(
            609, f"cpu-int8: must have activation ranges, got none ({_why(calibrated)})"
        )
    outcome = Builder(fp32, opset_of(fp32), ranges, progress).build(targets)
    artefacts = _qualify(model, fp32_parity, outcome.built, calibrated, progress)
    kept, dropped = qualification.split(artefacts, budget=budget, keep_slower=keep_slower)
    compiled = Compiled(
        task=model.task.name,
        model_sha256=model.sha256,
        targets=tuple(str(target) for target in targets),
        fedge=version("fedge"),
        device=_device(artefacts[0]),
        kept=kept,
        dropped=(*dropped, *outcome.failed),
        failed=tuple(str(target) for target in outcome.unmet),
    )
    _write(out, compiled, {b.artefact.name: b.data for b in outcome.built})
    if source.is_dir():
        _add_to_report(source, compiled)
    return compiled


def _add_to_report(run_dir: Path, compiled: Compiled) -> None:
    """Add the record to the run's report; a failure is only logged, as the artefacts are complete without it."""
    try:
        write_atomically(run_dir / compile_record.FILE, compile_record.dump(compiled))
        write_report(run_dir)
    except OSError as error:
        _log.warning("%s: the report could not be updated (%s)", run_dir, error.strerror)


def _calibration(model: Trained) -> Calibration | None:
    """The sites' calibration of this model; None where there is none, or only one of another model."""
    if model.folder is None or not (model.folder / calibration.FILE).is_file():
        return None
    loaded = calibration.load(model.folder / calibration.FILE)
    return loaded if loaded.model_sha256 == model.sha256 else None


def _why(calibrated: Calibration | None) -> str:
    return (
        f"{calibration.FILE}: {calibrated.reason}"
        if calibrated
        else f"no {calibration.FILE} of this model"
    )


def _qualify(
    model: Trained,
    fp32: Parity,
    built: Sequence[Built],
    calibrated: Calibration | None,
    progress: Progress,
) -> list[Artefact]:
    """Every artefact with its qualification, measured in a child process."""
    unproven = Qualification(False, "being qualified")
    listed = [replace(b.artefact, qualification=unproven) for b in built]
    with tempfile.TemporaryDirectory(prefix="fedge-compile-") as temporary:
        folder = Path(temporary)
        key, bundle = folder / "key", folder / "model.fedge"
        new_key(key)
        manifest = placeholder_manifest(model, fp32, tuple(listed))
        write_bundle(bundle, manifest, {b.artefact.name: b.data for b in built}, load_private(key))
        options = statistics_options(manifest, folder)
        timed = {}
        for number, one in enumerate(built):
            progress(one.artefact.name, "qualifying", number / len(built))
            timed[one.artefact.name] = qualification.bench(
                bundle, public_path(key), one.artefact.name, options
            )
        # Graphs for this very processor are held against the fp32 graph, in turns, as another process may disturb one.
        relative = {}
        source = built[0].artefact.name
        for one in (b for b in built if b.artefact.kind == ONNX_INT8):
            turns = []
            for turn in range(qualification.TURNS):
                progress(one.artefact.name, "timing beside fp32", turn / qualification.TURNS)
                pair = [
                    qualification.bench(
                        bundle, public_path(key), name, options, qualification.TURN_SECONDS
                    )
                    for name in (source, one.artefact.name)
                ]
                turns.append((pair[0], pair[1]))
            relative[one.artefact.name] = qualification.relative(turns)
    return [
        qualification.qualified(
            one.artefact,
            timed[one.artefact.name],
            _score(model, one.artefact, calibrated),
            relative.get(one.artefact.name),
        )
        for one in built
    ]


def _score(model: Trained, artefact: Artefact, calibrated: Calibration | None) -> Score | None:
    """The task's first metric as the sites measured it, without noise, on exactly these bytes; else None."""
    if calibrated is None:
        return None
    own, judged = calibrated.candidates.get(artefact.kind), model.task.metrics[0]
    metric = judged.name
    if own is None or own.sha256 != artefact.sha256:
        return None
    reference = own.metrics if artefact.kind == ONNX_FP32 else own.reference
    if metric not in own.metrics or metric not in reference or metric in own.noise:
        # The difference of two noised figures cannot resolve one point.
        return None
    return Score(
        metric,
        own.metrics[metric],
        reference[metric],
        own.num_examples,
        judged.higher_is_better,
        judged.share,
    )


def _device(fp32: Artefact) -> str:
    qualified = fp32.qualification
    return qualified.latency.device if qualified and qualified.latency else ""


def _write(out: Path, compiled: Compiled, contents: Mapping[str, bytes]) -> None:
    """Write the output folder, whole or not at all."""
    aside = out.absolute().with_name(f".{out.name}.{secrets.token_hex(6)}.tmp")
    try:
        aside.mkdir()
        for artefact in compiled.kept:
            write_atomically(aside / artefact.name, contents[artefact.name])
        write_atomically(aside / compile_record.FILE, compile_record.dump(compiled))
        aside.rename(out)
    except OSError as error:
        raise ReleaseError(606, f"{out}: cannot be written ({error.strerror})") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
