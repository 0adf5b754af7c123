"""Qualification of artefacts: loaded, compared and timed in a child process, as a device would.

A child that crashes is a result. What this machine cannot execute, such as an engine without its GPU, is kept and
marked so: the device qualifies it at install.
"""

from __future__ import annotations

import json
import signal
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
    ONNX_INT8_SYMMETRIC,
    Artefact,
    Engine,
    Latency,
    Qualification,
    Score,
)
from fedge.shared.compile import gpu_capability, tensorrt
from fedge.shared.compile.targets import SOURCES
from fedge.shared.compile.tolerance import tolerance
from fedge.shared.errors import ReleaseError

BENCH_DEADLINE: Final = 180.0  # seconds
BENCH_SECONDS: Final = 5  # after which no further run is timed
BENCH_RUNS: Final = 500
#: Most that INT8 may lose of the task's metric, a share: one point.
METRIC_BUDGET: Final = 0.01
_NOT_FINITE: Final = "FE-709"


@dataclass(frozen=True)
class Timed:
    """The result of `fedge-edge bench` for an artefact; ``failure`` is one line where there is none."""

    result: Mapping[str, Any]
    failure: str = ""


def bench(bundle: Path, trust: Path, name: str, extra: list[str]) -> Timed:
    """Time an artefact of a bundle and compare it with the fp32 graph, in a process of its own.

    Args:
        bundle: that holds the artefact.
        trust: public key that verifies the bundle.
        name: of the artefact.
        extra: further options, such as a site's statistics.
    """
    command = [sys.executable, "-P", "-m", "fedge.edge", "bench", str(bundle), "--json"]
    command += ["--trust", str(trust), "--artefact", name, "--parity"]
    command += ["--runs", str(BENCH_RUNS), "--seconds", str(BENCH_SECONDS), *extra]
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


def faster(one: Timed, other: Timed) -> Timed:
    """The faster of two measurements, which other load on the machine disturbed less."""
    if one.failure or other.failure:
        return one if one.failure else other
    return min(one, other, key=lambda timed: float(timed.result["p50_ms"]))


def latency_of(timed: Timed) -> Latency:
    """The manifest's record of the measured times."""
    result = timed.result
    return Latency(
        float(result["p50_ms"]),
        float(result["p99_ms"]),
        int(result["batch"]),
        int(result["threads"]),
        str(result["device"]),
    )


def qualified(artefact: Artefact, timed: Timed, score: Score | None) -> Artefact:
    """The artefact with its qualification.

    Args:
        artefact: not yet qualified.
        timed: its measurement.
        score: its metric at the sites; None where it was not measured there.
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
        ),
    )


def verdict(artefact: Artefact, fp32: Artefact, *, keep_slower: bool = False) -> str:
    """Why an artefact is dropped, in one line; empty where it is kept.

    Args:
        artefact: with its qualification.
        fp32: the reference graph that it must improve on.
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
    if q.score is not None and q.score.value < q.score.reference - METRIC_BUDGET:
        loss = 100 * (q.score.reference - q.score.value)
        return f"loses {loss:.1f} points of {q.score.metric}, more than {100 * METRIC_BUDGET:g}"
    if artefact.kind in (ONNX_INT8, ONNX_INT8_SYMMETRIC) and q.score is None:
        return "no site counted its metric, or only with noise"
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
    if artefact.kind == ONNX_INT8 and not keep_slower:
        return _worth(artefact, fp32)
    return ""


def _runs_here(engine: Engine) -> bool:
    """Whether this machine has the GPU and the runtime of an engine, so that its failure is the engine's own."""
    here = gpu_capability.capability()
    return here in engine.capabilities and tensorrt.version(engine.runtime) == engine.version


def _worth(artefact: Artefact, fp32: Artefact) -> str:
    """Why INT8 for CPUs is not worth keeping: it must be faster than fp32 on this machine."""
    own, other = artefact.qualification, fp32.qualification
    if own is None or other is None or own.latency is None or other.latency is None:
        return "was not timed"
    if own.latency.p50_ms >= other.latency.p50_ms:
        return (
            f"is no faster than fp32 here ({own.latency.p50_ms:.3g} ms, fp32"
            f" {other.latency.p50_ms:.3g} ms)"
        )
    return ""


def split(
    artefacts: Sequence[Artefact], *, keep_slower: bool = False
) -> tuple[tuple[Artefact, ...], tuple[Dropped, ...]]:
    """Split artefacts into those that are kept and those that are dropped, with the reason.

    Args:
        artefacts: with their qualification; the first is the fp32 graph, and an engine comes after its graph.
        keep_slower: see ``verdict``.
    """
    kept: list[Artefact] = []
    dropped: list[Dropped] = []
    for artefact in artefacts:
        reason = verdict(artefact, artefacts[0], keep_slower=keep_slower)
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
