"""Lists the artefacts that this device could run, each with its place, in order of preference."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from fedge.edge.backends.backend import CPU, CUDA, OPENVINO, RTX, TRT
from fedge.edge.backends.device import Device
from fedge.edge.backends.engine import refusal
from fedge.shared.bundle.manifest_artefacts import (
    ENGINE_KINDS,
    ONNX_FP16,
    ONNX_FP32,
    ONNX_INT8,
    RTX_FP16,
    RTX_INT8,
    TRT_FP16,
    TRT_INT8,
    Artefact,
)

#: Kinds and places, usually the fastest first. What was timed takes precedence: here by an installation, or at the
#: release, on its CPU.
ORDER: Final = (
    (RTX_INT8, RTX),
    (TRT_INT8, TRT),
    (RTX_FP16, RTX),
    (TRT_FP16, TRT),
    (ONNX_FP16, CUDA),
    (ONNX_FP32, CUDA),
    (ONNX_INT8, OPENVINO),
    (ONNX_FP32, OPENVINO),
    (ONNX_INT8, CPU),
    (ONNX_FP32, CPU),
)


@dataclass(frozen=True)
class Candidate:
    """An artefact, and where it would run.

    Attributes:
        artefact: of the bundle, or an engine built on this device.
        place: one of ``backend.PLACES``.
        refused: why it cannot be taken, in a few words; empty where it can.
    """

    artefact: Artefact
    place: str
    refused: str = ""

    @property
    def name(self) -> str:
        """Artefact and place, as messages name them."""
        return f"{self.artefact.name} on {self.place}"

    @property
    def last_resort(self) -> bool:
        """Whether this is the fp32 graph on the CPU, which always works."""
        return (self.artefact.kind, self.place) == (ONNX_FP32, CPU)


def candidates(
    artefacts: Iterable[Artefact], device: Device, *, allow_unqualified: bool = False
) -> tuple[Candidate, ...]:
    """Every combination of artefact and place, in the order of ``ORDER``; refused ones carry their reason.

    A place that this device lacks is left out if the artefact can also run elsewhere. A graph that the release timed as
    slower than the fp32 graph, for one example on its CPU, stands behind that on the CPU.

    Args:
        artefacts: of the bundle.
        device: this device's hardware and runtimes.
        allow_unqualified: accept artefacts that were executed neither at the release nor here.
    """
    artefacts = tuple(artefacts)
    listed = []
    for kind, place in ORDER:
        for artefact in artefacts:
            if artefact.kind != kind:
                continue
            reason = obstacle(artefact, place, device)
            if reason and kind in (ONNX_FP32, ONNX_INT8):
                continue
            if not reason and not (allow_unqualified or _executed(artefact)):
                reason = "was not executed at the release: `fedge-edge install` qualifies it here"
            listed.append(Candidate(artefact, place, reason))
    return tuple(sorted(listed, key=lambda c: slower(c.artefact) and c.place == CPU))


def slower(artefact: Artefact) -> bool:
    """Whether the release timed it as slower than the fp32 graph for one example; False where it did not."""
    qualification = artefact.qualification
    relative = qualification.relative_p50 if qualification else None
    return relative is not None and relative > 1


def obstacle(artefact: Artefact, place: str, device: Device) -> str:
    """What the device lacks for an artefact at a place, in a few words; empty where it lacks nothing.

    Args:
        artefact: of the bundle, or built on this device.
        place: one of ``backend.PLACES``.
        device: this device's hardware and runtimes.
    """
    if artefact.engine is not None:
        if device.gpu is None:
            return f"needs a GPU ({device.no_gpu})"
        version = device.wheels.get(artefact.engine.runtime)
        return refusal(artefact.engine, version, device.gpu.capability)
    return "" if place in device.places else f"needs {place}"


def place_of(artefact: Artefact, device: Device) -> str:
    """The best place on this device for an artefact that is requested by name."""
    if artefact.kind in ENGINE_KINDS:
        return RTX if artefact.kind in (RTX_FP16, RTX_INT8) else TRT
    return CUDA if artefact.kind == ONNX_FP16 and CUDA in device.places else CPU


def _executed(artefact: Artefact) -> bool:
    qualification = artefact.qualification
    return artefact.kind == ONNX_FP32 or (qualification is not None and qualification.executed)
