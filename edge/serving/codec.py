"""Requests and answers of ModelInfer: from bytes to examples, and from logits to bytes.

Open Inference Protocol, gRPC form. A tensor travels as raw little-endian bytes or as typed contents; both are read,
raw bytes are written. Invalid requests are refused by number before the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, TypeAlias

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from fedge.edge.outputs.labelling import decide
from fedge.edge.serving.inference_protocol import message, varint
from fedge.shared.errors import InputError
from fedge.shared.preprocessing.schema import OutputSchema

Array: TypeAlias = NDArray[Any]

INPUT: Final = "input"
LOGITS: Final = "logits"
PROBABILITIES: Final = "probabilities"
LABEL: Final = "label"
OUTPUTS: Final = (LOGITS, PROBABILITIES, LABEL)
DATATYPES: Final = {LOGITS: "FP32", PROBABILITIES: "FP32", LABEL: "INT64"}

#: Longest name, version or id that is read, in characters.
MAX_NAME: Final = 256
_SHOWN: Final = 80
#: Parameters that would change what a tensor is; others are hints, and are left unread.
_REFUSED: Final = ("classification", "shared_memory_region", "binary_data_size")
#: Longest request head that is cached, in bytes, and the largest number of them.
_MAX_HEAD: Final = 2048
_MAX_HEADS: Final = 64
_RAW_INPUT: Final = b"\x3a"  # field 7, length-delimited
_RAW_OUTPUT: Final = b"\x32"  # field 6, length-delimited
_ID: Final = b"\x1a"  # field 3, length-delimited

_REQUEST: Final = message("ModelInferRequest")
_RESPONSE: Final = message("ModelInferResponse")


class UnknownNameError(InputError):
    """810: the request names a model, output or service that is not served here."""


@dataclass(frozen=True)
class Signature:
    """The model's inputs and outputs as the protocol sees them.

    Attributes:
        name: of the model.
        version: of the model; a request may leave it empty.
        shape: of one raw example.
        values: numbers in one raw example.
        logits: number of logits in a row.
        labels: number of probabilities in a row.
        max_batch: most examples in one request.
    """

    name: str
    version: str
    shape: tuple[int, ...]
    values: int
    logits: int
    labels: int
    max_batch: int

    def columns(self, output: str) -> tuple[int, ...]:
        """Shape of one row of an output."""
        return {LOGITS: (self.logits,), PROBABILITIES: (self.labels,), LABEL: ()}[output]


@dataclass(frozen=True, slots=True)
class Request:
    """One decoded request.

    Attributes:
        examples: raw, ``(n, *shape)`` of float32; may hold NaN and infinity.
        outputs: names, in the order of the answer.
        id: the client's own id of the request, repeated in the answer.
        timeout: seconds that the client's parameter ``timeout`` allows, None where it has none.
    """

    examples: Array
    outputs: tuple[str, ...]
    id: str
    timeout: float | None


class Decoder:
    """Decodes requests for one model; a request that begins as an earlier one did is not parsed again.

    A client repeats a request with other numbers, and these come last. If the bytes before them equal those of a
    request that was parsed in full, and as many numbers follow, then all but the numbers is equal too: a message is
    the concatenation of its fields (Protocol Buffers, encoding), and the length of the last is among the compared
    bytes. May be used by many threads at once.

    Args:
        signature: of the model.
    """

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        #: By the length of the request: the bytes before its numbers, and the parsed request.
        self._heads: dict[int, tuple[bytes, Request]] = {}

    def decode(self, data: bytes) -> Request:
        """Decode the bytes of a ModelInferRequest, with the result and the errors of ``decode``."""
        cached = self._heads.get(len(data))
        if cached is not None and data.startswith(cached[0]):
            head, template = cached
            # Copied, as a float32 must not begin at any byte.
            flat = np.frombuffer(data, dtype="<f4", offset=len(head)).copy()
            return Request(
                flat.reshape(template.examples.shape),
                template.outputs,
                template.id,
                template.timeout,
            )
        request = decode(data, self._signature)
        # Requests with ids never begin alike.
        if not request.id and (before := _before_numbers(data, request.examples.nbytes)):
            if len(self._heads) >= _MAX_HEADS:
                self._heads.clear()
            nothing = np.broadcast_to(np.float32(0), request.examples.shape)
            self._heads[len(data)] = before, replace(request, examples=nothing)
        return request


def _before_numbers(data: bytes, count: int) -> bytes | None:
    """All but the last ``count`` bytes, if these are the raw contents and what precedes them is short."""
    head, mark = data[: len(data) - count], _RAW_INPUT + varint(count)
    if len(head) > _MAX_HEAD or not head.endswith(mark):
        return None
    try:
        # Only if the rest is a message by itself does the field begin where it seems to.
        rest = _REQUEST.FromString(head[: -len(mark)])
    except DecodeError:
        return None
    return None if rest.raw_input_contents else head


def decode(data: bytes, signature: Signature) -> Request:
    """Decode the bytes of a ModelInferRequest.

    Args:
        data: the serialised message.
        signature: of the model.

    Raises:
        InputError: 802, a tensor's shape or size; 803, its type; 805, too many examples; 810, the bytes are no
            request, or it names something unknown.
    """
    try:
        request = _REQUEST.FromString(data)
    except DecodeError:
        raise InputError(810, "request: must be a ModelInferRequest, got other bytes") from None
    check_model(request.model_name, request.model_version, signature)
    if len(request.id) > MAX_NAME:
        raise InputError(810, f"id: must have at most {MAX_NAME} characters, got {len(request.id)}")
    inputs = request.inputs
    if len(inputs) != 1:
        raise InputError(810, f"inputs: must be one, {INPUT!r}, got {len(inputs)}")
    tensor = inputs[0]
    if tensor.name != INPUT:
        raise InputError(810, f"inputs: must be {INPUT!r}, got {tensor.name[:_SHOWN]!r}")
    if tensor.parameters:
        _refuse_parameters(tensor.parameters, INPUT)
    outputs = _outputs(request.outputs) if request.outputs else OUTPUTS
    timeout = _timeout(request.parameters) if request.parameters else None
    flat = _values(tensor, request.raw_input_contents, signature)
    return Request(flat.reshape(-1, *signature.shape), outputs, request.id, timeout)


def check_model(name: str, version: str, signature: Signature) -> None:
    """Refuse another model's name or version.

    Args:
        name: that the request names.
        version: that the request names; may be empty.
        signature: of the model.

    Raises:
        UnknownNameError: 810.
    """
    if name != signature.name:
        raise UnknownNameError(810, f"model: must be {signature.name!r}, got {name[:_SHOWN]!r}")
    if version and version != signature.version:
        raise UnknownNameError(
            810, f"model version: must be {signature.version!r} or empty, got {version[:_SHOWN]!r}"
        )


def encode(request: Request, logits: Array, signature: Signature, output: OutputSchema) -> bytes:
    """Encode a ModelInferResponse with the requested outputs.

    Args:
        request: as decoded.
        logits: of its examples, ``(n, signature.logits)``, finite.
        signature: of the model.
        output: meaning of the logits.
    """
    parts = [_skeleton(signature, request.outputs, len(logits))]
    if request.id:
        mark = request.id.encode()
        parts += (_ID, varint(len(mark)), mark)
    decision = None if request.outputs == (LOGITS,) else decide(logits, output)
    for name in request.outputs:
        if decision is None or name == LOGITS:
            values = logits.astype("<f4", copy=False)
        elif name == PROBABILITIES:
            values = decision.probabilities.astype("<f4")
        else:
            values = decision.indices.astype("<i8", copy=False)
        raw = values.tobytes()
        parts += (_RAW_OUTPUT, varint(len(raw)), raw)
    return b"".join(parts)


@lru_cache(maxsize=512)
def _skeleton(signature: Signature, outputs: tuple[str, ...], rows: int) -> bytes:
    """An answer without its id and numbers. Fields may come in any order, so those are simply appended."""
    response = _RESPONSE(model_name=signature.name, model_version=signature.version)
    for name in outputs:
        shape = [rows, *signature.columns(name)]
        response.outputs.add(name=name, datatype=DATATYPES[name], shape=shape)
    return bytes(response.SerializeToString())


def _outputs(tensors: Any) -> tuple[str, ...]:
    if len(tensors) > len(OUTPUTS):
        raise InputError(810, f"outputs: must be at most {len(OUTPUTS)}, got {len(tensors)}")
    names = tuple(tensor.name for tensor in tensors)
    for tensor in tensors:
        if tensor.name not in OUTPUTS:
            allowed = ", ".join(OUTPUTS)
            raise InputError(810, f"outputs: must be among {allowed}, got {tensor.name[:_SHOWN]!r}")
        if tensor.parameters:
            _refuse_parameters(tensor.parameters, tensor.name)
    if len(set(names)) != len(names):
        raise InputError(810, "outputs: must be named once each, got one twice")
    return names


def _refuse_parameters(parameters: Any, where: str) -> None:
    for name in _REFUSED:
        if name in parameters:
            raise InputError(
                810, f"{where}: must not have the parameter {name!r}, which is not served"
            )


def _timeout(parameters: Any) -> float | None:
    """Seconds of the parameter ``timeout``, which is in microseconds."""
    if "timeout" not in parameters:
        return None
    value = parameters["timeout"]
    microseconds = int(value.int64_param or value.uint64_param)
    return microseconds / 1e6 if microseconds > 0 else None


def _values(tensor: Any, raw: Any, signature: Signature) -> Array:
    """The input's numbers, flat, of float32."""
    if tensor.datatype != "FP32":
        raise InputError(803, f"{INPUT}: must be FP32, got {tensor.datatype[:_SHOWN]!r}")
    shape = tuple(tensor.shape) if len(tensor.shape) <= 32 else (0,) * 33
    if shape[1:] != signature.shape or shape[0] < 1:
        expected = ", ".join(map(str, signature.shape))
        raise InputError(802, f"{INPUT}: must have shape [batch, {expected}], got {_shown(shape)}")
    rows = shape[0]
    if rows > signature.max_batch:
        raise InputError(
            805, f"{INPUT}: must hold at most {signature.max_batch} examples, got {rows}"
        )
    count = rows * signature.values
    if not raw:
        return _typed(tensor, count)
    if len(raw) > 1 or tensor.HasField("contents"):
        raise InputError(810, f"{INPUT}: must come once, raw or typed, got it more often")
    data = raw[0]
    if len(data) != 4 * count:
        raise InputError(802, f"{INPUT}: must be {4 * count} raw bytes, got {len(data)}")
    return np.frombuffer(data, dtype="<f4")


def _typed(tensor: Any, count: int) -> Array:
    fields = tensor.contents.ListFields()
    for field, _ in fields:
        if field.name != "fp32_contents":
            raise InputError(803, f"{INPUT}: must be in fp32_contents, got {field.name}")
    length = len(fields[0][1]) if fields else 0
    if length != count:
        raise InputError(802, f"{INPUT}: must be {count} numbers, got {length}")
    return np.fromiter(fields[0][1], dtype=np.float32, count=count)


def _shown(shape: tuple[int, ...]) -> str:
    return (
        str(list(shape))
        if len(shape) <= 8
        else f"{len(shape) if len(shape) <= 32 else 'many'} axes"
    )
