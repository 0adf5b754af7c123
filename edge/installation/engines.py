"""Builds engines for this device's own GPU from the graphs in the bundle."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from fedge.edge.backends.backend import RTX, TRT
from fedge.edge.backends.candidates import Candidate, obstacle
from fedge.edge.backends.device import Device
from fedge.edge.installation.qualification import Subject
from fedge.edge.installation.record import refuse_foreign
from fedge.edge.installation.writer import TIMINGS, write_replacing
from fedge.shared.bundle.bundle import Bundle
from fedge.shared.bundle.manifest_artefacts import (
    ONNX_FP16,
    ONNX_INT8_SYMMETRIC,
    RTX_FP16,
    RTX_INT8,
    TRT_FP16,
    TRT_INT8,
    Artefact,
    Engine,
)
from fedge.shared.errors import FedgeError, brief
from fedge.shared.files import open_regular, read_exactly

#: Runtime, kind of the engine, kind of the graph that it is built from.
_BUILT: Final = (
    ("tensorrt-rtx", RTX_FP16, ONNX_FP16),
    ("tensorrt-rtx", RTX_INT8, ONNX_INT8_SYMMETRIC),
    ("tensorrt", TRT_FP16, ONNX_FP16),
    ("tensorrt", TRT_INT8, ONNX_INT8_SYMMETRIC),
)
_PLACES: Final = {"tensorrt-rtx": RTX, "tensorrt": TRT}
_CACHE_BYTES: Final = 256 * 2**20

_log = logging.getLogger(__name__)


def build_all(
    bundle: Bundle, device: Device, directory: Path, progress: Callable[[str], None]
) -> Iterator[Subject]:
    """Build every engine that the device could run and the bundle lacks; a failed build is a refused subject.

    Args:
        bundle: as verified.
        device: its GPU and its wheels; without either nothing is built or reported.
        directory: of the installation, where timing caches are read and kept.
        progress: called with a line of text for each step.
    """
    artefacts = bundle.manifest.artefacts
    for runtime, kind, graph_kind in _BUILT:
        graph = next((a for a in artefacts if a.kind == graph_kind), None)
        if device.gpu is None or runtime not in device.wheels or graph is None:
            continue
        place = _PLACES[runtime]
        if any(a.kind == kind and not obstacle(a, place, device) for a in artefacts):
            continue
        name = f"{kind}.sm{device.gpu.capability}.engine"
        progress(f"building {name}")
        engine = Engine(runtime, device.wheels[runtime], (device.gpu.capability,))
        try:
            data = _build(bundle.artefacts[graph.name], engine, directory, progress)
        except (FedgeError, ValueError, OSError) as error:
            nothing = Artefact(name, kind, hashlib.sha256(b"").hexdigest(), 0, graph.opset, engine)
            reason = str(error) if isinstance(error, FedgeError) else brief(error)
            yield Subject(Candidate(nothing, place, reason), built=True)
            continue
        digest = hashlib.sha256(data).hexdigest()
        artefact = Artefact(name, kind, digest, len(data), graph.opset, engine)
        yield Subject(Candidate(artefact, place), data, built=True)


def _build(onnx: bytes, engine: Engine, directory: Path, progress: Callable[[str], None]) -> bytes:
    """Build one engine in a child process and keep its timing cache for the next build."""
    from fedge.shared.compile.tensorrt import build_in_child

    path = directory / f"{engine.runtime}{TIMINGS}"
    cache = _timings(path)
    built = build_in_child(
        onnx,
        runtime=engine.runtime,
        capabilities=engine.capabilities,
        timing_cache=cache,
        listener=_by_tenths(progress),
    )
    if built.timing_cache:
        write_replacing(path, built.timing_cache)
    return built.engine


def _timings(path: Path) -> bytes | None:
    """Timing cache of an earlier build; None if there is none, or if others could have written it.

    TensorRT parses the file, so it must be as trustworthy as an engine.
    """
    try:
        file, size = open_regular(path)
    except OSError:
        return None
    with file:
        if size > _CACHE_BYTES:
            return None
        # In a folder that others can write, the file could be an older one that was moved there.
        for name, status in (
            (path.parent, path.parent.stat()),
            (path, os.fstat(file.fileno())),
        ):
            try:
                refuse_foreign(status)
            except ValueError as error:
                _log.warning("%s: %s; %s is left aside", name, error, path.name)
                return None
        return read_exactly(file, size)


def _by_tenths(progress: Callable[[str], None]) -> Callable[[str, float], None]:
    """A listener that reports each tenth of a build once, as a builder reports thousands of steps."""
    reported = 0

    def listener(_phase: str, share: float) -> None:
        nonlocal reported
        if int(10 * share) > reported:
            reported = int(10 * share)
            progress(f"  {10 * reported} %")

    return listener
