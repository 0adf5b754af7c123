"""Runs graphs over a site's examples in a child process with a deadline, so that a crash is only a failed graph."""

from __future__ import annotations

import json
import math
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.client.training.onnx_child import HEADER

#: Maximum of a graph's deadline, in seconds, whatever a request says: meanwhile the site answers nothing else.
MAX_DEADLINE: Final = 300.0
#: Examples at a time where it makes no difference.
BATCH: Final = 64
_COMMAND: Final = (sys.executable, "-P", "-m", "fedge.client.training.onnx_child")
#: Seconds beyond the graphs' own, in which the child starts and reads.
_START: Final = 60.0
_MAX_TEXT: Final = 300


class GraphFailedError(Exception):
    """A graph did not load, crashed, took too long, or gave output of another shape, or not finite."""


Result: TypeAlias = NDArray[np.float32] | GraphFailedError


@dataclass(frozen=True)
class Terms:
    """How graphs are run.

    Attributes:
        deadline: seconds for each graph.
        threads: number of threads of the runtime.
    """

    deadline: float
    threads: int


def logits(
    graphs: Sequence[bytes], x: NDArray[Any], width: int, terms: Terms, *, finite: bool = True
) -> list[Result]:
    """Run graphs over examples as a device would.

    They share a child; where one crashes it, the others get another.

    Args:
        graphs: in ONNX, derived by this site itself.
        x: ``(n, ...)``, as the network takes them, ``n`` 1 or more.
        width: of the logits.
        terms: of each graph.
        finite: whether a graph fails whose logits are not finite.

    Returns:
        For each graph its logits ``(n, width)``, or why there are none.
    """
    results: list[Result] = []
    while len(results) < len(graphs):
        results += _run(graphs[len(results) :], x, BATCH, terms, optimised=True)
    return [_checked(one, (len(x), width), finite) for one in results]


def extremes(
    onnx: bytes, x: NDArray[Any], tensors: int, terms: Terms, *, finite: bool = True
) -> NDArray[np.float32]:
    """The smallest and largest value of each observed tensor in each example.

    The graph is run unoptimised, as fused operators would hide their activations, and one example at a time.

    Args:
        onnx: graph whose output is the minima of all tensors, then their maxima.
        x: ``(n, ...)``, as the network takes them, ``n`` 1 or more.
        tensors: number of observed tensors.
        terms: deadline and threads.
        finite: whether the graph fails where an extreme is not finite.

    Returns:
        ``(n, tensors, 2)``.

    Raises:
        GraphFailedError: the graph did not run, or not in time, or its output is not as expected.
    """
    (output,) = _run([onnx], x, 1, terms, optimised=False)
    output = _checked(output, (len(x), 2 * tensors), finite)
    if isinstance(output, GraphFailedError):
        raise output
    return np.stack([output[:, :tensors], output[:, tensors:]], axis=2)


def _checked(result: Result, shape: tuple[int, ...], finite: bool) -> Result:
    if isinstance(result, GraphFailedError):
        return result
    if result.shape != shape:
        return GraphFailedError(f"output: must be of shape {shape}, got {result.shape}")
    if finite and not np.isfinite(result).all():
        return GraphFailedError("output: must be finite, got NaN or infinity")
    return result


def _run(
    graphs: Sequence[bytes], x: NDArray[Any], batch: int, terms: Terms, *, optimised: bool
) -> list[Result]:
    """Results of the first graphs, at least one: the last of them may have ended the child."""
    request = {
        "graphs": [len(onnx) for onnx in graphs],
        "dtype": x.dtype.str,
        "shape": list(x.shape),
        "batch": batch,
        "optimised": optimised,
        "threads": terms.threads,
        "deadline": terms.deadline,
    }
    head = json.dumps(request).encode()
    frame = b"".join((HEADER.pack(len(head)), head, *graphs, np.ascontiguousarray(x).tobytes()))
    limit = _START + terms.deadline * len(graphs)
    try:
        done = subprocess.run(
            _COMMAND, input=frame, capture_output=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired as error:
        return [*_frames(error.stdout or b"", len(graphs) - 1), _late(terms.deadline)]
    results = _frames(done.stdout, len(graphs))
    if len(results) < len(graphs):
        late = done.returncode == -signal.SIGALRM
        results.append(_late(terms.deadline) if late else _why(done.returncode, done.stderr))
    return results


def _frames(data: bytes, maximum: int) -> list[Result]:
    """The complete frames that a child has written, at most ``maximum``."""
    results: list[Result] = []
    at = 0
    while len(results) < maximum:
        try:
            (size,) = HEADER.unpack_from(data, at)
            header = json.loads(data[at + HEADER.size : at + HEADER.size + size])
            at += HEADER.size + size
            if "error" in header:
                results.append(GraphFailedError(str(header["error"])[:_MAX_TEXT]))
                continue
            shape = [int(n) for n in header["shape"]]
            values = np.frombuffer(data, np.float32, math.prod(shape), at).reshape(shape)
        except (ValueError, KeyError, TypeError, OverflowError, struct.error):
            break
        at += values.nbytes
        results.append(values)
    return results


def _late(deadline: float) -> GraphFailedError:
    return GraphFailedError(f"must be run within {deadline:g} s")


def _why(status: int, stderr: bytes) -> GraphFailedError:
    if status < 0:
        signals = {s.value for s in signal.Signals}
        return GraphFailedError(
            f"crashed ({signal.Signals(-status).name if -status in signals else -status})"
        )
    lines = stderr.decode(errors="replace").strip().splitlines() or [f"exit status {status}"]
    return GraphFailedError(f"failed ({lines[-1][:_MAX_TEXT]})")
