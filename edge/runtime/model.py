"""Runs a verified model: raw examples in, labels and probabilities out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.edge.backends.backend import Backend, Shapes
from fedge.edge.installation.record import DeviceRecord
from fedge.edge.outputs.labelling import Prediction, decide
from fedge.edge.runtime.choice import Choice, best, named
from fedge.edge.runtime.reference_trial import rehearse
from fedge.shared.bundle.bundle import Bundle
from fedge.shared.bundle.manifest import Manifest
from fedge.shared.bundle.manifest_checks import network_shape
from fedge.shared.errors import BundleError, InputError
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.schema import OutputSchema
from fedge.shared.preprocessing.steps import Standardise, Step

__all__ = ["EdgeModel", "Prediction", "decide", "with_statistics"]

Array: TypeAlias = NDArray[Any]

_log = logging.getLogger(__name__)


class EdgeModel:
    """A model of a bundle, loaded into the best backend that this device has for it.

    The fp32 graph on the CPU stands ready behind every other backend. One that fails to run is dropped, and the
    graph answers the same request. All methods may be called from any thread.

    Attributes:
        manifest: of the bundle.
        steps: preprocessing as it is applied.
        shapes: of the network's input and output.
    """

    def __init__(self, manifest: Manifest, steps: Sequence[Step], choice: Choice) -> None:
        self.manifest = manifest
        self.steps = tuple(steps)
        self.shapes = shapes(manifest)
        self._lock = threading.Lock()
        self._backends = choice.backends
        self._why = choice.why
        self._fallbacks = choice.fallbacks

    @classmethod
    def from_bundle(
        cls,
        bundle: Bundle,
        *,
        threads: int = 1,
        statistics: Standardise | None = None,
        artefact: str | None = None,
        record: DeviceRecord | None = None,
        allow_unqualified: bool = False,
        rehearsed: bool = False,
    ) -> EdgeModel:
        """Load the model that ``open_bundle`` has verified.

        Args:
            bundle: as verified; its bytes are used, no file of it is opened.
            threads: CPU threads of one inference.
            statistics: a site's own mean and standard deviation, where the manifest leaves them to each site.
            artefact: run exactly this one, qualified or not, and nothing in its place.
            record: of the installation on this device; its order is used, and its qualified artefacts are
                not tried again.
            allow_unqualified: accept artefacts that were executed neither at the release nor here. They are
                tried and compared in a child process all the same. Unsafe: their accuracy is unknown.
            rehearsed: let the fp32 graph answer in a child process before this one opens it.

        Raises:
            BundleError: 706 or 708, the fp32 graph does not load, or is not what the manifest says; 709 or 710,
                it failed its rehearsal; 706, 708, 710 or 711, the artefact that was named does not load.
            InputError: 807, statistics are missing, do not match, or the manifest holds its own.
        """
        manifest = bundle.manifest
        steps = with_statistics(manifest, statistics)
        if rehearsed:
            rehearse(bundle, shapes(manifest), steps, threads)
        if artefact is not None:
            backend = named(bundle, artefact, shapes(manifest), threads, record)
            return cls(manifest, steps, Choice((backend,), "named by --artifact"))
        if allow_unqualified:
            _log.warning("artefacts that were executed neither at the release nor here may serve")
        choice = best(
            bundle,
            shapes(manifest),
            steps,
            threads=threads,
            record=record,
            allow_unqualified=allow_unqualified,
        )
        return cls(manifest, steps, choice)

    @property
    def backend(self) -> str:
        """The backend in use: artefact and place, for example ``"model.int8.onnx on CPU"``."""
        return self._backends[0].name

    @property
    def why(self) -> str:
        """Why that backend is in use, in a few words."""
        return self._why

    @property
    def artefact(self) -> str:
        """Name of the artefact in use."""
        return self._backends[0].artefact

    @property
    def device(self) -> str:
        """Name of the processor that computes."""
        return self._backends[0].device

    @property
    def engine(self) -> bool:
        """Whether a TensorRT engine is in use, not a graph."""
        return self._backends[0].engine

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """Why better artefacts are not in use, each with its error number, in the order of events."""
        return self._fallbacks

    def predict(self, x: Array, first_row: int = 0) -> Prediction:
        """Predict raw examples, ``(n, *input.shape)`` of float32.

        Args:
            x: the examples; finite.
            first_row: number of the first example, for messages.

        Raises:
            InputError: 804, a value overflows in preprocessing; 806, it is not among its column's
                categories.
            BundleError: 708, the model fails; 709, it gives NaN or infinity.
        """
        ready = self.prepare(x, first_row)
        logits = self.logits(ready)
        if (row := _first_not_finite(logits)) is not None:
            row += first_row
            raise BundleError(709, f"row {row}: must give finite logits, got NaN or infinity")
        return decide(logits, self.manifest.output)

    def prepare(self, x: Array, first_row: int = 0) -> Array:
        """Preprocess raw examples ``(n, *input.shape)``; gives ``(n, *network shape)``.

        Args:
            x: raw examples of float32; finite.
            first_row: number of the first example, for messages.

        Raises:
            InputError: 804, a value overflows; 806, it is not among its column's categories.
        """
        ready = x
        if self.steps:
            with np.errstate(all="ignore"):
                ready = preprocessing.apply(self.steps, x)
        if (row := _first_not_finite(ready)) is not None:
            where = f"row {first_row + row}"
            raise InputError(
                804, f"{where}: must stay finite in preprocessing, got too large a value"
            )
        return ready

    def logits(self, x: Array) -> Array:
        """Run the network on preprocessed examples, ``(n, *network shape)`` of float32; gives ``(n, k)``.

        Raises:
            InputError: 802 or 803, of another shape or type.
            BundleError: 708 or 710, the model fails.
        """
        # A fault of the caller must not cost a backend its place.
        if x.shape[1:] != self.shapes.input:
            raise InputError(802, f"input: must be {list(self.shapes.input)}, got {x.shape[1:]}")
        if x.dtype != np.float32:
            raise InputError(803, f"input: must be float32, got {x.dtype}")
        if not len(x):
            return np.empty((0, self.shapes.logits), np.float32)
        backends = self._backends
        while True:
            try:
                return backends[0].run(x)
            except BundleError as error:
                if len(backends) == 1:
                    raise
                backends = self._without(backends[0], error)

    def close(self) -> None:
        """Free the backends' resources; the model cannot be used afterwards."""
        for backend in self._backends:
            backend.close()

    def _without(self, failed: Backend, error: BundleError) -> tuple[Backend, ...]:
        """Drop a backend that failed, and return the others."""
        with self._lock:
            # Of several threads that it fails, the first drops it.
            first = failed is self._backends[0] and len(self._backends) > 1
            if first:
                self._backends = self._backends[1:]
                reason = f"{error.label} {error.message}"
                self._fallbacks = (*self._fallbacks, reason)
                self._why = "what was in use failed"
                _log.warning("%s; %s goes on", reason, self._backends[0].name)
            left = self._backends
        if first:
            failed.close()
        return left


