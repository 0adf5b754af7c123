"""Builds every artefact that the targets need from the fp32 graph; what cannot be built here is reported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedge.server.release.compile_record import Dropped
from fedge.shared.bundle.manifest_artefacts import (
    ENGINE_KINDS,
    ONNX_FP32,
    Artefact,
    Engine,
)
from fedge.shared.compile import targets as known
from fedge.shared.compile.candidates import FILE_NAMES, derived
from fedge.shared.compile.targets import SOURCES, Target
from fedge.shared.compile.tensorrt import build_in_child
from fedge.shared.errors import ReleaseError

#: Called during a long build with the artefact's name, the builder's phase and the share done, from 0 to 1.
Progress = Callable[[str, str, float], None]
Ranges = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Built:
    """An artefact with its bytes."""

    artefact: Artefact
    data: bytes


@dataclass(frozen=True)
class Outcome:
    """The result of a build.

    Attributes:
        built: artefacts, the fp32 graph first.
        failed: artefacts that were not built, with the reason.
        unmet: targets without any artefact as building failed; not those that the device builds for.
    """

    built: tuple[Built, ...]
    failed: tuple[Dropped, ...]
    unmet: tuple[Target, ...] = ()


def file_name(kind: str, capabilities: Sequence[int] = ()) -> str:
    """File name of an artefact; an engine's names its GPUs.

    Args:
        kind: of the artefact, as in the manifest.
        capabilities: compute capabilities of an engine's GPUs, for example 89.
    """
    if kind in FILE_NAMES:
        return FILE_NAMES[kind]
    runtime, _, precision = kind.rpartition("-")
    gpus = "-".join(f"sm{c}" for c in capabilities) or "native"
    return f"model.{precision}.{runtime}.{gpus}.engine"


def artefact(kind: str, data: bytes, opset: int, engine: Engine | None = None) -> Artefact:
    """The manifest's record of an artefact, not yet qualified.

    Args:
        kind: of the artefact, as in the manifest.
        data: its bytes.
        opset: ONNX opset of the graph, or of the graph from which an engine is built.
        engine: runtime and GPUs of an engine; None for a graph.
    """
    name = file_name(kind, engine.capabilities if engine else ())
    return Artefact(name, kind, hashlib.sha256(data).hexdigest(), len(data), opset, engine)


class Builder:
    """Makes each graph once, as several engines may derive from it.

    Args:
        fp32: the graph that all others derive from.
        opset: of it.
        ranges: (low, high) of its activations by tensor; None where nothing was calibrated.
        progress: called during long builds.
    """

    def __init__(self, fp32: bytes, opset: int, ranges: Ranges | None, progress: Progress) -> None:
        self._graphs: dict[str, bytes] = {ONNX_FP32: fp32}
        self._opset, self._ranges, self._progress = opset, ranges, progress
        self._timing: bytes | None = None

    def build(self, targets: Sequence[Target]) -> Outcome:
        """Build every artefact of the targets, the fp32 graph first; one that several targets share is built once.

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
                name = file_name(kind, target.capabilities)
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
                        why = f"the device builds it at install, of {file_name(SOURCES[kind])}"
                    else:
                        broken.add(name)
                    failed.append(Dropped(name, kind, why, on_device=error.code == 608))
            for kind in self._without_ranges(target):
                name = file_name(kind, target.capabilities)
                failed.append(Dropped(name, kind, "there are no activation ranges to quantise by"))
        unmet = tuple(target for target in targets if self._is_unmet(target, broken))
        return Outcome(tuple(built), tuple(failed), unmet)

    def _is_unmet(self, target: Target, broken: set[str]) -> bool:
        """Whether all that the target is for is broken: its engines where it has some, as graphs only come along."""
        kinds = target.kinds(calibrated=self._ranges is not None)
        sought = [kind for kind in kinds if kind in ENGINE_KINDS] or kinds
        return bool(sought) and broken.issuperset(file_name(k, target.capabilities) for k in sought)

    def _without_ranges(self, target: Target) -> list[str]:
        """Kinds that the target would include if the sites had reported activation ranges."""
        included = set(target.kinds(calibrated=self._ranges is not None))
        return [kind for kind in target.kinds(calibrated=True) if kind not in included]

    def graph(self, kind: str) -> bytes:
        """The graph of a kind, made on first use.

        Raises:
            ReleaseError: 611, the converter fails.
        """
        if kind not in self._graphs:
            self._progress(file_name(kind), "converting", 0.0)
            self._graphs[kind] = derived(kind, self._graphs[ONNX_FP32], self._ranges)
        return self._graphs[kind]

    def _one(self, kind: str, target: Target) -> Built:
        if kind not in ENGINE_KINDS:
            data = self.graph(kind)
            return Built(artefact(kind, data, self._opset), data)
        name = file_name(kind, target.capabilities)
        runtime = kind.rpartition("-")[0]
        try:
            result = build_in_child(
                self.graph(SOURCES[kind]),
                runtime=runtime,
                capabilities=target.capabilities,
                timing_cache=self._timing,
                listener=lambda phase, share: self._progress(name, phase, share),
            )
        except ValueError as error:  # a dynamic axis beside the batch's, of unknown size
            raise ReleaseError(611, f"{name}: {error}") from None
        self._timing = result.timing_cache or self._timing
        engine = Engine(runtime, result.version, tuple(result.capabilities))
        return Built(artefact(kind, result.engine, self._opset, engine), result.engine)
