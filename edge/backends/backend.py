"""The interface of an execution backend, and the shapes of the network that it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

#: Places where an artefact can run, as messages name them.
CPU: Final = "CPU"
CUDA: Final = "CUDA"
OPENVINO: Final = "OpenVINO"
RTX: Final = "TensorRT for RTX"
TRT: Final = "TensorRT"
PLACES: Final = (CPU, CUDA, OPENVINO, RTX, TRT)

#: ONNX Runtime's execution provider for each of its places.
PROVIDERS: Final = {
    CPU: "CPUExecutionProvider",
    CUDA: "CUDAExecutionProvider",
    OPENVINO: "OpenVINOExecutionProvider",
}


@dataclass(frozen=True)
class Shapes:
    """Shapes of the network's input and output.

    Attributes:
        input: shape of one example, without the batch axis.
        logits: number of logits of one example.
    """

    input: tuple[int, ...]
    logits: int


class Backend(Protocol):
    """An opened artefact, ready to run.

    Attributes:
        artefact: its name.
        name: artefact and place, for example ``"model.int8.onnx on CPU"``.
        device: name of the processor that computes.
        engine: whether it is a TensorRT engine, not a graph.
    """

    @property
    def artefact(self) -> str:
        """Name of the artefact."""

    @property
    def name(self) -> str:
        """Artefact and place."""

    @property
    def device(self) -> str:
        """Name of the processor that computes."""

    @property
    def engine(self) -> bool:
        """Whether it is a TensorRT engine, not a graph."""

    def run(self, x: Array) -> Array:
        """Logits ``(n, k)`` of float32 of ``x``, ``(n, *input)`` of float32; from any thread.

        Raises:
            BundleError: 708 or 710, it fails to run.
        """

    def close(self) -> None:
        """Free its resources; a later run fails."""


def first_line(error: BaseException) -> str:
    """The first line of a library's error message, at most 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
