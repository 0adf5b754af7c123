"""ONNX graphs, run by ONNX Runtime on one of its execution providers."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from fedge.edge.backends.backend import CPU, CUDA, OPENVINO, PROVIDERS, Array, Shapes, first_line
from fedge.edge.backends.graph_file import refuse_external_data
from fedge.shared.bundle.manifest import GRAPH_INPUT, GRAPH_OUTPUT
from fedge.shared.bundle.manifest_artefacts import ONNX_FP16, Artefact
from fedge.shared.bundle.onnx_session import load_onnxruntime
from fedge.shared.errors import BundleError

_ONLY_FATAL: Final = 4


def provider_options(place: str, threads: int) -> dict[str, str]:
    """Options of a provider that keep fp32 precision and the limit of threads."""
    if place == CUDA:
        # TensorFloat-32 has ten bits of mantissa: the graph would no longer be the fp32 one.
        return {"use_tf32": "0"}
    if place == OPENVINO:
        # It ignores the session's threads, and uses bfloat16 by default where the processor has it.
        return {"device_type": "CPU", "precision": "FP32", "num_of_threads": str(threads)}
    return {}


class OnnxBackend:
    """A graph in a session of ONNX Runtime.

    Args:
        artefact: the graph's entry in the manifest.
        onnx: its bytes.
        shapes: of its input and output by the manifest.
        place: one of ``PROVIDERS``.
        threads: CPU threads of one inference.
        device: name of the processor that computes.

    Raises:
        BundleError: 706, its weights lie elsewhere; 708, it does not load, or is not what the
            manifest says; 710, this place is not available on this device.
    """

    engine: Final = False

    def __init__(
        self,
        artefact: Artefact,
        onnx: bytes,
        shapes: Shapes,
        *,
        place: str = CPU,
        threads: int = 1,
        device: str = "",
    ) -> None:
        self.name = f"{artefact.name} on {place}"
        self.device = device
        self.artefact = artefact.name
        self._shapes = shapes
        refuse_external_data(onnx, artefact.name)
        self._session = _session(onnx, artefact, place, threads)
        _check_graph(self._session, shapes, artefact.name)

    def run(self, x: Array) -> Array:
        """Logits ``(n, k)`` of ``x``, ``(n, *input)`` of float32.

        Raises:
            BundleError: 708, the graph fails, or gives another shape.
        """
        session = self._session
        if session is None:
            raise BundleError(708, f"{self.artefact}: is closed")
        try:
            (logits,) = session.run([GRAPH_OUTPUT], {GRAPH_INPUT: np.ascontiguousarray(x)})
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BundleError(708, f"{self.artefact}: fails to run ({first_line(error)})") from None
        if logits.shape != (len(x), self._shapes.logits):
            raise BundleError(
                708, f"{self.artefact}: must give one row an example, got {list(logits.shape)}"
            )
        return np.asarray(logits)

    def close(self) -> None:
        """Drop the session; a run in progress still finishes."""
        self._session = None


def _session(onnx: bytes, artefact: Artefact, place: str, threads: int) -> Any:
    onnxruntime = load_onnxruntime()
    onnxruntime.set_default_logger_severity(_ONLY_FATAL)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    level = onnxruntime.GraphOptimizationLevel
    # Its layout optimisation has crashed on half-precision graphs (1.31.1), and gains them nothing.
    half = artefact.kind == ONNX_FP16
    options.graph_optimization_level = level.ORT_ENABLE_EXTENDED if half else level.ORT_ENABLE_ALL
    options.log_severity_level = _ONLY_FATAL
    # Threads that wait by spinning would hold cores that a vehicle needs elsewhere, to gain 2 %.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    provider = PROVIDERS[place]
    if provider not in onnxruntime.get_available_providers():
        raise BundleError(710, f"{artefact.name}: needs onnxruntime with {provider}")
    try:
        session = onnxruntime.InferenceSession(
            onnx,
            options,
            providers=[(provider, provider_options(place, threads))],
            # It would otherwise go on with another provider, and say so on stdout only.
            enable_fallback=0,
        )
    except Exception as error:  # onnxruntime's exceptions share no base class
        code = 708 if place == CPU else 710
        raise BundleError(code, f"{artefact.name}: does not load ({first_line(error)})") from None
    active = session.get_providers()
    if active[:1] != [provider]:
        raise BundleError(710, f"{artefact.name}: must run by {provider}, got {active[:1]}")
    return session


def _check_graph(session: Any, shapes: Shapes, name: str) -> None:
    """Compare the graph's own description with the manifest."""
    for kind, nodes, expected, shape in (
        ("input", session.get_inputs(), GRAPH_INPUT, shapes.input),
        ("output", session.get_outputs(), GRAPH_OUTPUT, (shapes.logits,)),
    ):
        if [node.name for node in nodes] != [expected]:
            raise BundleError(
                708, f"{name}: must have one {kind} named {expected!r}, got {len(nodes)}"
            )
        (node,) = nodes
        if node.type != "tensor(float)":
            raise BundleError(708, f"{name}: {kind} must be float32, got {node.type}")
        if node.shape[1:] != list(shape) or isinstance(node.shape[0], int):
            raise BundleError(
                708,
                f"{name}: {kind} must have shape [batch, {', '.join(map(str, shape))}], got {node.shape}",
            )
