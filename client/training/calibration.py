"""A site's part in calibration and qualification: ranges of activations, and the metrics of smaller graphs.

No graph comes from the server. The site exports its own task's network with the received weights, and derives the
others itself; the request holds only their digests, so that all sites use the same bytes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeVar

import numpy as np
import torch
from flwr.app import RecordDict
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedge.client import requests
from fedge.client.requests import Terms
from fedge.client.training import calibration_ranges, calibration_replay_guard, onnx_runs
from fedge.client.training.calibration_ranges import ObservedRanges
from fedge.client.training.calibration_request import CalibrationRequest
from fedge.client.training.learner import CHUNK, Learner
from fedge.client.training.local_steps import Examples
from fedge.client.training.onnx_runs import GraphFailedError
from fedge.client.training.requested_counts import Reported, RequestedCounts
from fedge.shared import protocol
from fedge.shared.compile import candidates, ranges
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.errors import FedgeError, SiteError
from fedge.shared.privacy.mechanisms.noised_counts import EXAMPLES, LOSS
from fedge.shared.secagg import request_digest
from fedge.shared.wire.tensors import NDArrays

log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Counter of a candidate: 1 where it ran.
RAN: Final = "ran"

_FAILED, _ANOTHER = 413, 429


@dataclass(frozen=True)
class Scored:
    """The candidates' counters at this site, all 0 for one that failed, and their SHA-256 (hex), empty for none."""

    counters: dict[str, dict[str, float]]
    digests: list[str]


