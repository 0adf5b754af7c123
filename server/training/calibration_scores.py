"""The metrics of the candidates over all sites, each with those of the fp32 graph over the same sites."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from fedge.server.admission.calibration_validation import RAN
from fedge.server.report.noised_figures import below_noise_floor
from fedge.server.training.metrics import ratios, stddevs
from fedge.shared.bundle.manifest_artefacts import ONNX_FP32
from fedge.shared.compile.calibration import Counted
from fedge.shared.privacy.mechanisms.noised_counts import EXAMPLES, NoisedCounts
from fedge.shared.tasks.task import Task

#: Candidate -> its counters, of one site or summed over several; a candidate that did not run is missing.
Counters: TypeAlias = Mapping[str, Mapping[str, float]]


def counted(
    task: Task,
    digests: Mapping[str, str],
    parts: Sequence[Counters],
    noised: NoisedCounts | None,
    sites_per_part: int,
) -> dict[str, Counted]:
    """Compute the metrics of the candidates that ran at a site.

    Args:
        task: task of the run.
        digests: candidate -> SHA-256 (hex) of its graph.
        parts: reported counters, of a site or of a secure sum each.
        noised: the noise on the counters; None where they have none.
        sites_per_part: number of sites in each part.

    Returns:
        Candidate -> its counters and metrics.
    """
    return {
        kind: _counted(task, sha256, own, _over(ONNX_FP32, parts, kind), noised, sites_per_part)
        for kind, sha256 in digests.items()
        if (own := _over(kind, parts, kind))
    }


def by_kind(summed: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Group counters named ``candidate/counter`` by candidate; one that ran at no site is left out."""
    candidates: dict[str, dict[str, float]] = {}
    for name, value in summed.items():
        kind, _, counter = name.partition("/")
        candidates.setdefault(kind, {})[counter] = value
    return {kind: counters for kind, counters in candidates.items() if counters.get(RAN) != 0}


def _over(kind: str, parts: Sequence[Counters], ran: str) -> list[Mapping[str, float]]:
    """The counters of a candidate from the parts in which that candidate and a second one ran."""
    return [part[kind] for part in parts if kind in part and ran in part]


def _counted(
    task: Task,
    sha256: str,
    own: Sequence[Mapping[str, float]],
    fp32: Sequence[Mapping[str, float]],
    noised: NoisedCounts | None,
    sites_per_part: int,
) -> Counted:
    total = _summed(own)
    reference = _reference(task, total, fp32) if noised is None else {}
    ran = total.pop(RAN, None)
    metrics = ratios(task.metrics, total, noised=noised is not None)
    noise: dict[str, float] = {}
    if noised is not None:
        # Here the number of examples has noise, whatever the unit of privacy.
        noise_source = replace(noised, unit="example", reported=tuple(sorted(total)))
        noise = stddevs(task.metrics, total, noise_source, sites_per_part * len(own))
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

    Without secure aggregation ``fp32`` is of sites at which both ran, so that the same number means the same sites. Of
    a secure sum only their number is known.
    """
    if not fp32:
        return {}
    reference = _summed(fp32)
    if any(reference[name] != total[name] for name in (RAN, EXAMPLES)):
        return {}
    reference.pop(RAN)
    return ratios(task.metrics, reference, noised=False)


def _summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: math.fsum(part[name] for part in parts) for name in parts[0]}
