"""Tries an artefact in a child process, where a crash or a hang is only a failed trial.

The child gets the artefact's bytes and its inputs through a pipe, and answers with a line of JSON and the logits;
no file is written. It runs the same code as the runtime, `fedge.edge.backends.trial_child`.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fedge.edge.backends.backend import Array, Shapes
from fedge.edge.backends.candidates import Candidate
from fedge.shared.errors import BundleError

#: Seconds for all candidates together while a model is loaded, so that the fp32 graph serves within two; an
#: installation allows more.
DEADLINE: Final = 1.6
_CHILD: Final = "fedge.edge.backends.trial_child"
_MAX_REASON: Final = 300


@dataclass(frozen=True)
class Timing:
    """Limits for timing the first batch.

    Attributes:
        runs: largest number of timed runs; 0 times nothing.
        seconds: after which no further run is timed.
    """

    runs: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Trial:
    """The result of a trial.

    Attributes:
        device: name of the processor that computed.
        logits: ``(n, k)`` of each batch.
        p50_ms, p99_ms: of a run of the first batch; None where it was not timed.
        peak_rss_mb: memory of the child, in MB of 10^6 bytes.
    """

    device: str
    logits: tuple[Array, ...]
    p50_ms: float | None
    p99_ms: float | None
    peak_rss_mb: float


def try_out(
    candidate: Candidate,
    data: bytes,
    batches: Sequence[Array],
    shapes: Shapes,
    *,
    threads: int = 1,
    deadline: float | None = None,
    timing: Timing | None = None,
) -> Trial:
    """Run an artefact on some batches in a child process.

    Args:
        candidate: the artefact and where it runs.
        data: its bytes, verified.
        batches: ``(n, *input)`` of float32 each, at least one.
        shapes: of the network.
        threads: CPU threads of one inference.
        deadline: seconds for all of it, ``DEADLINE`` where None; the child is killed then.
        timing: None times nothing.

    Raises:
        BundleError: 710, it crashed, took too long or failed; with the reason.
    """
    timing = timing or Timing()
    deadline = DEADLINE if deadline is None else deadline
    header = {
        "parent": os.getpid(),
        "artefact": candidate.artefact.to_json(),
        "place": candidate.place,
        "input": list(shapes.input),
        "logits": shapes.logits,
        "threads": threads,
        "batches": [len(batch) for batch in batches],
        "runs": timing.runs,
        "seconds": timing.seconds,
    }
    line = json.dumps(header, separators=(",", ":")).encode() + b"\n"
    sent = b"".join(
        [line, data, *(np.ascontiguousarray(b, dtype="<f4").tobytes() for b in batches)]
    )
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", _CHILD],
            input=sent,
            stdout=subprocess.PIPE,
            # Libraries that are about to crash print long messages.
            stderr=subprocess.DEVNULL,
            timeout=deadline,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refused(candidate, f"did not answer within {deadline:.2g} seconds") from None
    except OSError as error:
        raise _refused(candidate, f"cannot be tried ({error.strerror})") from None
    if done.returncode < 0:
        raise _refused(candidate, f"crashed ({_signal(-done.returncode)})")
    return _answer(candidate, done.stdout, [len(batch) for batch in batches], shapes.logits)


def _answer(candidate: Candidate, data: bytes, sizes: list[int], logits: int) -> Trial:
    """Parse the child's answer; an invalid one counts as a failure of the artefact."""
    line, _, body = data.partition(b"\n")
    try:
        answer: dict[str, Any] = json.loads(line)
        if "failure" in answer:
            raise _refused(candidate, str(answer["failure"])[:_MAX_REASON])
        p50, p99 = answer["p50_ms"], answer["p99_ms"]
        flat = np.frombuffer(body, "<f4").reshape(sum(sizes), logits)
        return Trial(
            str(answer["device"]),
            tuple(np.split(flat, np.cumsum(sizes)[:-1])),
            None if p50 is None else float(p50),
            None if p99 is None else float(p99),
            float(answer["peak_rss_mb"]),
        )
    except (ValueError, KeyError, TypeError):
        raise _refused(candidate, "ended without an answer") from None


def _refused(candidate: Candidate, reason: str) -> BundleError:
    return BundleError(710, f"{candidate.name}: {reason}")


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
