"""The graphs that may be released, each derived from the weights alone, so that server and sites get equal bytes.

Exporting takes seconds, and the sites of a simulation share a process: the last graphs are cached by the digest of
their weights and ranges.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from fedge.shared.bundle.manifest_artefacts import (
    ONNX_FP16,
    ONNX_FP32,
    ONNX_INT8,
    ONNX_INT8_SYMMETRIC,
)
from fedge.shared.compile.ranges import MAX_TENSORS
from fedge.shared.errors import ReleaseError
from fedge.shared.wire.tensors import NDArrays, digest

if TYPE_CHECKING:
    from fedge.shared.tasks.task import Task

#: In the order in which they are requested.
FILE_NAMES: Final = {
    ONNX_FP32: "model.onnx",
    ONNX_FP16: "model.fp16.onnx",
    ONNX_INT8: "model.int8.onnx",
    ONNX_INT8_SYMMETRIC: "model.int8-symmetric.onnx",
}
CANDIDATES: Final = tuple(FILE_NAMES)
#: Those that need activation ranges.
QUANTISED: Final = (ONNX_INT8, ONNX_INT8_SYMMETRIC)
#: Remedy where the converters are not installed.
EXTRA: Final = "install fedge with its extra `export`"
#: Larger graphs are not cached.
MAX_KEPT: Final = 64 * 2**20

Ranges = Mapping[str, tuple[float, float]]

_kept: dict[tuple[str, ...], bytes] = {}
_tensors: dict[str, tuple[str, ...]] = {}
_lock = threading.Lock()


def fp32(task: Task, arrays: NDArrays, shape: tuple[int, ...]) -> bytes:
    """Export the fp32 graph, from which all others derive.

    Args:
        task: whose network.
        arrays: its weights.
        shape: of one example as the network takes it.

    Raises:
        ReleaseError: 607, the network cannot be exported.
        ImportError: the converters are not installed.
    """
    key = (ONNX_FP32, task.name, digest(arrays), repr(shape))
    with _lock:
        cached = _kept.get(key)
        if cached is not None:
            return cached
        import torch

        from fedge.shared.compile.onnx_export import export_onnx

        with torch.random.fork_rng(devices=[]):
            network = task.network()
        network.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in arrays.items()})
        graph = export_onnx(network, shape)
        # One model at a time: a request for another one means that the previous one is done.
        _kept.clear()
        if len(graph) <= MAX_KEPT // len(CANDIDATES):
            _kept[key] = graph
        return graph


def derived(kind: str, graph: bytes, ranges: Ranges | None) -> bytes:
    """Convert the fp32 graph to a candidate.

    Args:
        kind: of ``CANDIDATES``.
        graph: as ``fp32`` gives it.
        ranges: of its activations; only those of ``QUANTISED`` need them.

    Raises:
        ValueError: there is no such kind, or it needs ranges.
        ReleaseError: it cannot be converted.
        ImportError: the converters are not installed.
    """
    if kind == ONNX_FP32:
        return graph
    if kind not in CANDIDATES or (kind in QUANTISED and ranges is None):
        raise ValueError(f"candidate: must be of {', '.join(CANDIDATES)}, got {kind!r:.40}")
    from fedge.shared.compile.quantisation import quantise, to_fp16

    ranges_key = repr(sorted(ranges.items())) if kind in QUANTISED and ranges is not None else ""
    key = (kind, hashlib.sha256(graph).hexdigest(), ranges_key)
    with _lock:
        cached = _kept.get(key)
        if cached is not None:
            return cached
        if kind == ONNX_FP16:
            candidate = to_fp16(graph)
        else:
            candidate = quantise(graph, ranges or {}, symmetric=kind == ONNX_INT8_SYMMETRIC)
        stale = [k for k in _kept if k[0] == kind]
        for old in stale:
            del _kept[old]
        if len(candidate) <= MAX_KEPT // len(CANDIDATES):
            _kept[key] = candidate
        return candidate


def tensors(graph: bytes) -> tuple[str, ...]:
    """Names of a graph's activations whose ranges quantising needs.

    Raises:
        ReleaseError: 609, there is none, or there are too many.
        ImportError: the converters are not installed.
    """
    key = hashlib.sha256(graph).hexdigest()
    with _lock:
        if key not in _tensors:
            from fedge.shared.compile.quantisation import activations

            _tensors.clear()
            _tensors[key] = activations(graph)
        names = _tensors[key]
    if not 1 <= len(names) <= MAX_TENSORS:
        raise ReleaseError(609, f"tensors: must be 1 to {MAX_TENSORS}, got {len(names)}")
    return names


def forget() -> None:
    """Clear the cache."""
    with _lock:
        _kept.clear()
