"""A verified model at work: raw examples in, labels and probabilities out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.edge.graph import refuse_external_data
from fedge.shared import preprocess
from fedge.shared.bundle import Bundle
from fedge.shared.errors import BundleError, InputError
from fedge.shared.manifest import GRAPH_INPUT, GRAPH_OUTPUT, ONNX_FP32, Manifest
from fedge.shared.manifest_rules import network_shape
from fedge.shared.onnx_session import load_onnxruntime
from fedge.shared.preprocess import Standardise, Step
from fedge.shared.schema import OutputSchema

Array: TypeAlias = NDArray[Any]

_ONLY_FATAL = 4


@dataclass(frozen=True)
class Prediction:
    """What the model says of ``n`` examples.

    Attributes:
        indices: ``(n,)`` of int64, of the chosen labels.
        probabilities: ``(n, labels)`` of float64, rows sum to 1.
    """

    indices: Array
    probabilities: Array


class EdgeModel:
    """A model of a bundle, loaded into ONNX Runtime.

    Attributes:
        manifest: what the bundle says of the model.
        steps: preprocessing as it is applied.
    """

    def __init__(
        self, manifest: Manifest, steps: Sequence[Step], session: Any, artefact: str
    ) -> None:
        self.manifest = manifest
        self.steps = tuple(steps)
        self._session = session
        self._artefact = artefact

    @classmethod
    def from_bundle(
        cls, bundle: Bundle, *, threads: int = 1, statistics: Standardise | None = None
    ) -> EdgeModel:
        """Load the model that ``open_bundle`` has verified.

        Args:
            bundle: as verified; its bytes are used, no file is opened.
            threads: CPU threads of one inference.
            statistics: a site's own mean and deviation, where the manifest leaves them to each site.

        Raises:
            BundleError: 706 or 708, the artefact does not load, or is not what the manifest says.
            InputError: 807, statistics are missing, do not fit, or the manifest holds its own.
        """
        manifest = bundle.manifest
        steps = with_statistics(manifest, statistics)
        artefact = next((a for a in manifest.artefacts if a.kind == ONNX_FP32), None)
        if artefact is None:
            raise BundleError(706, f"manifest.json: must list an artefact of kind {ONNX_FP32}")
        onnx = bundle.artefacts[artefact.name]
        refuse_external_data(onnx, artefact.name)
        session = _session(onnx, artefact.name, threads)
        _check_graph(session, manifest, artefact.name)
        return cls(manifest, steps, session, artefact.name)

    def predict(self, x: Array, first_row: int = 0) -> Prediction:
        """Predict raw examples, ``(n, *input.shape)`` of float32.

        Args:
            x: the examples; finite.
            first_row: number of the first, for messages.

        Raises:
            InputError: 804, a value overflows in preprocessing; 806, it is not among its column's
                categories.
            BundleError: 708, the model fails; 709, it gives NaN or infinity.
        """
        with np.errstate(all="ignore"):
            ready = preprocess.apply(self.steps, x)
        if (row := _first_not_finite(ready)) is not None:
            where = f"row {first_row + row}"
            raise InputError(
                804, f"{where}: must stay finite in preprocessing, got too large a value"
            )
        logits = self.logits(ready)
        if (row := _first_not_finite(logits)) is not None:
            row += first_row
            raise BundleError(709, f"row {row}: must give finite logits, got NaN or infinity")
        return decide(logits, self.manifest.output)

    def logits(self, x: Array) -> Array:
        """Run the graph on preprocessed examples, ``(n, *network shape)``; gives ``(n, k)``.

        Raises:
            BundleError: 708, the model fails.
        """
        try:
            (logits,) = self._session.run([GRAPH_OUTPUT], {GRAPH_INPUT: np.ascontiguousarray(x)})
        except Exception as error:  # onnxruntime's exceptions share no base class
            raise BundleError(
                708, f"{self._artefact}: fails to run ({_first_line(error)})"
            ) from None
        if logits.shape != (len(x), _logits(self.manifest.output)):
            raise BundleError(
                708, f"{self._artefact}: must give one row an example, got {list(logits.shape)}"
            )
        return np.asarray(logits)


def with_statistics(manifest: Manifest, statistics: Standardise | None) -> tuple[Step, ...]:
    """The manifest's steps, with a site's own statistics where the manifest leaves them to it.

    Raises:
        InputError: 807, the model needs statistics and there are none, they do not fit, or the
            signed manifest holds its own.
    """
    steps = manifest.preprocessing
    if statistics is None:
        if manifest.site_statistics:
            raise InputError(
                807,
                "this model standardises with each site's own statistics: give --statistics FILE",
            )
        return steps
    if not preprocess.learns(steps):
        raise InputError(807, "this model does not standardise: leave --statistics out")
    if not manifest.site_statistics:
        raise InputError(
            807,
            "this model was trained with one mean and deviation for all sites, which the manifest"
            " holds: leave --statistics out",
        )
    replaced = tuple(
        statistics if isinstance(step, Standardise) and not step.mean else step for step in steps
    )
    try:
        network_shape(manifest.input, replaced)
    except BundleError:
        columns = len(statistics.mean)
        raise InputError(807, f"statistics do not fit the model, got {columns} columns") from None
    return replaced


def decide(logits: Array, output: OutputSchema) -> Prediction:
    """Labels and probabilities of finite logits ``(n, k)``."""
    logits = logits.astype(np.float64)
    if output.activation == "sigmoid":
        # exp(-|z|) cannot overflow.
        small = np.exp(-np.abs(logits[:, 0]))
        second = np.where(logits[:, 0] >= 0, 1.0, small) / (1.0 + small)
        probabilities = np.stack([1.0 - second, second], axis=1)
        return Prediction((second >= output.threshold).astype(np.int64), probabilities)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    return Prediction(probabilities.argmax(axis=1), probabilities)


def _first_not_finite(x: Array) -> int | None:
    bad = ~np.isfinite(x).reshape(len(x), -1).all(axis=1)
    return int(np.flatnonzero(bad)[0]) if bad.any() else None


def _logits(output: OutputSchema) -> int:
    return 1 if output.activation == "sigmoid" else len(output.labels)


def _session(onnx: bytes, name: str, threads: int) -> Any:
    onnxruntime = load_onnxruntime()
    onnxruntime.set_default_logger_severity(_ONLY_FATAL)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _ONLY_FATAL
    # Threads that wait by spinning would hold cores that a vehicle needs elsewhere, to gain 2 %.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise BundleError(708, f"{name}: does not load ({_first_line(error)})") from None


def _check_graph(session: Any, manifest: Manifest, name: str) -> None:
    """Compare the graph's own description with the manifest."""
    for kind, found, wanted, shape in (
        (
            "input",
            session.get_inputs(),
            GRAPH_INPUT,
            network_shape(manifest.input, manifest.preprocessing),
        ),
        ("output", session.get_outputs(), GRAPH_OUTPUT, (_logits(manifest.output),)),
    ):
        if [node.name for node in found] != [wanted]:
            raise BundleError(
                708, f"{name}: must have one {kind} named {wanted!r}, got {len(found)}"
            )
        (node,) = found
        if node.type != "tensor(float)":
            raise BundleError(708, f"{name}: {kind} must be float32, got {node.type}")
        if node.shape[1:] != list(shape) or isinstance(node.shape[0], int):
            raise BundleError(
                708,
                f"{name}: {kind} must have shape [batch, {', '.join(map(str, shape))}], got {node.shape}",
            )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
