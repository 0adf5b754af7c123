"""Targets of compilation: names, GPUs, and the kinds of artefact for each."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedge.shared.bundle.manifest_artefacts import (
    ONNX_FP16,
    ONNX_FP32,
    ONNX_INT8,
    ONNX_INT8_SYMMETRIC,
    RTX_FP16,
    RTX_INT8,
    TRT_FP16,
    TRT_INT8,
)
from fedge.shared.errors import ReleaseError

CPU_FP32: Final = "cpu-fp32"
CPU_INT8: Final = "cpu-int8"
ONNX: Final = "onnx"
TENSORRT: Final = "tensorrt"
TENSORRT_RTX: Final = "tensorrt-rtx"
NAMES: Final = (CPU_FP32, CPU_INT8, ONNX, TENSORRT, TENSORRT_RTX)

#: Compute capabilities that TensorRT for RTX builds for without such a GPU at hand.
RTX_CAPABILITIES: Final = (75, 80, 86, 89, 120, 121)
_CAPABILITY = re.compile(r"sm(\d{2,3})")


@dataclass(frozen=True)
class Target:
    """One target of ``--targets``.

    Attributes:
        name: one of ``NAMES``.
        capabilities: of ``tensorrt-rtx``: compute capabilities that one engine is for, ascending.
    """

    name: str
    capabilities: tuple[int, ...] = ()

    def __str__(self) -> str:
        """The target as text of ``--targets``."""
        listed = "+".join(f"sm{c}" for c in self.capabilities)
        return f"{self.name}:{listed}" if listed else self.name

    def kinds(self, *, calibrated: bool) -> tuple[str, ...]:
        """Kinds of artefact besides the fp32 graph; INT8 for GPUs only where there are activation ranges."""
        match self.name:
            case "cpu-int8":
                return (ONNX_INT8,)
            case "tensorrt-rtx":
                return _with_graphs((RTX_FP16, RTX_INT8) if calibrated else (RTX_FP16,))
            case "tensorrt":
                return _with_graphs((TRT_FP16, TRT_INT8) if calibrated else (TRT_FP16,))
        return ()


#: Kind of the graph from which an artefact of each kind is made.
SOURCES: Final = {
    RTX_FP16: ONNX_FP16,
    RTX_INT8: ONNX_INT8_SYMMETRIC,
    TRT_FP16: ONNX_FP16,
    TRT_INT8: ONNX_INT8_SYMMETRIC,
    ONNX_FP16: ONNX_FP32,
    ONNX_INT8: ONNX_FP32,
    ONNX_INT8_SYMMETRIC: ONNX_FP32,
}


def _with_graphs(engines: tuple[str, ...]) -> tuple[str, ...]:
    """Engines after their graphs, from which a device with another version of the runtime builds its own."""
    return (*(SOURCES[kind] for kind in engines), *engines)


def parse(text: str) -> tuple[Target, ...]:
    """Read ``--targets``: names with commas between them, ``tensorrt-rtx:sm86+sm89`` with its GPUs.

    Raises:
        ReleaseError: 608, a target is unknown, repeated, or names a GPU that cannot be built for.
    """
    targets = [_one(part.strip()) for part in text.split(",")]
    for target in targets:
        if targets.count(target) > 1:
            raise ReleaseError(608, f"--targets: must hold {target} once")
    return tuple(targets)


def _one(text: str) -> Target:
    name, colon, listed = text.partition(":")
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.4)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ReleaseError(
            608, f"--targets: must be of {', '.join(NAMES)}, got {name[:40]!r}{hint}"
        )
    if name != TENSORRT_RTX:
        if colon:
            raise ReleaseError(608, f"--targets: must name no GPU with {name}, got {text[:60]!r}")
        return Target(name)
    return Target(name, _capabilities(listed.split("+") if colon else []))


#: For the GPUs of data centres and of Jetson, of which TensorRT for RTX knows none.
_OTHER_GPU: Final = (
    "Name `tensorrt` for any other GPU of NVIDIA's, as sm87 or sm90: the device builds its engine."
)


def _capabilities(listed: Sequence[str]) -> tuple[int, ...]:
    allowed = ", ".join(f"sm{c}" for c in RTX_CAPABILITIES)
    example = f"{TENSORRT_RTX}:sm86+sm89 with GPUs of {allowed}"
    capabilities = []
    for text in listed:
        match = _CAPABILITY.fullmatch(text)
        if not match or int(match[1]) not in RTX_CAPABILITIES:
            raise ReleaseError(
                608, f"--targets: must be {example}, got {text[:20]!r}", remedy=_OTHER_GPU
            )
        capabilities.append(int(match[1]))
    if not capabilities:
        raise ReleaseError(608, f"--targets: must be {example}, got no GPU")
    if len(set(capabilities)) != len(capabilities):
        raise ReleaseError(608, f"--targets: must name each GPU once, got {'+'.join(listed)[:60]}")
    return tuple(sorted(capabilities))
