"""From the fp32 graph to every artefact that the targets ask for; what cannot be built here is told, not hidden."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fedge.server.release.compile_record import Dropped
from fedge.shared.bundle.manifest_artefacts import (
    ENGINE_KINDS,
    ONNX_FP16,
    ONNX_FP32,
    ONNX_INT8,
    ONNX_INT8_SYMMETRIC,
    Artefact,
    Engine,
)
from fedge.shared.compile import targets as known
from fedge.shared.compile.candidates import derived
from fedge.shared.compile.targets import SOURCES, Target
from fedge.shared.compile.tensorrt import build_in_child
from fedge.shared.errors import ReleaseError

#: Tells of a long build: name of the artefact, what the builder is at, share done.
Progress = Callable[[str, str, float], None]
Ranges = Mapping[str, tuple[float, float]]

_NAMES: Final = {
    ONNX_FP32: "model.onnx",
    ONNX_FP16: "model.fp16.onnx",
    ONNX_INT8: "model.int8.onnx",
    ONNX_INT8_SYMMETRIC: "model.int8-symmetric.onnx",
}


@dataclass(frozen=True)
class Built:
    """An artefact with its bytes."""

    artefact: Artefact
    data: bytes


@dataclass(frozen=True)
class Outcome:
    """All that was asked for: built, or not and why.

    Attributes:
        built: artefacts, the fp32 graph first.
        failed: what is not there.
        unmet: targets of which nothing is there, as building failed; not those that the device builds for.
    """

    built: tuple[Built, ...]
    failed: tuple[Dropped, ...]
    unmet: tuple[Target, ...] = ()


def name_of(kind: str, capabilities: Sequence[int] = ()) -> str:
    """File name of an artefact; an engine's tells its GPUs."""
    if kind in _NAMES:
        return _NAMES[kind]
    runtime, _, precision = kind.rpartition("-")
    gpus = "-".join(f"sm{c}" for c in capabilities) or "native"
    return f"model.{precision}.{runtime}.{gpus}.engine"


def artefact(kind: str, data: bytes, opset: int, engine: Engine | None = None) -> Artefact:
    """The record of what was built, not yet qualified."""
    name = name_of(kind, engine.capabilities if engine else ())
    return Artefact(name, kind, hashlib.sha256(data).hexdigest(), len(data), opset, engine)


class Builder:
    """Makes each graph once, as several engines may derive from it.

    Args:
        fp32: the graph that all others derive from.
        opset: of it.
        ranges: of its activations; None where nothing was calibrated.
        progress: told of long builds.
    """

    def __init__(self, fp32: bytes, opset: int, ranges: Ranges | None, progress: Progress) -> None:
        self._graphs: dict[str, bytes] = {ONNX_FP32: fp32}
        self._opset, self._ranges, self._progress = opset, ranges, progress
        self._timing: bytes | None = None

    def build(self, targets: Sequence[Target]) -> Outcome:
        """Every artefact of the targets, the fp32 graph first; what several targets ask for is made once.

        Raises:
            ReleaseError: 608, a wheel is missing that a target needs; 609, a tensor has no range.
        """
        built = [
            Built(artefact(ONNX_FP32, self._graphs[ONNX_FP32], self._opset), self.graph(ONNX_FP32))
        ]
        failed: list[Dropped] = []
        broken: set[str] = set()
        for target in targets:
            for kind in target.kinds(calibrated=self._ranges is not None):
                name = name_of(kind, target.capabilities)
                if name in {b.artefact.name for b in built} | {f.name for f in failed}:
                    continue
                try:
                    built.append(self._one(kind, target))
                except ReleaseError as error:
                    if error.code == 609 or (error.code == 608 and target.name != known.TENSORRT):
                        raise
                    # Without its wheel or a GPU the device builds the engine from the graphs in the bundle.
                    why = f"{error.label} {error.message}"
                    if error.code == 608:
                        why = f"the device builds it at install, of {name_of(SOURCES[kind])}"
                    else:
                        broken.add(name)
                    failed.append(Dropped(name, kind, why))
            for kind in self._without_ranges(target):
                name = name_of(kind, target.capabilities)
                failed.append(Dropped(name, kind, "there are no activation ranges to quantise by"))
        unmet = tuple(target for target in targets if self._is_unmet(target, broken))
        return Outcome(tuple(built), tuple(failed), unmet)

    def _is_unmet(self, target: Target, broken: set[str]) -> bool:
        """Whether all that the target is for is broken: its engines where it has some, as graphs only come along."""
        kinds = target.kinds(calibrated=self._ranges is not None)
        sought = [kind for kind in kinds if kind in ENGINE_KINDS] or kinds
        return bool(sought) and broken.issuperset(name_of(k, target.capabilities) for k in sought)

    def _without_ranges(self, target: Target) -> list[str]:
        """Kinds that the target would have asked for, had the sites told their ranges."""
        asked = set(target.kinds(calibrated=self._ranges is not None))
        return [kind for kind in target.kinds(calibrated=True) if kind not in asked]

    def graph(self, kind: str) -> bytes:
        """The graph of a kind, made on first use.

        Raises:
            ReleaseError: 611, the converter fails.
        """
        if kind not in self._graphs:
            self._progress(name_of(kind), "converting", 0.0)
            self._graphs[kind] = derived(kind, self._graphs[ONNX_FP32], self._ranges)
        return self._graphs[kind]

    def _one(self, kind: str, target: Target) -> Built:
        if kind not in ENGINE_KINDS:
            data = self.graph(kind)
            return Built(artefact(kind, data, self._opset), data)
        name = name_of(kind, target.capabilities)
        runtime = kind.rpartition("-")[0]
        try:
            made = build_in_child(
                self.graph(SOURCES[kind]),
                runtime=runtime,
                capabilities=target.capabilities,
                timing_cache=self._timing,
                listener=lambda phase, share: self._progress(name, phase, share),
            )
        except (
            ValueError
        ) as error:  # an open axis beside the batch's, whose sizes nothing here tells
            raise ReleaseError(611, f"{name}: {error}") from None
        self._timing = made.timing_cache or self._timing
        engine = Engine(runtime, made.version, tuple(made.capabilities))
        return Built(artefact(kind, made.engine, self._opset, engine), made.engine)