class SiteCalibration:
    """Calibration and qualification at one site.

    Args:
        learner: of the site.
    """

    def __init__(self, learner: Learner) -> None:
        self._learner, self._task = learner, learner.task
        self._last: tuple[bytes, Any] | None = None

    def figures(
        self,
        kind: str,
        request: RecordDict,
        terms: Terms,
        received: NDArrays,
        examples: tuple[Examples, Examples],
        section: PrivacySection,
    ) -> RequestedCounts:
        """The counts that a request to calibrate or to qualify asks for.

        Args:
            kind: message type.
            request: content of the message.
            terms: of the request.
            received: weights by name.
            examples: training and held-out examples, preprocessed.
            section: the run's privacy section.

        Raises:
            SiteError: 414, the request is refused, or the run asked for other ranges before; 429, its graph's digest is
                not that of this site's graph; 413, the site cannot export the graph.
        """
        calibration = CalibrationRequest.parse(request, self._task.name, terms, received)
        train_examples, held_out = examples
        if kind == protocol.CALIBRATE:
            return self._ranges(calibration, train_examples, section)
        return self._scores(calibration, held_out, noised=section.metrics == "noised")

    def _ranges(
        self, calibration: CalibrationRequest, train_examples: Examples, section: PrivacySection
    ) -> RequestedCounts:
        graph, tensors = self._graph(calibration, train_examples)
        noised = section.metrics == "noised"
        calibration_replay_guard.require_same(
            self._learner.home,
            calibration.terms.address.run_id,
            request_digest.digest(protocol.CALIBRATE, calibration.request),
        )
        rows = calibration_ranges.rows(
            len(train_examples.y),
            calibration.section.examples,
            calibration.terms.seed,
            self._learner.site,
            every=noised and section.unit == "example",
        )
        names = ranges.names(len(tensors))
        hidden = section.hides_sites
        look = partial(self._observed, calibration, graph, tensors, train_examples, rows, noised)

        def reported() -> Reported:
            both = look().both
            return {
                protocol.NUM_EXAMPLES: 1 if hidden else len(rows),
                protocol.RANGE_LOW: both[:, 0].tolist(),
                protocol.RANGE_HIGH: both[:, 1].tolist(),
            }

        def count() -> Mapping[str, float]:
            if not len(rows):
                return dict.fromkeys((*names, EXAMPLES), 0.0)
            counts = look().counts.reshape(-1).astype(np.float64)
            return {**dict(zip(names, counts.tolist(), strict=True)), EXAMPLES: float(len(rows))}

        digest = hashlib.sha256(graph).hexdigest()
        return RequestedCounts(
            kind=protocol.CALIBRATE,
            names=(*names, EXAMPLES),
            reported=reported,
            count=count,
            num_examples=len(rows),
            noised=names,
            sensitivity=ranges.sensitivity(len(tensors)),
            listed=True,
            config=lambda: {protocol.GRAPH: digest},
        )

    def _scores(
        self, calibration: CalibrationRequest, held_out: Examples, *, noised: bool
    ) -> RequestedCounts:
        graph, tensors = self._graph(calibration, held_out)
        expected = calibration.candidates()
        merged_ranges = calibration.ranges(tensors)
        if merged_ranges is None and (needy := sorted(set(expected) & set(candidates.QUANTISED))):
            raise requests.refuse(protocol.RANGE_LOW, f"given for {needy[0]}", None)
        own = tuple(sorted({*self._task.counter_names, EXAMPLES}))
        run = partial(self._run_candidates, calibration, held_out=held_out, own=own, noised=noised)
        score = partial(
            self._score_candidates, calibration, graph, expected, merged_ranges, own, run
        )
        names = tuple(f"{kind}/{name}" for kind in expected for name in (RAN, *own))
        without_loss = tuple(f"{kind}/{name}" for kind in expected for name in own if name != LOSS)

        def count() -> Mapping[str, float]:
            scored = score().counters
            return {
                **{name: scored[kind][c] for name in names for kind, c in [name.split("/", 1)]},
                EXAMPLES: float(len(held_out.y)),
            }

        def reported() -> Reported:
            counted = count()
            listed = [counted[name] for name in names]
            return {protocol.NUM_EXAMPLES: len(held_out.y), protocol.COUNTS: listed}

        return RequestedCounts(
            kind=protocol.QUALIFY,
            names=names,
            reported=reported,
            count=count,
            num_examples=len(held_out.y),
            noised=without_loss,
            listed=True,
            config=lambda: {protocol.CANDIDATE_DIGESTS: score().digests},
        )

    def _graph(
        self, calibration: CalibrationRequest, examples: Examples
    ) -> tuple[bytes, tuple[str, ...]]:
        """The site's own fp32 graph, whose digest must be that of the request, and the names of its tensors."""
        try:
            graph = candidates.fp32(self._task, calibration.received, tuple(examples.x.shape[1:]))
            tensors = candidates.tensors(graph)
        except ImportError as error:
            raise SiteError(
                _FAILED, f"calibration: must have the converters, got {error}; {candidates.EXTRA}"
            ) from None
        except FedgeError as error:
            raise SiteError(_FAILED, f"calibration: {error.message}") from None
        digest = hashlib.sha256(graph).hexdigest()
        if digest != calibration.graph:
            raise SiteError(
                _ANOTHER, f"{protocol.GRAPH}: must be {calibration.graph}, got {digest} here"
            )
        return graph, tensors

    def _observed(
        self,
        calibration: CalibrationRequest,
        graph: bytes,
        tensors: tuple[str, ...],
        train_examples: Examples,
        rows: Any,
        noised: bool,
    ) -> ObservedRanges:
        """The ranges of the activations in those examples."""

        def look() -> ObservedRanges:
            x, bound = train_examples.x.cpu().numpy(), calibration.section.bound
            return calibration_ranges.observe_ranges(
                graph, tensors, x, rows, bound, calibration.running, noised=noised
            )

        return self._once(protocol.CALIBRATE, calibration, look)

    def _score_candidates(
        self,
        calibration: CalibrationRequest,
        graph: bytes,
        expected: Mapping[str, str],
        merged_ranges: candidates.Ranges | None,
        own: tuple[str, ...],
        run: Callable[[Mapping[str, bytes]], dict[str, dict[str, float]]],
    ) -> Scored:
        def score() -> Scored:
            graphs: dict[str, bytes] = {}
            digests = []
            for kind, digest in expected.items():
                candidate = self._derived(kind, graph, merged_ranges)
                digests.append(hashlib.sha256(candidate).hexdigest() if candidate else "")
                if digests[-1] == digest:
                    graphs[kind] = candidate
                else:
                    log.warning("%s: must be %s, got %s here", kind, digest, digests[-1] or "none")
            counters = run(graphs)
            nothing = dict.fromkeys((RAN, *own), 0.0)
            return Scored({kind: counters.get(kind, nothing) for kind in expected}, digests)

        return self._once(protocol.QUALIFY, calibration, score)

    @staticmethod
    def _derived(kind: str, graph: bytes, merged_ranges: candidates.Ranges | None) -> bytes:
        """A candidate graph; empty where it cannot be derived here."""
        try:
            return candidates.derived(kind, graph, merged_ranges)
        except Exception:  # converters let exceptions of every kind through
            log.exception("%s: cannot be derived", kind)
            return b""

    def _run_candidates(
        self,
        calibration: CalibrationRequest,
        graphs: Mapping[str, bytes],
        *,
        held_out: Examples,
        own: tuple[str, ...],
        noised: bool,
    ) -> dict[str, dict[str, float]]:
        """Run the candidates, and give the counters of those that do not fail.

        In clear a candidate fails by one logit that is not finite. Under noise that example alone counts as wrong:
        one example would otherwise take all others' counts away, which the noise does not hide. It does not hide
        either that a graph crashes, raises an error or takes too long: that ends the run over all examples, and where
        one example's values are the cause, the counts of 0 still tell of it.
        """
        if not len(held_out.y):
            return {kind: {RAN: 1.0, **dict.fromkeys(own, 0.0)} for kind in graphs}
        output = self._task.output
        width = len(output.labels) if output.activation == "softmax" else 1
        x, terms = held_out.x.cpu().numpy(), calibration.running
        counters = {}
        results = onnx_runs.logits(list(graphs.values()), x, width, terms, finite=not noised)
        for kind, logits in zip(graphs, results, strict=True):
            if isinstance(logits, GraphFailedError):
                log.warning("%s: %s", kind, logits)
                continue
            counted = self._counted(logits, held_out)
            counters[kind] = {RAN: 1.0, **{name: counted[name] for name in own}}
        return counters

    def _counted(self, logits: NDArray[np.float32], held_out: Examples) -> dict[str, float]:
        """The task's counters of logits ``(n, k)``, summed as in an evaluation; what is not finite counts as wrong."""
        outputs, labels = torch.from_numpy(logits.copy()), held_out.y.cpu()
        broken = ~outputs.isfinite().all(dim=1)
        if broken.any():
            log.warning("%d examples count as wrong, as their logits are not finite", broken.sum())
            outputs[broken] = _wrong(labels[broken], outputs.shape[1])
        total = {EXAMPLES: 0.0}
        for at in range(0, len(labels), CHUNK):
            rows = slice(at, at + CHUNK)
            for name, value in self._task.counters(outputs[rows], labels[rows]).items():
                total[name] = total.get(name, 0.0) + value
        total[EXAMPLES] = float(len(labels))
        return total

    def _once(self, kind: str, calibration: CalibrationRequest, compute: Callable[[], _T]) -> _T:
        """The result of a request, computed once: another attempt at a secure sum repeats the request."""
        key = request_digest.digest(kind, calibration.request)
        if self._last is None or self._last[0] != key:
            self._last = (key, compute())
        result: _T = self._last[1]
        return result

    def drop(self) -> None:
        """Release everything that the next request can compute again."""
        self._last = None
        candidates.forget()


def _wrong(labels: Tensor, width: int) -> Tensor:
    """Logits ``(n, width)`` of another label than each of ``labels``."""
    if width == 1:
        return torch.where(labels == 1, -1.0, 1.0)[:, None]
    return functional.one_hot((labels + 1) % width, width).float()
