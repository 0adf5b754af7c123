"""Which artefacts this device could run, where, and in which order: facts in, a list out."""

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

#: Kinds and places, what is fastest in most cases first. Where the device has measured, its order counts.
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
        """As messages name it."""
        return f"{self.artefact.name} on {self.place}"

    @property
    def last_resort(self) -> bool:
        """Whether it is what always works: the fp32 graph on the CPU."""
        return (self.artefact.kind, self.place) == (ONNX_FP32, CPU)


def candidates(
    artefacts: Iterable[Artefact], device: Device, *, allow_unqualified: bool = False
) -> tuple[Candidate, ...]:
    """All that the artefacts could be run as, in the order of ``ORDER``, those refused with their reason.

    What a device merely lacks for an artefact that it can run elsewhere is left out in silence.

    Args:
        artefacts: of the bundle.
        device: what it has.
        allow_unqualified: take what was executed neither at the release nor here.
    """
    artefacts = tuple(artefacts)
    found = []
    for kind, place in ORDER:
        for artefact in artefacts:
            if artefact.kind != kind:
                continue
            reason = obstacle(artefact, place, device)
            if reason and kind in (ONNX_FP32, ONNX_INT8):
                continue
            if not reason and not (allow_unqualified or _executed(artefact)):
                reason = "was not executed at the release: `fedge-edge install` qualifies it here"
            found.append(Candidate(artefact, place, reason))
    return tuple(found)


def obstacle(artefact: Artefact, place: str, device: Device) -> str:
    """What the device lacks for an artefact at a place, in a few words; empty where it lacks nothing."""
    if artefact.engine is not None:
        if device.gpu is None:
            return f"needs a GPU ({device.no_gpu})"
        version = device.wheels.get(artefact.engine.runtime)
        return refusal(artefact.engine, version, device.gpu.capability)
    return "" if place in device.places else f"needs {place}"


def place_of(artefact: Artefact, device: Device) -> str:
    """Where an artefact that is asked for by name runs: the best place that there is for its kind."""
    if artefact.kind in ENGINE_KINDS:
        return RTX if artefact.kind in (RTX_FP16, RTX_INT8) else TRT
    return CUDA if artefact.kind == ONNX_FP16 and CUDA in device.places else CPU


def _executed(artefact: Artefact) -> bool:
    found = artefact.qualification
    return artefact.kind == ONNX_FP32 or (found is not None and found.executed)
