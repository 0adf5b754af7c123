"""Between the worker and its ledger: counters over examples that get noise, and are charged for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from flwr.app import MetricRecord, RecordDict

from fedge.client import requests
from fedge.client.privacy.charging import ChargedReplies, ReleaseRequest
from fedge.client.requests import Address
from fedge.client.secagg.participant import is_secure, min_sites_of
from fedge.client.training.requested_counts import Reported, RequestedCounts
from fedge.shared import protocol
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.errors import SiteError
from fedge.shared.privacy.accounting.charges import Spent
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.mechanisms import noised_counts
from fedge.shared.privacy.mechanisms.noised_counts import NoisedCounts

#: Name in the ledger of what protects the counters: the same whatever protects the updates.
MECHANISM: Final = "noised-metrics"


@dataclass(frozen=True)
class Evaluation:
    """A request for counters, and how they leave the site.

    Attributes:
        request: itself.
        address: of it.
        figures: what it asks for.
        counts: the noise.
        delta: at which the run's epsilon is meant.
        min_sites: fewest sites of a sum whose noise together hides each; 0 where each site's own does.
    """

    request: RecordDict
    address: Address
    figures: RequestedCounts
    counts: NoisedCounts
    delta: float
    min_sites: int = 0


class NoisedEvaluations:
    """Evaluation under differential privacy in one worker.

    Args:
        privacy: of the site.
    """

    def __init__(self, privacy: ChargedReplies) -> None:
        self._privacy = privacy

    def evaluation(
        self,
        request: RecordDict,
        address: Address,
        section: PrivacySection,
        figures: RequestedCounts,
    ) -> Evaluation | None:
        """How figures leave the site; None where they leave it without noise.

        Raises:
            SiteError: 414, the request's own section says that nobody evaluates, its numbers do not agree, or the noise
                does not fit its grid.
        """
        if section.mechanism != "off" and section.metrics == "off":
            raise requests.refuse("privacy.metrics", "noised or unprotected to evaluate", "off")
        honest, min_sites = 1, 0
        if section.metrics == "noised" and section.mechanism == "distributed":
            if not is_secure(request):
                raise requests.refuse(
                    "privacy.mechanism", "distributed under secure aggregation only", "in clear"
                )
            min_sites = min_sites_of(request)
            honest = min_sites - section.corrupt_sites
            if honest < 1:
                raise requests.refuse(
                    "privacy.corrupt-sites", f"below {min_sites}", section.corrupt_sites
                )
        names = figures.names if figures.noised is None else figures.noised
        counts = noised_counts.plan(section, names, honest, figures.sensitivity)
        if counts is None:
            return None
        try:
            counts.require_grid()
        except ValueError as error:
            raise SiteError(414, f"privacy: {error}") from None
        return Evaluation(request, address, figures, counts, section.delta, min_sites)

    def answer(
        self, evaluation: Evaluation, reply: Callable[[MetricRecord], RecordDict]
    ) -> RecordDict:
        """The reply in clear: charged, made, kept; or the one that was kept.

        Args:
            evaluation: the request, and how its counters leave.
            reply: with these metrics.

        Raises:
            SiteError: 401, a counter is not finite; 427, 428, see ``ChargedReplies``.
        """

        def make(spent: Spent) -> RecordDict:
            metrics: Reported = {
                # Of a site every one has the same weight; of examples their number is a counter, with noise.
                protocol.NUM_EXAMPLES: 1,
                **self._privacy.told(spent),
            }
            counters = self._noised(evaluation)
            if evaluation.figures.listed:
                metrics[protocol.COUNTS] = [
                    counters[name] for name in evaluation.figures.noised or ()
                ]
            else:
                metrics.update(counters)
            return self._privacy.attach_ledger_digest(reply(MetricRecord({**metrics})))

        release_request, release = (
            self._release_request(evaluation),
            Release(evaluation.counts.noise_multiplier),
        )
        return self._privacy.answer(
            release_request, evaluation.counts.unit, MECHANISM, release, make
        )

    def charged(self, evaluation: Evaluation) -> dict[str, float]:
        """Counters for one attempt at a secure sum, charged first; each attempt has noise of its own.

        Raises:
            SiteError: as ``answer``.
        """
        release = Release(evaluation.counts.noise_multiplier)
        self._privacy.charge(
            self._release_request(evaluation), evaluation.counts.unit, MECHANISM, release
        )
        return self._noised(evaluation)

    def attach_ledger_digest(self, reply: RecordDict) -> RecordDict:
        """Put the ledger's digest into a reply."""
        return self._privacy.attach_ledger_digest(reply)

    def _noised(self, evaluation: Evaluation) -> dict[str, float]:
        counters = evaluation.figures.count()
        try:
            return evaluation.counts.make(counters, self._privacy.entropy)
        except ValueError as error:
            raise SiteError(401, str(error)) from None

    @staticmethod
    def _release_request(evaluation: Evaluation) -> ReleaseRequest:
        return ReleaseRequest.of(
            evaluation.figures.kind, evaluation.request, evaluation.address, evaluation.delta
        )
