"""Graphs over a site's examples, in a child process with a deadline: a crash is a result, not the end."""

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

from fedge.client.training.graph_child import HEADER

#: Seconds that a graph gets here at most, whatever a request says: meanwhile the site answers nothing else.
MAX_DEADLINE: Final = 300.0
#: Examples at a time where it makes no difference.
BATCH: Final = 64
_COMMAND: Final = (sys.executable, "-P", "-m", "fedge.client.training.graph_child")
#: Seconds beyond the graphs' own, in which the child starts and reads.
_START: Final = 60.0
_MAX_TEXT: Final = 300


class GraphFailedError(Exception):
    """A graph did not load, crashed, took too long, or gave something else than was asked for."""


Result: TypeAlias = NDArray[np.float32] | GraphFailedError


@dataclass(frozen=True)
class Terms:
    """How graphs are run.

    Attributes:
        deadline: seconds for each.
        threads: of the runtime.
    """

    deadline: float
    threads: int


def logits(graphs: Sequence[bytes], x: NDArray[Any], width: int, terms: Terms) -> list[Result]:
    """What graphs give for examples, run as a device would.

    They share a child; where one crashes it, the others get another.

    Args:
        graphs: made by this site itself.
        x: ``(n, ...)``, as the network takes them, ``n`` 1 or more.
        width: of the logits.
        terms: of each graph.

    Returns:
        Of each graph finite logits ``(n, width)``, or why there are none.
    """
    found: list[Result] = []
    while len(found) < len(graphs):
        found += _run(graphs[len(found) :], x, BATCH, terms, optimised=True)
    return [_checked(one, (len(x), width)) for one in found]


def extremes(onnx: bytes, x: NDArray[Any], tensors: int, terms: Terms) -> NDArray[np.float32]:
    """How far the activations of an observed graph go in each example, ``(n, tensors, 2)``.

    The graph is run as it stands, one example at a time: what the runtime would fuse could not be seen.

    Raises:
        GraphFailedError: see there.
    """
    (found,) = _run([onnx], x, 1, terms, optimised=False)
    found = _checked(found, (len(x), 2 * tensors))
    if isinstance(found, GraphFailedError):
        raise found
    return np.stack([found[:, :tensors], found[:, tensors:]], axis=2)


def _checked(found: Result, shape: tuple[int, ...]) -> Result:
    if isinstance(found, GraphFailedError):
        return found
    if found.shape != shape:
        return GraphFailedError(f"output: must be of shape {shape}, got {found.shape}")
    if not np.isfinite(found).all():
        return GraphFailedError("output: must be finite, got NaN or infinity")
    return found


def _run(
    graphs: Sequence[bytes], x: NDArray[Any], batch: int, terms: Terms, *, optimised: bool
) -> list[Result]:
    """Results of the first graphs, one at least: the last of them may have ended the child."""
    asked = {
        "graphs": [len(onnx) for onnx in graphs],
        "dtype": x.dtype.str,
        "shape": list(x.shape),
        "batch": batch,
        "optimised": optimised,
        "threads": terms.threads,
        "deadline": terms.deadline,
    }
    head = json.dumps(asked).encode()
    frame = b"".join((HEADER.pack(len(head)), head, *graphs, np.ascontiguousarray(x).tobytes()))
    limit = _START + terms.deadline * len(graphs)
    try:
        done = subprocess.run(
            _COMMAND, input=frame, capture_output=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired as error:
        return [*_frames(error.stdout or b"", len(graphs) - 1), _late(terms.deadline)]
    found = _frames(done.stdout, len(graphs))
    if len(found) < len(graphs):
        late = done.returncode == -signal.SIGALRM
        found.append(_late(terms.deadline) if late else _why(done.returncode, done.stderr))
    return found


def _frames(data: bytes, most: int) -> list[Result]:
    """The whole frames that a child has written."""
    found: list[Result] = []
    at = 0
    while len(found) < most:
        try:
            (size,) = HEADER.unpack_from(data, at)
            told = json.loads(data[at + HEADER.size : at + HEADER.size + size])
            at += HEADER.size + size
            if "error" in told:
                found.append(GraphFailedError(str(told["error"])[:_MAX_TEXT]))
                continue
            shape = [int(n) for n in told["shape"]]
            values = np.frombuffer(data, np.float32, math.prod(shape), at).reshape(shape)
        except (ValueError, KeyError, TypeError, OverflowError, struct.error):
            break
        at += values.nbytes
        found.append(values)
    return found


def _late(deadline: float) -> GraphFailedError:
    return GraphFailedError(f"must be run within {deadline:g} s")


def _why(status: int, stderr: bytes) -> GraphFailedError:
    if status < 0:
        known = {s.value for s in signal.Signals}
        return GraphFailedError(
            f"crashed ({signal.Signals(-status).name if -status in known else -status})"
        )
    lines = stderr.decode(errors="replace").strip().splitlines() or [f"exit status {status}"]
    return GraphFailedError(f"failed ({lines[-1][:_MAX_TEXT]})")
