"""After the last round: how far the final model's activations go at the sites, and what smaller graphs score there.

The server sees no example. It exports the model as every site does by itself, asks for ranges (``calibrate``), derives
the candidates from weights and ranges alone, and asks for what they score on held-out examples (``qualify``). Both are
evaluations with counters of their own: with masks, noise and charges as the run's evaluations have them. Whatever is
missing is told with its reason, and the run finishes all the same. Ranges are in the journal before scores are asked
for, as sites answer a masked sum once.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedge.server.admission import calibration as gate
from fedge.server.admission.calibration import RAN
from fedge.server.runs.journal import Line
from fedge.server.training import calibration_scores as scores
from fedge.server.training.calibration_exchange import Asked, Exchanges, Model
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
        both: ``(tensors, 2)``; None where there are none.
        reason: why not.
        sites: that are in them.
        examples: that these looked at; None where nobody knows.
        clipped: sites that reached the bound.
    """

    both: NDArray[np.float64] | None = None
    reason: str = ""
    sites: tuple[str, ...] = ()
    examples: int | None = None
    clipped: tuple[str, ...] = ()


class Calibrator:
    """Asks the sites of one run about its final model.

    Args:
        exchanges: with them.
        task: of the run.
        known: the ranges, where a coordinator before this one was told them.
        keep: writes the ranges down.
    """

    def __init__(
        self,
        exchanges: Exchanges,
        task: Task,
        known: Calibration | None,
        keep: Callable[[Calibration], None],
    ) -> None:
        self._exchanges, self._task = exchanges, task
        self._known, self._keep = known, keep
        self._section = exchanges.config.calibration
        self._releases = 0

    def run(self, server_round: int, arrays: NDArrays, last: Line) -> Calibration:
        """Ask the sites that are there.

        Args:
            server_round: the last.
            arrays: the final model.
            last: that round's line.
        """
        nothing = Calibration(self._exchanges.run_id, digest(arrays), None, self._exchanges.mode)
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
            of = Model(server_round, arrays, graph, sha256, tensors, present)
            found = self._asked(of, replace(nothing, graph_sha256=sha256))
            if found.reason:
                _log.warning("calibration: %s", found.reason)
            return found
        _log.warning("not calibrated: %s", reason)
        return replace(nothing, reason=reason[:_MAX_REASON])

    def line(self, last: Line, found: Calibration, seconds: float) -> Line:
        """The last round's line with what this has cost and spent.

        Args:
            last: as it was.
            found: by ``run``.
            seconds: that it took.
        """
        moved = self._exchanges.tally
        more: Line = {
            "calibration": {
                "mode": found.mode,
                "sites": len(found.sites),
                "ranges": found.ranges is not None,
                "candidates": sorted(found.candidates),
                "reason": found.reason,
                "seconds": round(seconds, 4),
                "bytes": {"sent": moved.sent, "received": moved.received},
            }
        }
        return self._exchanges.charged(last) | more | self._exchanges.spent(last, self._releases)

    def _asked(self, of: Model, nothing: Calibration) -> Calibration:
        found = self._ranges(of, nothing)
        reach(BETWEEN, of.server_round)
        digests, reasons = self._candidates(of, found.ranges)
        scored, reason, more = self._qualify(of, digests, found.ranges)
        for one in (*found.absent, *more):
            _log.warning("%s: %s is not counted: FE-%d %s", one.of, one.site, one.code, one.reason)
        return replace(
            found,
            reason="; ".join(filter(None, (found.reason, *reasons, reason)))[:_MAX_REASON],
            candidates=scored,
            absent=(*found.absent, *more),
        )

    def _ranges(self, of: Model, nothing: Calibration) -> Calibration:
        """The merged ranges, which the sites are asked for unless they are known already."""
        known, graph = self._known, nothing.graph_sha256
        if known and (known.model_sha256, known.graph_sha256) == (nothing.model_sha256, graph):
            _log.info("calibration: goes on with the ranges of %d sites", len(known.sites))
        else:
            merged, absent = self._calibrate(of)
            known = replace(
                nothing,
                sites=merged.sites,
                examples=merged.examples,
                reason=f"no ranges: {merged.reason}"[:_MAX_REASON],
                clipped=merged.clipped,
                absent=absent,
            )
            if merged.both is not None:
                pairs = ((float(low), float(high)) for low, high in merged.both)
                known = replace(known, ranges=dict(zip(of.tensors, pairs, strict=True)), reason="")
            self._keep(known)
        self._releases += self._exchanges.releases("calibrate", of.server_round)
        return known

    def _calibrate(self, of: Model) -> tuple[_Merged, tuple[Absent, ...]]:
        count, most = len(of.tensors), self._section.examples
        names = ranges.names(count)
        noised = self._exchanges.noise(names, ranges.sensitivity(count))
        every = noised is not None and noised.unit == "example"
        asked = Asked(
            "calibrate",
            protocol.CALIBRATE,
            (*names, EXAMPLES),
            names,
            noised,
            lambda m: m.train_examples if every else min(m.train_examples, most),
        )
        if self._exchanges.sums is None:
            merged = self._merged(of, asked)
        else:
            counted, sites, reason = self._exchanges.summed(self._exchanges.sums, of, asked)
            merged = _Merged(None, reason)
            if counted is not None:
                counts = np.array([counted[name] for name in names])
                merged = self._outermost(counts, of, asked.noised, sites)
                examples = counted.get(EXAMPLES)
                merged = replace(merged, examples=None if examples is None else int(examples))
        return merged, self._exchanges.absent(asked, calibration.RANGES)

    def _merged(self, of: Model, asked: Asked) -> _Merged:
        """Ranges that are told in clear."""
        told: dict[str, gate.Ranges] = {}
        bound = self._section.bound
        for member, reply, expected in self._exchanges.told(of, asked):
            found, verdict = gate.admit_ranges(
                reply, member.site, asked.most(member), expected, of.sha256, len(of.tensors), bound
            )
            self._exchanges.take(verdict)
            if found is not None:
                told[member.site] = found
        if not told:
            return _Merged(None, "no site's count")
        sites = tuple(sorted(told))
        if asked.noised is not None:
            counts = np.sum([told[s].values for s in sites], axis=0)
            return self._outermost(counts, of, asked.noised, sites)
        hidden = self._exchanges.config.privacy.mechanism == "local"
        return _Merged(
            ranges.merged([told[s].values for s in sites]),
            sites=sites,
            examples=None if hidden else sum(r.num_examples for r in told.values()),
            clipped=tuple(s for s in sites if (np.abs(told[s].values) >= bound).any()),
        )

    def _outermost(
        self,
        counts: NDArray[np.float64],
        of: Model,
        noised: NoisedCounts | None,
        sites: tuple[str, ...],
    ) -> _Merged:
        """The ranges that summed histograms tell, or why they tell none."""
        threshold, count = 0.0, len(of.tensors)
        if noised is not None:
            deviation = noised.deviation * math.sqrt(len(sites))
            threshold = ranges.above_noise(deviation, count)
        shaped = counts.reshape(count, ranges.SIDES, ranges.BINS)
        try:
            both = ranges.outermost(shaped, self._section.bound, threshold)
            return _Merged(both, sites=sites)
        except ranges.HiddenError as error:
            if noised is None:
                return _Merged(None, "no site has training examples", sites)
            unit = "examples" if noised.unit == "example" else "sites"
            return _Merged(
                None,
                f"{of.tensors[error.tensor]}: must have a bin of more than {threshold:.1f} {unit} to stand above"
                " the noise, got none; more of them would do, or a smaller privacy.metrics-noise-multiplier",
                sites,
            )

    def _candidates(
        self, of: Model, known: candidates.Ranges | None
    ) -> tuple[dict[str, str], list[str]]:
        """SHA-256 of each candidate that can be made, and why the others cannot."""
        digests: dict[str, str] = {}
        reasons = []
        for kind in candidates.CANDIDATES:
            if kind in candidates.QUANTISED and known is None:
                continue
            try:
                made = candidates.derived(kind, of.graph, known)
                digests[kind] = hashlib.sha256(made).hexdigest()
            except Exception as error:  # converters let exceptions of every kind through
                _log.exception("%s cannot be made", kind)
                reasons.append(f"{kind}: cannot be made ({type(error).__name__})")
        return digests, reasons

    def _qualify(
        self, of: Model, digests: Mapping[str, str], known: candidates.Ranges | None
    ) -> tuple[dict[str, Counted], str, tuple[Absent, ...]]:
        own = tuple(sorted({*self._task.counter_names, EXAMPLES}))
        order = tuple(f"{kind}/{name}" for kind in digests for name in own if name != LOSS)
        asked = Asked(
            "qualify",
            protocol.QUALIFY,
            tuple(f"{kind}/{name}" for kind in digests for name in (RAN, *own)),
            order,
            self._exchanges.noise(order),
            lambda m: m.test_examples,
        )
        asked.more = {
            protocol.CANDIDATES: list(digests),
            protocol.CANDIDATE_DIGESTS: list(digests.values()),
        }
        if known is not None:
            low, high = zip(*(known[name] for name in of.tensors), strict=True)
            asked.more |= {protocol.RANGE_LOW: list(low), protocol.RANGE_HIGH: list(high)}
        parts: list[scores.Counters] = []
        reason, each = "no site's figures count", 1
        if self._exchanges.sums is not None:
            counted, sites, reason = self._exchanges.summed(self._exchanges.sums, of, asked)
            if counted is not None:
                parts, each = [scores.by_kind(counted)], len(sites)
        else:
            listed = asked.names if asked.noised is None else order
            for member, reply, expected in self._exchanges.told(of, asked):
                found, verdict = gate.admit_scores(
                    reply, member.site, asked.most(member), expected, digests, listed
                )
                self._exchanges.take(verdict)
                if found is not None:
                    parts.append(found.counters)
                    asked.absent += found.absent
        self._releases += self._exchanges.releases("qualify", of.server_round)
        scored = scores.counted(self._task, digests, parts, asked.noised, each)
        reason = "" if parts else f"no candidate is counted: {reason}"
        return scored, reason, self._exchanges.absent(asked, calibration.CANDIDATES)
