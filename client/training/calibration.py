"""What a site says of a run's final model beyond its metrics: ranges of activations, and what smaller graphs score.

No graph comes from the server. The site exports its own task's network with the weights that it was sent, and derives
the others itself; the request holds their digests alone, so that all sites speak of the same bytes.
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

from fedge.client import requests
from fedge.client.requests import Terms
from fedge.client.training import calibration_ranges, calibration_replay_guard, graph_runs
from fedge.client.training.calibration_ranges import Seen
from fedge.client.training.calibration_request import CalibrationRequest
from fedge.client.training.counts import Reported, RequestedCounts
from fedge.client.training.graph_runs import GraphFailedError
from fedge.client.training.learner import CHUNK, Learner
from fedge.client.training.local_steps import Examples
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
    """What the candidates scored at this site: counters by candidate, none for one that failed, and their digests."""

    counters: dict[str, dict[str, float]]
    digests: list[str]


class SiteCalibration:
    """Calibration and qualification at one site.

    Args:
        learner: the site's.
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
        """What a request to calibrate or to qualify asks for.

        Args:
            kind: its message type.
            request: itself.
            terms: of it.
            received: its weights.
            examples: to train on, and held out.
            section: the run's mechanism.

        Raises:
            SiteError: 414, the request is refused, or this run asked for other ranges before; 429, it is about another
                graph than this site's; 413, the site cannot make the graph.
        """
        asked = CalibrationRequest.of(request, self._task.name, terms, received)
        fit, held_out = examples
        if kind == protocol.CALIBRATE:
            return self._ranges(asked, fit, section)
        return self._scores(asked, held_out)

    def _ranges(
        self, asked: CalibrationRequest, fit: Examples, section: PrivacySection
    ) -> RequestedCounts:
        graph, tensors = self._graph(asked, fit)
        calibration_replay_guard.require_same(
            self._learner.home,
            asked.terms.address.run_id,
            request_digest.digest(protocol.CALIBRATE, asked.request),
        )
        rows = calibration_ranges.rows(
            len(fit.y),
            asked.section.examples,
            asked.terms.seed,
            self._learner.site,
            every=section.metrics == "noised" and section.unit == "example",
        )
        names = ranges.names(len(tensors))
        hidden = section.mechanism == "local"
        look = partial(self._seen, asked, graph, tensors, fit, rows)

        def told() -> Reported:
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
            told=told,
            count=count,
            num_examples=len(rows),
            noised=names,
            sensitivity=ranges.sensitivity(len(tensors)),
            listed=True,
            config=lambda: {protocol.GRAPH: digest},
        )

    def _scores(self, asked: CalibrationRequest, held_out: Examples) -> RequestedCounts:
        graph, tensors = self._graph(asked, held_out)
        wanted = asked.candidates()
        found = asked.ranges(tensors)
        if found is None and (needy := sorted(set(wanted) & set(candidates.QUANTISED))):
            raise requests.refuse(protocol.RANGE_LOW, f"given for {needy[0]}", None)
        own = tuple(sorted({*self._task.counter_names, EXAMPLES}))
        score = partial(self._scored, asked, graph, wanted, found, held_out, own)
        names = tuple(f"{kind}/{name}" for kind in wanted for name in (RAN, *own))
        noised = tuple(f"{kind}/{name}" for kind in wanted for name in own if name != LOSS)

        def count() -> Mapping[str, float]:
            scored = score().counters
            return {
                **{name: scored[kind][c] for name in names for kind, c in [name.split("/", 1)]},
                EXAMPLES: float(len(held_out.y)),
            }

        def told() -> Reported:
            counted = count()
            listed = [counted[name] for name in names]
            return {protocol.NUM_EXAMPLES: len(held_out.y), protocol.COUNTS: listed}

        return RequestedCounts(
            kind=protocol.QUALIFY,
            names=names,
            told=told,
            count=count,
            num_examples=len(held_out.y),
            noised=noised,
            listed=True,
            config=lambda: {protocol.CANDIDATE_DIGESTS: score().digests},
        )

    def _graph(
        self, asked: CalibrationRequest, examples: Examples
    ) -> tuple[bytes, tuple[str, ...]]:
        """The site's own fp32 graph, which must be the one that the server speaks of, and its tensors."""
        try:
            graph = candidates.fp32(self._task, asked.received, tuple(examples.x.shape[1:]))
            tensors = candidates.tensors(graph)
        except ImportError as error:
            raise SiteError(
                _FAILED, f"calibration: must have the converters, got {error}; {candidates.EXTRA}"
            ) from None
        except FedgeError as error:
            raise SiteError(_FAILED, f"calibration: {error.message}") from None
        found = hashlib.sha256(graph).hexdigest()
        if found != asked.graph:
            raise SiteError(_ANOTHER, f"{protocol.GRAPH}: must be {asked.graph}, got {found} here")
        return graph, tensors

    def _seen(
        self,
        asked: CalibrationRequest,
        graph: bytes,
        tensors: tuple[str, ...],
        fit: Examples,
        rows: Any,
    ) -> Seen:
        """How far the activations go in those examples."""

        def look() -> Seen:
            x, bound = fit.x.cpu().numpy(), asked.section.bound
            return calibration_ranges.seen(graph, tensors, x, rows, bound, asked.running)

        return self._once(protocol.CALIBRATE, asked, look)

    def _scored(
        self,
        asked: CalibrationRequest,
        graph: bytes,
        wanted: Mapping[str, str],
        found: candidates.Ranges | None,
        held_out: Examples,
        own: tuple[str, ...],
    ) -> Scored:
        def score() -> Scored:
            graphs: dict[str, bytes] = {}
            digests = []
            for kind, digest in wanted.items():
                made = self._made(kind, graph, found)
                digests.append(hashlib.sha256(made).hexdigest() if made else "")
                if digests[-1] == digest:
                    graphs[kind] = made
                else:
                    log.warning("%s: must be %s, got %s here", kind, digest, digests[-1] or "none")
            ran = self._ran(asked, graphs, held_out, own)
            nothing = dict.fromkeys((RAN, *own), 0.0)
            return Scored({kind: ran.get(kind, nothing) for kind in wanted}, digests)

        return self._once(protocol.QUALIFY, asked, score)

    @staticmethod
    def _made(kind: str, graph: bytes, found: candidates.Ranges | None) -> bytes:
        """A candidate; empty where it cannot be made here."""
        try:
            return candidates.derived(kind, graph, found)
        except Exception:  # converters let exceptions of every kind through
            log.exception("%s: cannot be made", kind)
            return b""

    def _ran(
        self,
        asked: CalibrationRequest,
        graphs: Mapping[str, bytes],
        held_out: Examples,
        own: tuple[str, ...],
    ) -> dict[str, dict[str, float]]:
        """Counters of the candidates that run here."""
        if not len(held_out.y):
            return {kind: {RAN: 1.0, **dict.fromkeys(own, 0.0)} for kind in graphs}
        output = self._task.output
        width = len(output.labels) if output.activation == "softmax" else 1
        x, terms = held_out.x.cpu().numpy(), asked.running
        found = {}
        for kind, logits in zip(
            graphs, graph_runs.logits(list(graphs.values()), x, width, terms), strict=True
        ):
            if isinstance(logits, GraphFailedError):
                log.warning("%s: %s", kind, logits)
                continue
            counted = self._counted(logits, held_out)
            found[kind] = {RAN: 1.0, **{name: counted[name] for name in own}}
        return found

    def _counted(self, logits: NDArray[np.float32], held_out: Examples) -> dict[str, float]:
        """The task's counters of these logits, summed as an evaluation does."""
        told, labels = torch.from_numpy(logits.copy()), held_out.y.cpu()
        total = {EXAMPLES: 0.0}
        for at in range(0, len(labels), CHUNK):
            rows = slice(at, at + CHUNK)
            for name, value in self._task.counters(told[rows], labels[rows]).items():
                total[name] = total.get(name, 0.0) + value
        total[EXAMPLES] = float(len(labels))
        return total

    def _once(self, kind: str, asked: CalibrationRequest, compute: Callable[[], _T]) -> _T:
        """What a request asks for, computed once: another attempt at a masked sum asks for the same."""
        key = request_digest.digest(kind, asked.request)
        if self._last is None or self._last[0] != key:
            self._last = (key, compute())
        found: _T = self._last[1]
        return found

    def drop(self) -> None:
        """Let go of all that the next request can make anew."""
        self._last = None
        candidates.forget()
