"""One loaded model as the protocol sees it: its metadata, and requests through preprocessing, batch and network."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from fedge.edge.inputs.row_rules import RowRules
from fedge.edge.runtime.model import EdgeModel
from fedge.edge.serving import codec
from fedge.edge.serving.batching import Batcher
from fedge.edge.serving.codec import DATATYPES, INPUT, OUTPUTS, Signature
from fedge.edge.serving.inference_protocol import message
from fedge.edge.serving.usage_counters import Counts, Snapshot
from fedge.shared.errors import InputError

#: The protocol's numbers of the types in a model's configuration.
_CONFIG_TYPES: Final = {"FP32": 11, "INT64": 9}
#: Names of the protocol's and of Triton's, by whether an engine is at work.
_PLATFORMS: Final = {False: "onnx_onnxv1", True: "tensorrt_plan"}
_BACKENDS: Final = {False: "onnxruntime", True: "tensorrt"}
_VERSION_DIGITS: Final = 12


@dataclass(frozen=True)
class Limits:
    """Limits of one server.

    Attributes:
        max_batch: most examples in one request, and in one run.
        max_queue: most requests that wait for a run.
        parallel: most runs at once.
        batch_delay: seconds that a run waits for more requests; 0 never waits.
        deadline: most seconds of one request.
        max_request_bytes: of one request; None for the size of a full batch, up to a bound.
    """

    max_batch: int = 32
    max_queue: int = 64
    parallel: int = 1
    batch_delay: float = 0.0
    deadline: float = 10.0
    max_request_bytes: int | None = None

    @property
    def in_flight(self) -> int:
        """Most requests that wait or run at once."""
        return self.max_queue + self.parallel * self.max_batch

    def request_bytes(self, values: int) -> int:
        """Most bytes of one request for a model of ``values`` numbers an example."""
        if self.max_request_bytes is not None:
            return self.max_request_bytes
        return max(4 * values, min(4 * values * self.max_batch, 2**24)) + 2**16


class Served:
    """A model that serves.

    Args:
        model: the loaded model.
        limits: of the server.
        counts: of the server.
        sha256: of the bundle's manifest.

    Attributes:
        model, sha256: as given.
        signature: the model in terms of the protocol; the version is the beginning of the trained model's SHA-256.
        max_bytes: of one request.
    """

    def __init__(self, model: EdgeModel, limits: Limits, counts: Counts, sha256: str) -> None:
        manifest = model.manifest
        output = manifest.output
        labels = len(output.labels)
        values = math.prod(manifest.input.shape)
        self.model = model
        self.sha256 = sha256
        self.signature = Signature(
            name=manifest.task,
            version=manifest.model_sha256[:_VERSION_DIGITS],
            shape=manifest.input.shape,
            values=values,
            logits=1 if output.activation == "sigmoid" else labels,
            labels=labels,
            max_batch=limits.max_batch,
        )
        self.max_bytes = limits.request_bytes(values)
        self._decoder = codec.Decoder(self.signature)
        self._output = output
        self._delay = limits.batch_delay
        self._lock = threading.Lock()
        self._using = 0
        self._retired = False
        self._rules = RowRules.from_schema(manifest.input, model.steps)
        self._batcher = Batcher(
            model.logits,
            max_batch=limits.max_batch,
            max_queue=limits.max_queue,
            delay=limits.batch_delay,
            counts=counts,
            parallel=limits.parallel,
        )

    @property
    def waiting(self) -> int:
        """Requests that wait for a run now."""
        return self._batcher.waiting

    def enter(self) -> bool:
        """Register a use of the model until ``leave``; False if it is retired."""
        with self._lock:
            if not self._retired:
                self._using += 1
            return not self._retired

    def leave(self) -> None:
        """End a use that ``enter`` registered; the last one frees a retired model."""
        with self._lock:
            self._using -= 1
            last = self._retired and not self._using
        if last:
            self._close()

    def retire(self) -> None:
        """Refuse new uses; the model is freed after the last one."""
        with self._lock:
            last = not self._retired and not self._using
            self._retired = True
        if last:
            self._close()

    def _close(self) -> None:
        self._batcher.close()
        self.model.close()

    @property
    def idle(self) -> bool:
        """Whether no request uses the model now."""
        return not self._using

    def infer(self, data: bytes, seconds: float, alive: Callable[[], bool]) -> bytes:
        """Answer the bytes of a ModelInferRequest with those of a ModelInferResponse.

        Args:
            data: the serialised request.
            seconds: until the request's deadline.
            alive: whether the client still waits for the answer.

        Raises:
            InputError: 802 to 806, 808 to 810.
            BundleError: 708, the model fails; 709, it gives NaN or infinity.
        """
        if len(data) > self.max_bytes:
            raise InputError(
                805, f"request: must be at most {self.max_bytes} bytes, got {len(data)}"
            )
        deadline = time.monotonic() + seconds
        request = self._decoder.decode(data)
        if request.timeout is not None:
            deadline = min(deadline, time.monotonic() + request.timeout)
        try:
            if self._rules.categories:
                self._check(request.examples)
            ready = self.model.prepare(request.examples)
        except InputError:
            # Values that are not finite also fail later on, under another number or without a column.
            self._check(request.examples)
            raise
        logits = self._batcher.infer(ready, deadline, alive)
        return codec.encode(request, logits, self.signature, self._output)

    def _check(self, examples: codec.Array) -> None:
        self._rules.checked(examples.reshape(len(examples), -1), 0)

    def metadata(self) -> Any:
        """The ModelMetadataResponse."""
        signature = self.signature
        response = message("ModelMetadataResponse")(
            name=signature.name,
            versions=[signature.version],
            platform=_PLATFORMS[self.model.engine],
        )
        response.inputs.add(name=INPUT, datatype="FP32", shape=[-1, *signature.shape])
        for name in OUTPUTS:
            shape = [-1, *signature.columns(name)]
            response.outputs.add(name=name, datatype=DATATYPES[name], shape=shape)
        return response

    def configuration(self) -> Any:
        """The ModelConfigResponse; its parameters hold what metadata has no place for: labels, and the backend."""
        signature, manifest = self.signature, self.model.manifest
        response = message("ModelConfigResponse")()
        config = response.config
        engine = self.model.engine
        config.name = signature.name
        config.platform, config.backend = _PLATFORMS[engine], _BACKENDS[engine]
        config.max_batch_size = signature.max_batch
        config.input.add(name=INPUT, data_type=_CONFIG_TYPES["FP32"], dims=signature.shape)
        for name in OUTPUTS:
            columns = signature.columns(name)
            tensor = config.output.add(name=name, data_type=_CONFIG_TYPES[DATATYPES[name]])
            tensor.dims.extend(columns or (1,))
            if not columns:
                # An output without an axis beside the batch still needs one here; this takes it away again.
                tensor.reshape.SetInParent()
        config.dynamic_batching.max_queue_delay_microseconds = round(self._delay * 1e6)
        for key, value in (
            ("labels", json.dumps(manifest.output.labels)),
            # Tells a client the scale of raw values, as of an image.
            ("preprocessing", json.dumps([step.to_json() for step in manifest.preprocessing])),
            ("run", manifest.run),
            ("model_sha256", manifest.model_sha256),
            ("fedge", manifest.fedge),
            ("serves", self.model.backend),
        ):
            config.parameters[key].string_value = value
        return response

    def statistics(self, counts: Snapshot) -> Any:
        """The ModelStatisticsResponse; counts are since the server began."""
        response = message("ModelStatisticsResponse")()
        good = counts.requests.get("OK", 0)
        model = response.model_stats.add(
            name=self.signature.name,
            version=self.signature.version,
            last_inference=int(counts.last * 1e3),
            inference_count=counts.rows,
            execution_count=sum(counts.batches),
        )
        stats = model.inference_stats
        for part, count, seconds in (
            (stats.success, good, counts.seconds - counts.failed_seconds),
            (stats.fail, sum(counts.requests.values()) - good, counts.failed_seconds),
            (stats.queue, counts.ran, counts.waited),
            (stats.compute_infer, sum(counts.batches), counts.computed),
        ):
            part.count, part.ns = count, max(0, int(seconds * 1e9))
        return response
