"""What the candidates scored over all sites, each beside the fp32 graph over the same ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from fedge.server.admission.calibration import RAN
from fedge.server.report.noise import below_noise_floor
from fedge.server.training.metrics import deviations, ratios
from fedge.shared.bundle.manifest_artefacts import ONNX_FP32
from fedge.shared.compile.calibration import Counted
from fedge.shared.privacy.mechanisms.noised_counts import EXAMPLES, NoisedCounts
from fedge.shared.tasks.task import Task

#: Of one site, or summed under masks over several: counters by candidate; one that did not run is not there.
Counters: TypeAlias = Mapping[str, Mapping[str, float]]


def counted(
    task: Task,
    digests: Mapping[str, str],
    parts: Sequence[Counters],
    noised: NoisedCounts | None,
    each: int,
) -> dict[str, Counted]:
    """The candidates' figures, of those that ran somewhere.

    Args:
        task: of the run.
        digests: SHA-256 (hex) of each candidate.
        parts: what was told.
        noised: how the counters got noise; None where they have none.
        each: sites of each part.
    """
    return {
        kind: _counted(task, sha256, own, _over(ONNX_FP32, parts, kind), noised, each)
        for kind, sha256 in digests.items()
        if (own := _over(kind, parts, kind))
    }


def by_kind(summed: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Counters ``candidate/counter`` by candidate; one that ran nowhere is left out."""
    found: dict[str, dict[str, float]] = {}
    for name, value in summed.items():
        kind, _, counter = name.partition("/")
        found.setdefault(kind, {})[counter] = value
    return {kind: counters for kind, counters in found.items() if counters.get(RAN) != 0}


def _over(kind: str, parts: Sequence[Counters], ran: str) -> list[Mapping[str, float]]:
    """Of one candidate, the parts in which that one and another ran."""
    return [part[kind] for part in parts if kind in part and ran in part]


def _counted(
    task: Task,
    sha256: str,
    own: Sequence[Mapping[str, float]],
    fp32: Sequence[Mapping[str, float]],
    noised: NoisedCounts | None,
    each: int,
) -> Counted:
    total = _summed(own)
    reference = _reference(task, total, fp32) if noised is None else {}
    ran = total.pop(RAN, None)
    metrics = ratios(task.metrics, total, noised=noised is not None)
    noise: dict[str, float] = {}
    if noised is not None:
        # Here the number of examples has noise whatever the unit.
        of = replace(noised, unit="example", told=tuple(sorted(total)))
        noise = deviations(task.metrics, total, of, each * len(own))
        metrics = {name: v for name, v in metrics.items() if not below_noise_floor(noise[name])}
    return Counted(
        sha256=sha256,
        sites=None if ran is None else int(ran),
        num_examples=max(0, round(total[EXAMPLES])),
        counters=total,
        metrics=metrics,
        noise=noise,
        reference=reference,
    )


def _reference(
    task: Task, total: Mapping[str, float], fp32: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """Metrics of the fp32 graph; none where it did not run at as many sites, on as many examples, as the candidate.

    In clear ``fp32`` is of sites where both ran, so that as many means the same ones. Of a masked sum nothing more
    than their number is known.
    """
    if not fp32:
        return {}
    theirs = _summed(fp32)
    if any(theirs[name] != total[name] for name in (RAN, EXAMPLES)):
        return {}
    theirs.pop(RAN)
    return ratios(task.metrics, theirs, noised=False)


def _summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: math.fsum(part[name] for part in parts) for name in parts[0]}
