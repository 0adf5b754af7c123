"""The graphs that may be released, each made of the weights alone, so that server and sites have the same bytes.

Exporting takes seconds, and the sites of a simulation share a process: the last graphs are kept, by the digest of the
weights and ranges that they follow from.
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

#: In the order in which they are asked for.
CANDIDATES: Final = (ONNX_FP32, ONNX_FP16, ONNX_INT8, ONNX_INT8_SYMMETRIC)
#: Those that need activation ranges.
QUANTISED: Final = (ONNX_INT8, ONNX_INT8_SYMMETRIC)
#: What is said where the converters are not installed.
EXTRA: Final = "install fedge with its extra `export`"
#: Larger graphs are made anew each time.
MAX_KEPT: Final = 64 * 2**20

Ranges = Mapping[str, tuple[float, float]]

_kept: dict[tuple[str, ...], bytes] = {}
_tensors: dict[str, tuple[str, ...]] = {}
_lock = threading.Lock()


def fp32(task: Task, arrays: NDArrays, shape: tuple[int, ...]) -> bytes:
    """The graph that all others derive from.

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
        found = _kept.get(key)
        if found is not None:
            return found
        import torch

        from fedge.shared.compile.onnx_export import export_onnx

        with torch.random.fork_rng(devices=[]):
            network = task.network()
        network.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in arrays.items()})
        made = export_onnx(network, shape)
        # One model's at a time: whoever asks for another is done with the one before.
        _kept.clear()
        if len(made) <= MAX_KEPT // len(CANDIDATES):
            _kept[key] = made
        return made


def derived(kind: str, graph: bytes, ranges: Ranges | None) -> bytes:
    """A candidate made of the fp32 graph.

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
    from fedge.shared.compile.precision import quantise, to_fp16

    used = repr(sorted(ranges.items())) if kind in QUANTISED and ranges is not None else ""
    key = (kind, hashlib.sha256(graph).hexdigest(), used)
    with _lock:
        found = _kept.get(key)
        if found is not None:
            return found
        if kind == ONNX_FP16:
            made = to_fp16(graph)
        else:
            made = quantise(graph, ranges or {}, symmetric=kind == ONNX_INT8_SYMMETRIC)
        stale = [k for k in _kept if k[0] == kind]
        for old in stale:
            del _kept[old]
        if len(made) <= MAX_KEPT // len(CANDIDATES):
            _kept[key] = made
        return made


def tensors(graph: bytes) -> tuple[str, ...]:
    """Names of a graph's activations whose ranges quantising needs.

    Raises:
        ReleaseError: 609, there is none, or there are too many.
        ImportError: the converters are not installed.
    """
    key = hashlib.sha256(graph).hexdigest()
    with _lock:
        if key not in _tensors:
            from fedge.shared.compile.precision import activations

            _tensors.clear()
            _tensors[key] = activations(graph)
        found = _tensors[key]
    if not 1 <= len(found) <= MAX_TENSORS:
        raise ReleaseError(609, f"tensors: must be 1 to {MAX_TENSORS}, got {len(found)}")
    return found


def forget() -> None:
    """Let go of what is kept."""
    with _lock:
        _kept.clear()
