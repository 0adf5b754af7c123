"""Calibration after the last round: ranges of the final model's activations and scores of smaller graphs at the sites.

The server sees no example. It exports the model as every site does by itself, asks for ranges (``calibrate``), derives
the candidates from weights and ranges alone, and asks for their scores on held-out examples (``qualify``). Both are
evaluations with counters of their own: secure aggregation, noise and charges are those of the run's evaluations. A
missing result is reported with its reason, and the run finishes all the same. Ranges are in the journal before scores
are requested, as sites answer a secure sum once.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedge.server.admission import calibration_validation as gate
from fedge.server.admission.calibration_validation import RAN
from fedge.server.runs.journal import Line
from fedge.server.training import calibration_scores as scores
from fedge.server.training.calibration_exchange import CalibrationRequest, Exchanges, Model
from fedge.shared import protocol
from fedge.shared.bundle.manifest_checks import network_shape
from fedge.shared.compile import calibration, candidates, ranges
from fedge.shared.compile.calibration import Absent, Calibration, Counted
from fedge.shared.errors import FedgeError
from fedge.shared.failpoints import BETWEEN, reach
from fedge.shared.privacy.mechanisms.noised_counts import EXAMPLES, LOSS, NoisedCounts
from fedge.shared.tasks.task import Task
from fedge.shared.wire.tensors import NDArrays, digest

_log = logging.getLogger(__name__)

_MAX_REASON = 600


@dataclass(frozen=True)
class _Merged:
    """The ranges of all sites together.

    Attributes:
        bounds: smallest and largest value by tensor, of shape (tensors, 2); None where there are no ranges.
        reason: why there are none.
        sites: names of the sites whose values they cover.
        examples: number of examples in them; None where it is not known.
        clipped: names of the sites whose values reached the bound.
    """

    bounds: NDArray[np.float64] | None = None
    reason: str = ""
    sites: tuple[str, ...] = ()
    examples: int | None = None
    clipped: tuple[str, ...] = ()


class Calibrator:
    """Asks the sites of one run about its final model.

    Args:
        exchanges: asks the sites.
        task: task of the run.
        kept_ranges: the ranges that an earlier coordinator of the run has stored; None where there are none.
        keep: stores the ranges.
    """

    def __init__(
        self,
        exchanges: Exchanges,
        task: Task,
        kept_ranges: Calibration | None,
        keep: Callable[[Calibration], None],
    ) -> None:
        self._exchanges, self._task = exchanges, task
        self._kept_ranges, self._keep = kept_ranges, keep
        self._section = exchanges.config.calibration
        self._releases = 0

    def run(self, server_round: int, arrays: NDArrays, last: Line) -> Calibration:
        """Ask the available sites.

        Args:
            server_round: number of the last round.
            arrays: tensor name -> the final model's weights.
            last: line of that round.

        Returns:
            Ranges and scores of the candidates; where they are missing, with the reason.
        """
        empty = Calibration(self._exchanges.run_id, digest(arrays), None, self._exchanges.mode)
        try:
            shape = network_shape(self._task.input, self._exchanges.steps)
            graph = candidates.fp32(self._task, arrays, shape)
            tensors = candidates.tensors(graph)
        except ImportError as error:
            reason = f"the server has no converters ({error}): {candidates.EXTRA}"
        except FedgeError as error:
            reason = str(error)
        else:
            sha256 = hashlib.sha256(graph).hexdigest()
            present = self._exchanges.present(last)
            model = Model(server_round, arrays, graph, sha256, tensors, present)
            result = self._calibrate_model(model, replace(empty, graph_sha256=sha256))
            if result.reason:
                _log.warning("calibration: %s", result.reason)
            return result
        _log.warning("not calibrated: %s", reason)
        return replace(empty, reason=reason[:_MAX_REASON])

    def line(self, last: Line, result: Calibration, seconds: float) -> Line:
        """The last round's line with the cost and the privacy loss of the calibration.

        Args:
            last: line of the last round.
            result: what ``run`` has returned.
            seconds: duration of the calibration.
        """
        moved = self._exchanges.record
        more: Line = {
            "calibration": {
                "mode": result.mode,
                "sites": len(result.sites),
                "ranges": result.ranges is not None,
                "candidates": sorted(result.candidates),
                "reason": result.reason,
                "seconds": round(seconds, 4),
                "bytes": {"sent": moved.sent, "received": moved.received},
            }
        }
        return self._exchanges.charged(last) | more | self._exchanges.spent(last, self._releases)

    def _calibrate_model(self, model: Model, empty: Calibration) -> Calibration:
        calibrated = self._ranges(model, empty)
        reach(BETWEEN, model.server_round)
        digests, reasons = self._candidates(model, calibrated.ranges)
        scored, reason, more = self._qualify(model, digests, calibrated.ranges)
        for one in (*calibrated.absent, *more):
            _log.warning("%s: %s is not counted: FE-%d %s", one.of, one.site, one.code, one.reason)
        return replace(
            calibrated,
            reason="; ".join(filter(None, (calibrated.reason, *reasons, reason)))[:_MAX_REASON],
            candidates=scored,
            absent=(*calibrated.absent, *more),
        )

    def _ranges(self, model: Model, empty: Calibration) -> Calibration:
        """The merged ranges, which are requested from the sites unless an earlier coordinator has kept them."""
        kept, graph = self._kept_ranges, empty.graph_sha256
        if kept and (kept.model_sha256, kept.graph_sha256) == (empty.model_sha256, graph):
            _log.info("calibration: goes on with the ranges of %d sites", len(kept.sites))
        else:
            merged, absent = self._calibrate(model)
            kept = replace(
                empty,
                sites=merged.sites,
                examples=merged.examples,
                reason=f"no ranges: {merged.reason}"[:_MAX_REASON],
                clipped=merged.clipped,
                absent=absent,
            )
            if merged.bounds is not None:
                pairs = ((float(low), float(high)) for low, high in merged.bounds)
                kept = replace(kept, ranges=dict(zip(model.tensors, pairs, strict=True)), reason="")
            self._keep(kept)
        self._releases += self._exchanges.releases("calibrate", model.server_round)
        return kept

    def _calibrate(self, model: Model) -> tuple[_Merged, tuple[Absent, ...]]:
        count, max_examples = len(model.tensors), self._section.examples
        names = ranges.names(count)
        noised = self._exchanges.noise(names, ranges.sensitivity(count))
        every = noised is not None and noised.unit == "example"
        request = CalibrationRequest(
            "calibrate",
            protocol.CALIBRATE,
            (*names, EXAMPLES),
            names,
            noised,
            lambda m: m.train_examples if every else min(m.train_examples, max_examples),
        )
        if self._exchanges.sums is None:
            merged = self._merged(model, request)
        else:
            counted, sites, reason = self._exchanges.summed(self._exchanges.sums, model, request)
            merged = _Merged(None, reason)
            if counted is not None:
                counts = np.array([counted[name] for name in names])
                merged = self._from_histograms(counts, model, request.noised, sites)
                examples = counted.get(EXAMPLES)
                merged = replace(merged, examples=None if examples is None else int(examples))
        return merged, self._exchanges.absent(request, calibration.RANGES)

    def _merged(self, model: Model, request: CalibrationRequest) -> _Merged:
        """Merge the ranges that sites report without secure aggregation."""
        reported: dict[str, gate.Ranges] = {}
        bound = self._section.bound
        for member, reply, expected in self._exchanges.replies(model, request):
            admitted, verdict = gate.admit_ranges(
                reply,
                member.site,
                request.max_examples(member),
                expected,
                model.sha256,
                len(model.tensors),
                bound,
            )
            self._exchanges.take(verdict)
            if admitted is not None:
                reported[member.site] = admitted
        if not reported:
            return _Merged(None, "no site's count")
        sites = tuple(sorted(reported))
        if request.noised is not None:
            counts = np.sum([reported[s].values for s in sites], axis=0)
            return self._from_histograms(counts, model, request.noised, sites)
        hidden = self._exchanges.config.privacy.hides_sites
        return _Merged(
            ranges.merged([reported[s].values for s in sites]),
            sites=sites,
            examples=None if hidden else sum(r.num_examples for r in reported.values()),
            clipped=tuple(s for s in sites if (np.abs(reported[s].values) >= bound).any()),
        )

    def _from_histograms(
        self,
        counts: NDArray[np.float64],
        model: Model,
        noised: NoisedCounts | None,
        sites: tuple[str, ...],
    ) -> _Merged:
        """The ranges from summed histograms, or the reason why there are none."""
        threshold, count = 0.0, len(model.tensors)
        if noised is not None:
            stddev = noised.stddev * math.sqrt(len(sites))
            threshold = ranges.above_noise(stddev, count)
        shaped = counts.reshape(count, ranges.SIDES, ranges.BINS)
        try:
            bounds = ranges.from_histograms(
                shaped, self._section.bound, quantile=self._section.quantile, threshold=threshold
            )
            return _Merged(bounds, sites=sites)
        except ranges.HiddenError as error:
            if noised is None:
                return _Merged(None, "no site has training examples", sites)
            unit = "examples" if noised.unit == "example" else "sites"
            return _Merged(
                None,
                f"{model.tensors[error.tensor]}: must have a bin of more than {threshold:.1f} {unit} to stand above"
                " the noise, got none; more of them would do, or a smaller privacy.metrics-noise-multiplier",
                sites,
            )

    def _candidates(
        self, model: Model, known_ranges: candidates.Ranges | None
    ) -> tuple[dict[str, str], list[str]]:
        """SHA-256 of each candidate that can be derived from the graph, and why the others cannot."""
        digests: dict[str, str] = {}
        reasons = []
        for kind in candidates.CANDIDATES:
            if kind in candidates.QUANTISED and known_ranges is None:
                continue
            try:
                graph = candidates.derived(kind, model.graph, known_ranges)
                digests[kind] = hashlib.sha256(graph).hexdigest()
            except Exception as error:  # converters raise exceptions of every kind
                _log.exception("%s cannot be made", kind)
                reasons.append(f"{kind}: cannot be made ({type(error).__name__})")
        return digests, reasons

    def _qualify(
        self, model: Model, digests: Mapping[str, str], known_ranges: candidates.Ranges | None
    ) -> tuple[dict[str, Counted], str, tuple[Absent, ...]]:
        own = tuple(sorted({*self._task.counter_names, EXAMPLES}))
        order = tuple(f"{kind}/{name}" for kind in digests for name in own if name != LOSS)
        request = CalibrationRequest(
            "qualify",
            protocol.QUALIFY,
            tuple(f"{kind}/{name}" for kind in digests for name in (RAN, *own)),
            order,
            self._exchanges.noise(order),
            lambda m: m.test_examples,
        )
        request.more = {
            protocol.CANDIDATES: list(digests),
            protocol.CANDIDATE_DIGESTS: list(digests.values()),
        }
        if known_ranges is not None:
            low, high = zip(*(known_ranges[name] for name in model.tensors), strict=True)
            request.more |= {protocol.RANGE_LOW: list(low), protocol.RANGE_HIGH: list(high)}
        parts: list[scores.Counters] = []
        reason, sites_per_part = "no site's figures count", 1
        if self._exchanges.sums is not None:
            counted, sites, reason = self._exchanges.summed(self._exchanges.sums, model, request)
            if counted is not None:
                parts, sites_per_part = [scores.by_kind(counted)], len(sites)
        else:
            names = request.names if request.noised is None else order
            for member, reply, expected in self._exchanges.replies(model, request):
                admitted, verdict = gate.admit_scores(
                    reply, member.site, request.max_examples(member), expected, digests, names
                )
                self._exchanges.take(verdict)
                if admitted is not None:
                    parts.append(admitted.counters)
                    request.absent += admitted.absent
        self._releases += self._exchanges.releases("qualify", model.server_round)
        scored = scores.counted(self._task, digests, parts, request.noised, sites_per_part)
        reason = "" if parts else f"no candidate is counted: {reason}"
        return scored, reason, self._exchanges.absent(request, calibration.CANDIDATES)
