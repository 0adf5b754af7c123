"""Qualification of artefacts: loaded, compared and timed in a child process, as a device would.

A child that crashes is a result. What this machine cannot execute, such as an engine without its GPU, is kept and
marked so: the device qualifies it at install.
"""

from __future__ import annotations

import json
import math
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fedge.server.release.compile_record import Dropped
from fedge.shared.bundle.manifest_artefacts import (
    ONNX_FP32,
    ONNX_INT8,
    Artefact,
    Engine,
    Latency,
    Qualification,
    Score,
)
from fedge.shared.bundle.tolerance import tolerance
from fedge.shared.compile import gpu_capability, tensorrt
from fedge.shared.compile.targets import SOURCES
from fedge.shared.errors import ReleaseError

BENCH_DEADLINE: Final = 180.0  # seconds
BENCH_SECONDS: Final = 5  # after which no further run is timed
BENCH_RUNS: Final = 500
#: Examples a run: one as it comes, and many at a time.
BATCHES: Final = (1, 32)
#: Times that a graph and the fp32 graph are timed in turns, and the seconds of one.
TURNS: Final = 3
TURN_SECONDS: Final = 2
#: Most that a reduced precision may lose of the task's metric: one point of a share, a hundredth of another metric.
METRIC_BUDGET: Final = 0.01
_NOT_FINITE: Final = "FE-709"


@dataclass(frozen=True)
class Timed:
    """The result of `fedge-edge bench` for an artefact; ``failure`` is one line where there is none."""

    result: Mapping[str, Any]
    failure: str = ""


def bench(
    bundle: Path, trust: Path, name: str, extra: list[str], seconds: int = BENCH_SECONDS
) -> Timed:
    """Time an artefact of a bundle and compare it with the fp32 graph, in a process of its own.

    Args:
        bundle: that holds the artefact.
        trust: public key that verifies the bundle.
        name: of the artefact.
        extra: further options, such as a site's statistics.
        seconds: after which no further run is timed, at each of ``BATCHES``.
    """
    command = [sys.executable, "-P", "-m", "fedge.edge", "bench", str(bundle), "--json"]
    command += ["--trust", str(trust), "--artifact", name, "--parity"]
    command += ["--runs", str(BENCH_RUNS), "--seconds", str(seconds), *extra]
    command += [word for batch in BATCHES for word in ("--batch", str(batch))]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=BENCH_DEADLINE,
            check=False,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return Timed({}, f"did not end within {BENCH_DEADLINE:g} seconds")
    if done.returncode < 0:
        return Timed({}, f"crashed ({signal.Signals(-done.returncode).name})")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Timed({}, lines[-1].partition(" Remedy: ")[0].rstrip(".")[:200])
    return Timed(json.loads(done.stdout))


def relative(turns: Sequence[tuple[Timed, Timed]]) -> tuple[float, ...] | None:
    """Median time of an artefact by that of the fp32 graph, at each of ``BATCHES``; None where one of them failed.

    Args:
        turns: the fp32 graph and the artefact, one right after the other, so that other load disturbs both alike.
    """
    if not turns or any(timed.failure for turn in turns for timed in turn):
        return None
    return tuple(
        statistics.median(_p50(artefact, at) / _p50(fp32, at) for fp32, artefact in turns)
        for at in range(len(BATCHES))
    )


def _p50(timed: Timed, at: int) -> float:
    # A clock that has no such short times must not make a ratio infinite.
    return max(float([timed.result, *timed.result["others"]][at]["p50_ms"]), 1e-6)


def latency_of(timed: Timed, at: int = 0) -> Latency:
    """The manifest's record of the times at one of ``BATCHES``."""
    result = [timed.result, *timed.result["others"]][at]
    return Latency(
        float(result["p50_ms"]),
        float(result["p99_ms"]),
        int(result["batch"]),
        int(timed.result["threads"]),
        str(timed.result["device"]),
    )


def qualified(
    artefact: Artefact,
    timed: Timed,
    score: Score | None,
    relative_times: tuple[float, ...] | None = None,
) -> Artefact:
    """The artefact with its qualification.

    Args:
        artefact: not yet qualified.
        timed: its measurement.
        score: its metric at the sites; None where it was not measured there.
        relative_times: of ``relative``; None where it was not held against the fp32 graph.
    """
    if timed.failure:
        failed = Qualification(False, timed.failure, score=score)
        return replace(artefact, qualification=failed)
    result = timed.result
    allowed = tolerance(artefact.kind, float(result["largest_logit"]))
    return replace(
        artefact,
        qualification=Qualification(
            True,
            max_abs_difference=float(result["max_abs_difference"]),
            tolerance=allowed,
            agreement=float(result["agreement"]),
            peak_rss_mb=float(result["peak_rss_mb"]),
            latency=latency_of(timed),
            score=score,
            batched=latency_of(timed, 1),
            relative_p50=relative_times[0] if relative_times else None,
            batched_relative_p50=relative_times[1] if relative_times else None,
            contradicted=float(result["contradicted"]),
        ),
    )


