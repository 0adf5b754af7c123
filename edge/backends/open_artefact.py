"""Opens an artefact with the backend of its place."""

from __future__ import annotations

from fedge.edge.backends.backend import CPU, OPENVINO, PROVIDERS, Backend, Shapes
from fedge.edge.backends.cuda import Driver
from fedge.edge.backends.device import cpu_name
from fedge.edge.backends.engine import EngineBackend
from fedge.edge.backends.onnx_graph import OnnxBackend
from fedge.shared.bundle.manifest_artefacts import Artefact


def open_artefact(
    artefact: Artefact, place: str, data: bytes, shapes: Shapes, *, threads: int
) -> Backend:
    """Open an artefact at a place.

    Args:
        artefact: its entry in the manifest or in the installation's record.
        place: one of ``backend.PLACES`` that can open its kind.
        data: its bytes, verified.
        shapes: of the network.
        threads: CPU threads of one inference.

    Raises:
        BundleError: 706 or 708, the artefact is at fault; 710, it does not work on this device.
    """
    if place not in PROVIDERS:
        return EngineBackend(artefact, data, shapes)
    device = cpu_name() if place in (CPU, OPENVINO) else Driver().gpu().name
    return OnnxBackend(artefact, data, shapes, place=place, threads=threads, device=device)