def shapes(manifest: Manifest) -> Shapes:
    """Shapes of the input and output of the manifest's network."""
    return Shapes(network_shape(manifest.input, manifest.preprocessing), _logits(manifest.output))


def with_statistics(manifest: Manifest, statistics: Standardise | None) -> tuple[Step, ...]:
    """The manifest's steps, with a site's own statistics where the manifest leaves them to it.

    Args:
        manifest: of the model.
        statistics: a site's own mean and standard deviation of each column, or None.

    Raises:
        InputError: 807, the model needs statistics and there are none, they do not match, or the
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
    if not preprocessing.learns(steps):
        raise InputError(807, "this model does not standardise: leave --statistics out")
    if not manifest.site_statistics:
        raise InputError(
            807,
            "this model was trained with one mean and standard deviation for all sites, which the"
            " manifest holds: leave --statistics out",
        )
    replaced = tuple(
        statistics if isinstance(step, Standardise) and not step.mean else step for step in steps
    )
    try:
        network_shape(manifest.input, replaced)
    except BundleError:
        columns = len(statistics.mean)
        raise InputError(
            807, f"statistics: must have the model's columns, got {columns} columns"
        ) from None
    return replaced


def _first_not_finite(x: Array) -> int | None:
    finite = np.isfinite(x)
    if finite.all():
        return None
    return int(np.flatnonzero(~finite.reshape(len(x), -1).all(axis=1))[0])


def _logits(output: OutputSchema) -> int:
    return 1 if output.activation == "sigmoid" else len(output.labels)