def verdict(artefact: Artefact, *, budget: float = METRIC_BUDGET, keep_slower: bool = False) -> str:
    """Why an artefact is dropped, in one line; empty where it is kept.

    Args:
        artefact: with its qualification.
        budget: most that it may lose of the task's metric: of a share itself, of another metric a part.
        keep_slower: whether INT8 for CPUs may be slower here, as the device's CPU is another.

    Raises:
        ReleaseError: 604, the fp32 graph itself could not be executed.
    """
    q = artefact.qualification
    if q is None:
        return "was not qualified"
    if artefact.kind == ONNX_FP32:
        if not q.executed:
            raise ReleaseError(604, f"{artefact.name}: fedge-edge bench failed ({q.reason})")
        return ""
    if q.score is not None and (over := _over(q.score, budget)):
        return over
    if not q.executed:
        if q.reason.startswith(_NOT_FINITE):
            return "gives NaN or infinity"
        # A graph for GPUs may fail here and run there; one for CPUs may not.
        if artefact.kind == ONNX_INT8:
            return f"does not run here: {q.reason}"
        if artefact.engine is not None and _runs_here(artefact.engine):
            return f"does not run here: {q.reason}"
        return ""
    if q.max_abs_difference is not None and q.max_abs_difference > (q.tolerance or 0.0):
        return f"differs by {q.max_abs_difference:.3g} from fp32, more than {q.tolerance:.3g}"
    if q.score is None and q.contradicted is not None and q.contradicted > budget:
        # No site counted its metric, or only with noise, so that what it loses shows in nothing else.
        return (
            f"gives another label than fp32 for {100 * q.contradicted:.1f} % of generated inputs, more than"
            f" {100 * budget:g} %, and no site has counted its metric without noise"
        )
    if artefact.kind == ONNX_INT8 and not keep_slower:
        return _worth(q)
    return ""


def _over(score: Score, budget: float) -> str:
    """Why a metric is too much worse than the fp32 graph's; empty where it is not."""
    # A sum of rounding in the counters' ratio is no loss.
    if score.lost <= score.allowed(budget) * (1 + 1e-9):
        return ""
    if score.share:
        return f"loses {100 * score.lost:.1f} points of {score.metric}, more than {100 * budget:g}"
    part = score.lost / abs(score.reference) if score.reference else math.inf
    return f"its {score.metric} is {100 * part:.1f} % worse, more than {100 * budget:g} %"


def _runs_here(engine: Engine) -> bool:
    """Whether this machine has the GPU and the runtime of an engine, so that its failure is the engine's own."""
    here = gpu_capability.capability()
    return here in engine.capabilities and tensorrt.version(engine.runtime) == engine.version


def _worth(q: Qualification) -> str:
    """Why INT8 for CPUs is not worth keeping: it must be faster than fp32 here, for one example or for many."""
    if q.relative_p50 is None or q.batched_relative_p50 is None:
        return "was not timed beside fp32"
    if min(q.relative_p50, q.batched_relative_p50) < 1:
        return ""
    return (
        f"is no faster than fp32 here: {q.relative_p50:.2f} times its time at batch {BATCHES[0]},"
        f" {q.batched_relative_p50:.2f} at batch {BATCHES[1]}"
    )


def split(
    artefacts: Sequence[Artefact], *, budget: float = METRIC_BUDGET, keep_slower: bool = False
) -> tuple[tuple[Artefact, ...], tuple[Dropped, ...]]:
    """Split artefacts into those that are kept and those that are dropped, with the reason.

    Args:
        artefacts: with their qualification; the first is the fp32 graph, and an engine comes after its graph.
        budget: see ``verdict``.
        keep_slower: the same.
    """
    kept: list[Artefact] = []
    dropped: list[Dropped] = []
    for artefact in artefacts:
        reason = verdict(artefact, budget=budget, keep_slower=keep_slower)
        source = SOURCES.get(artefact.kind)
        if not reason and artefact.engine and source not in {a.kind for a in kept}:
            # The sites' metric and the comparison are of the graph from which the engine was built.
            why = next((d.reason for d in dropped if d.kind == source), "was not qualified")
            reason = f"its graph is not kept: {why}"
        if reason:
            dropped.append(
                Dropped(
                    artefact.name, artefact.kind, reason, artefact.bytes, artefact.qualification
                )
            )
        else:
            kept.append(artefact)
    return tuple(kept), tuple(dropped)
