"""Chooses the best artefact that works here: by the installation's record, or by a trial of each candidate."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedge.edge.backends import trial
from fedge.edge.backends.backend import CPU, Array, Backend, Shapes
from fedge.edge.backends.candidates import candidates, place_of
from fedge.edge.backends.device import cpu_name, detect, runtime_versions
from fedge.edge.backends.graph_file import refuse_external_data
from fedge.edge.backends.onnx_graph import OnnxBackend
from fedge.edge.backends.open_artefact import open_artefact
from fedge.edge.backends.trial import try_out
from fedge.edge.installation.record import FILE, DeviceRecord
from fedge.edge.outputs import parity
from fedge.shared.bundle.bundle import Bundle
from fedge.shared.bundle.manifest_artefacts import ONNX_FP32, ONNX_KINDS, Artefact
from fedge.shared.errors import BundleError
from fedge.shared.preprocessing.steps import Step

_log = logging.getLogger(__name__)

#: Batch sizes that a candidate is tried with, when no installation has done so before.
_TRIED: Final = (1, 2)


@dataclass(frozen=True)
class Choice:
    """The chosen backends.

    Attributes:
        backends: the best one first, the one that always works last; they may be the same.
        why: the first of them is, in a few words.
        fallbacks: why better artefacts do not serve, each with its number.
    """

    backends: tuple[Backend, ...]
    why: str
    fallbacks: tuple[str, ...] = ()


def reference(bundle: Bundle, shapes: Shapes, threads: int) -> Backend:
    """The fp32 graph on the CPU.

    Args:
        bundle: as verified.
        shapes: of its network.
        threads: CPU threads of one inference.

    Raises:
        BundleError: 706 or 708, there is none, or it does not load.
    """
    artefact = fp32_artefact(bundle)
    data = bundle.artefacts[artefact.name]
    return OnnxBackend(artefact, data, shapes, threads=threads, device=cpu_name())


def fp32_artefact(bundle: Bundle) -> Artefact:
    """The manifest's entry of the fp32 graph.

    Raises:
        BundleError: 706, there is none.
    """
    artefact = next((a for a in bundle.manifest.artefacts if a.kind == ONNX_FP32), None)
    if artefact is None:
        raise BundleError(706, f"manifest.json: must list an artefact of kind {ONNX_FP32}")
    return artefact


def named(
    bundle: Bundle, name: str, shapes: Shapes, threads: int, record: DeviceRecord | None = None
) -> Backend:
    """The artefact of this name, at the best place that the device has for its kind.

    Args:
        bundle: as verified.
        name: of one of its artefacts, or of an engine that was built here.
        shapes: of its network.
        threads: CPU threads of one inference.
        record: of the installation.

    Raises:
        BundleError: 706, there is none of this name, or it is not safe to open; 708, it does not load;
            710, it does not work on this device; 711, it was built here and has changed.
    """
    artefacts = {a.name: a for a in bundle.manifest.artefacts}
    if artefact := artefacts.get(name):
        place = CPU if artefact.kind == ONNX_FP32 else place_of(artefact, detect((artefact,)))
        try:
            return open_artefact(artefact, place, bundle.artefacts[name], shapes, threads=threads)
        except BundleError as error:
            # Elsewhere the next best one serves.
            remedy = (
                "Name another with --artifact, or leave that out: `fedge-edge verify` lists them."
            )
            raise BundleError(error.code, error.message, remedy=remedy) from None
    built = {e.artefact.name: e for e in record.entries if e.built} if record else {}
    if record is not None and (entry := built.get(name)):
        data = record.content(entry, bundle)
        return open_artefact(entry.artefact, entry.place, data, shapes, threads=threads)
    listed = ", ".join((*artefacts, *built))
    raise BundleError(
        706,
        f"artefact: must be one of {listed}, got {name!r:.80}",
        remedy="Take one of those; `fedge-edge verify BUNDLE` lists them with what each is for.",
    )


def best(
    bundle: Bundle,
    shapes: Shapes,
    steps: Sequence[Step],
    *,
    threads: int,
    record: DeviceRecord | None,
    allow_unqualified: bool,
) -> Choice:
    """Open the fp32 graph on the CPU, and before it the best artefact that works.

    Args:
        bundle: as verified.
        shapes: of its network.
        steps: its preprocessing, complete.
        threads: CPU threads of one inference.
        record: of the installation; ignored with a warning if it does not match.
        allow_unqualified: accept artefacts that were executed neither at the release nor here.

    Raises:
        BundleError: 706 or 708, the fp32 graph does not load.
    """
    last = reference(bundle, shapes, threads)
    notes: list[str] = []
    if record is not None:
        try:
            chosen, why = _recorded(bundle, record, shapes, threads, notes)
            return Choice((last,) if chosen is None else (chosen, last), why, tuple(notes))
        except BundleError as error:
            _note(notes, error)
    chosen = _tried(bundle, shapes, steps, last, threads, allow_unqualified, notes)
    backends = (last,) if chosen is None else (chosen, last)
    return Choice(backends, _reason(bundle.manifest.artefacts, backends[0]), tuple(notes))


def _reason(artefacts: Sequence[Artefact], chosen: Backend) -> str:
    """Why a backend serves where no installation has timed anything on this device."""
    if len(artefacts) == 1:
        return "the bundle's only artefact"
    timed = any(a.qualification and a.qualification.relative_p50 is not None for a in artefacts)
    if chosen.name.endswith(f" on {CPU}") and timed:
        return "the fastest that works here, as timed at the release"
    return "the first of the usual order that works here"


def _recorded(
    bundle: Bundle, record: DeviceRecord, shapes: Shapes, threads: int, notes: list[str]
) -> tuple[Backend | None, str]:
    """The fastest artefact of the record that still opens, and why; None if that is the fp32 graph on the CPU.

    Raises:
        BundleError: 711, the record does not match, or an engine was changed.
    """
    record.check(bundle, cpu_name(), runtime_versions())
    if record.threads != threads:
        _log.info(
            "%s: its order was timed with --threads %d, and this runs with %d: another may be faster",
            FILE,
            record.threads,
            threads,
        )
    for entry in record.entries:
        if not entry.qualified:
            continue
        timed = "" if entry.p50_ms is None else f" (p50 {entry.p50_ms:.3g} ms)"
        why = f"the fastest of what `fedge-edge install` timed on this device{timed}"
        if entry.candidate.last_resort:
            return None, why
        data = record.content(entry, bundle)
        try:
            backend = open_artefact(entry.artefact, entry.place, data, shapes, threads=threads)
        except BundleError as error:
            _note(notes, error)
            continue
        if backend.device not in (record.cpu, record.gpu):
            name = backend.device
            backend.close()
            raise BundleError(711, f"{FILE}: must be of this device, got none for its {name}")
        return backend, why
    return None, "nothing else that was installed here works"


def _tried(
    bundle: Bundle,
    shapes: Shapes,
    steps: Sequence[Step],
    last: Backend,
    threads: int,
    allow_unqualified: bool,
    notes: list[str],
) -> Backend | None:
    """The first candidate of the usual order that passes a trial; None where that is the fp32 graph on the CPU."""
    artefacts = bundle.manifest.artefacts
    batches: tuple[Array, ...] = ()
    expected: list[Array] = []
    end = time.monotonic() + trial.DEADLINE
    for candidate in candidates(artefacts, detect(artefacts), allow_unqualified=allow_unqualified):
        if candidate.last_resort:
            return None
        if candidate.refused:
            lacking = BundleError(710, f"{candidate.artefact.name}: {candidate.refused}")
            _note(notes, lacking, failed=False)
            continue
        if not batches:
            batches = parity.examples(bundle.manifest, steps, _TRIED)
            expected = [last.run(batch) for batch in batches]
        name = candidate.artefact.name
        data = bundle.artefacts[name]
        try:
            if candidate.artefact.kind in ONNX_KINDS:
                # Bytes that are no graph are refused without a process.
                refuse_external_data(data, name)
            left = max(0.0, end - time.monotonic())
            tried = try_out(candidate, data, batches, shapes, threads=threads, deadline=left)
            diff = parity.difference(tried.logits, expected, bundle.manifest.output, name)
            parity.check(candidate.artefact.kind, diff, candidate.name)
            return open_artefact(candidate.artefact, candidate.place, data, shapes, threads=threads)
        except BundleError as error:
            _note(notes, error)
    return None


def _note(notes: list[str], error: BundleError, *, failed: bool = True) -> None:
    """Record and log why a better artefact is not used; a warning only if it failed."""
    text = f"{error.label} {error.message}"
    notes.append(text)
    _log.log(logging.WARNING if failed else logging.INFO, "%s", text)
