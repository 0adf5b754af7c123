"""Requests for edge_abuse.py: good ones, wrong ones, and bytes that are no requests; the same for the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from tritonclient.grpc import service_pb2

SERVICE: Final = "/inference.GRPCInferenceService/"
INFER: Final = f"{SERVICE}ModelInfer"
NAME: Final = "abused"
SHAPE: Final = (8, 8)
MAX_BATCH: Final = 8
OUTPUTS: Final = ("logits", "probabilities", "label")
_KINDS: Final = service_pb2.ModelInferRequest
_METHODS: Final = (
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
    "ModelReady",
    "ModelMetadata",
    "ModelConfig",
    "ModelStatistics",
    "ModelStreamInfer",
    "RepositoryIndex",
    "Nothing",
)


@dataclass(frozen=True)
class Attack:
    """One request.

    Attributes:
        kind: as tables name it.
        method: of gRPC.
        data: the message.
        timeout: seconds, the client's own deadline.
        good: whether it must be answered.
        cancel: whether the client gives up at once.
    """

    kind: str
    method: str
    data: bytes
    timeout: float = 30.0
    good: bool = False
    cancel: bool = False


def good(random: np.random.Generator) -> Any:
    """A request that must be answered."""
    rows = int(random.integers(1, MAX_BATCH + 1))
    x = random.random((rows, *SHAPE), dtype=np.float32)
    request = _KINDS(
        model_name=NAME,
        inputs=[_KINDS.InferInputTensor(name="input", datatype="FP32", shape=x.shape)],
    )
    if random.random() < 0.7:
        request.raw_input_contents.append(x.tobytes())
    else:
        request.inputs[0].contents.fp32_contents.extend(x.ravel().tolist())
    for name in random.permutation(OUTPUTS)[: int(random.integers(0, 4))]:
        request.outputs.add(name=str(name))
    return request


def _values(request: Any, random: np.random.Generator) -> None:
    """Numbers that are none, or too large."""
    x = random.random((1, *SHAPE), dtype=np.float32)
    x.flat[random.integers(x.size)] = random.choice([np.nan, np.inf, -np.inf, 3.4e38])
    request.inputs[0].shape[0] = 1
    request.inputs[0].ClearField("contents")
    del request.raw_input_contents[:]
    request.raw_input_contents.append(x.tobytes())


def _shape(request: Any, random: np.random.Generator) -> None:
    """Wrong axes and sizes, up to the largest that there are."""
    sizes = (0, -1, 1, 8, 9, 64, 2**31, 2**62, -(2**63))
    del request.inputs[0].shape[:]
    count = int(random.choice([0, 1, 2, 3, 4, 40]))
    request.inputs[0].shape.extend(int(random.choice(sizes)) for _ in range(count))


def _names(request: Any, random: np.random.Generator) -> None:
    """Names, versions, types and parameters that are not there, some very long."""
    text = "x" * int(random.choice([0, 1, 300, 20_000]))
    match random.integers(7):
        case 0:
            request.model_name = text
        case 1:
            request.model_version = text or "1"
        case 2:
            request.id = text
        case 3:
            request.inputs[0].name = text
        case 4:
            request.inputs[0].datatype = str(random.choice(["FP64", "INT8", "BYTES", "fp32", text]))
        case 5:
            request.outputs.add(name=text)
        case 6:
            request.inputs[0].parameters["shared_memory_region"].string_param = text


def _amounts(request: Any, random: np.random.Generator) -> None:
    """Too many or too few of what may come once."""
    match random.integers(5):
        case 0:
            for _ in range(int(random.integers(1, 200))):
                request.inputs.add(name="input", datatype="FP32", shape=[1, *SHAPE])
        case 1:
            for _ in range(int(random.integers(4, 200))):
                request.outputs.add(name="label")
        case 2:
            request.raw_input_contents.extend([b"1234"] * int(random.integers(1, 200)))
        case 3:
            del request.inputs[:]
        case 4:
            request.inputs[0].contents.bytes_contents.extend([b"x"] * 50)


def _parameters(request: Any, random: np.random.Generator) -> None:
    """Unknown parameters, and a timeout of microseconds."""
    for _ in range(int(random.integers(1, 100))):
        request.parameters[str(random.integers(10**6))].string_param = "x" * 50
    request.parameters["timeout"].int64_param = int(random.integers(-5, 2000))


_CHANGES: Final[dict[str, Callable[[Any, np.random.Generator], None]]] = {
    "values": _values,
    "shape": _shape,
    "names": _names,
    "amounts": _amounts,
    "parameters": _parameters,
}


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """The bytes with a few changed, cut out, doubled or put in."""
    changed = bytearray(data)
    for _ in range(int(random.integers(1, 6))):
        at = int(random.integers(len(changed) + 1))
        match random.integers(4):
            case 0 if at < len(changed):
                changed[at] = int(random.integers(256))
            case 1:
                del changed[at : at + int(random.integers(1, 40))]
            case 2:
                changed[at:at] = random.bytes(int(random.integers(1, 40)))
            case _:
                changed[at:at] = changed[at : at + 200]
    return bytes(changed)


def attacks(seed: int, count: int, limit: int) -> Iterator[Attack]:
    """``count`` requests.

    Args:
        seed: of the random choices.
        count: how many.
        limit: bytes that the server takes.
    """
    random = np.random.default_rng(seed)
    for _ in range(count):
        yield _attack(random, limit)


def _attack(random: np.random.Generator, limit: int) -> Attack:
    request, which = good(random), random.random()
    if which < 0.2:
        return Attack("good", INFER, request.SerializeToString(), good=True)
    if which < 0.6:
        kind = str(random.choice(list(_CHANGES)))
        _CHANGES[kind](request, random)
        return Attack(kind, INFER, request.SerializeToString())
    if which < 0.8:
        return Attack("mutated", INFER, mutated(request.SerializeToString(), random))
    if which < 0.88:
        return Attack("random bytes", INFER, random.bytes(int(random.integers(0, 3000))))
    if which < 0.94:
        method = SERVICE + str(random.choice(_METHODS))
        return Attack(
            "other methods", method, random.bytes(int(random.choice([0, 0, 3, 200, 6000])))
        )
    if which < 0.96:
        return Attack("given up", INFER, request.SerializeToString(), cancel=True)
    if which < 0.98:
        return Attack(
            "hurried",
            INFER,
            request.SerializeToString(),
            timeout=float(random.choice([1e-4, 1e-3])),
        )
    if which < 0.995:
        return Attack("too large", INFER, bytes(limit + 1 + int(random.integers(10**5))))
    return Attack("much too large", INFER, bytes(limit + 2**21))
