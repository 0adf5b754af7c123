"""The child's side of a trial: `python -P -m fedge.edge.backends.trial_child`, see ``trial``."""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
from typing import Any, BinaryIO, Final

import numpy as np

from fedge.edge.backends.backend import Shapes
from fedge.edge.backends.open_artefact import open_artefact
from fedge.edge.backends.timing import peak_rss_mb, percentile, timed
from fedge.shared.bundle.manifest_artefacts import Artefact
from fedge.shared.errors import FedgeError, brief
from fedge.shared.files import read_exactly

_HEADER_BYTES: Final = 64 * 1024
_PR_SET_PDEATHSIG: Final = 1


def main() -> int:
    """Read a trial from stdin, run it, answer on stdout; returns 0 if there is an answer, even a failure."""
    _die_with_parent()
    # Libraries that print would otherwise write into the answer.
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)
        try:
            line, logits = _trial(sys.stdin.buffer)
        except FedgeError as error:
            line, logits = {"failure": _without_name(error)}, b""
        except Exception as error:  # reported to the parent, whatever it is
            line, logits = {"failure": brief(error)}, b""
        out.write(json.dumps(line).encode() + b"\n" + logits)
    return 0


def _die_with_parent() -> None:
    """Let the kernel kill this process with its parent: a run that never ends would outlive it."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _trial(source: BinaryIO) -> tuple[dict[str, Any], bytes]:
    header = json.loads(source.readline(_HEADER_BYTES))
    if os.getppid() != header["parent"]:  # it ended before prctl took effect
        raise ProcessLookupError("parent: must wait for the answer, it has ended")
    artefact = Artefact.from_json(header["artefact"])
    shapes = Shapes(tuple(header["input"]), header["logits"])
    data = read_exactly(source, artefact.bytes)
    row = 4 * math.prod(shapes.input)
    batches = [
        np.frombuffer(read_exactly(source, size * row), "<f4").reshape(size, *shapes.input)
        for size in header["batches"]
    ]
    backend = open_artefact(artefact, header["place"], data, shapes, threads=header["threads"])
    p50 = p99 = None
    if header["runs"]:
        times = timed(lambda: backend.run(batches[0]), header["runs"], header["seconds"])
        p50, p99 = percentile(times, 50), percentile(times, 99)
    # Before the larger batches below, which would add to it.
    peak = peak_rss_mb()
    logits = b"".join(backend.run(batch).astype("<f4").tobytes() for batch in batches)
    answer = {"device": backend.device, "p50_ms": p50, "p99_ms": p99, "peak_rss_mb": peak}
    backend.close()
    return answer, logits


def _without_name(error: FedgeError) -> str:
    """The message without the artefact's name in front, which the parent adds itself."""
    _, _, reason = error.message.partition(": ")
    return reason or error.message


if __name__ == "__main__":
    sys.exit(main())
