"""Between the worker and its ledger: counters over held-out examples that get noise, and are charged for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from flwr.app import MetricRecord, RecordDict

from fedge.client import requests
from fedge.client.privacy import Asked, SitePrivacy
from fedge.client.requests import Address
from fedge.client.secure_answers import is_secure, min_sites_of
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.privacy import noised_counts
from fedge.shared.privacy.accounting import Release
from fedge.shared.privacy.charges import Spent
from fedge.shared.privacy.noised_counts import NoisedCounts
from fedge.shared.privacy.section import PrivacySection

#: Name in the ledger of what protects the counters: the same whatever protects the updates.
MECHANISM: Final = "noised-metrics"
Count = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Evaluation:
    """What is asked, and how the counters leave.

    Attributes:
        request: to evaluate.
        address: of it.
        counts: the noise.
        min_sites: fewest sites of a sum whose noise together hides each; 0 where each site's own does.
    """

    request: RecordDict
    address: Address
    counts: NoisedCounts
    min_sites: int = 0


class PrivateCounts:
    """Evaluation under differential privacy in one worker.

    Args:
        counter_names: of the task's metrics.
        privacy: of the site.
    """

    def __init__(self, counter_names: tuple[str, ...], privacy: SitePrivacy) -> None:
        self._names, self._privacy = counter_names, privacy

    def evaluation(
        self, request: RecordDict, address: Address, section: PrivacySection
    ) -> Evaluation | None:
        """How counters leave the site; None where they leave it without noise.

        Raises:
            SiteError: 414, the request's own section says that nobody evaluates, its numbers do not agree, or the noise
                does not fit its grid.
        """
        if section.mechanism != "off" and section.metrics == "off":
            raise requests.refuse("privacy.metrics", "noised or unprotected to evaluate", "off")
        honest, least = 1, 0
        if section.metrics == "noised" and section.mechanism == "distributed":
            if not is_secure(request):
                raise requests.refuse(
                    "privacy.mechanism", "distributed under masks only", "in clear"
                )
            least = min_sites_of(request)
            honest = least - section.corrupt_sites
            if honest < 1:
                raise requests.refuse(
                    "privacy.corrupt-sites", f"below {least}", section.corrupt_sites
                )
        counts = noised_counts.of(section, self._names, honest)
        if counts is None:
            return None
        try:
            counts.require_grid()
        except ValueError as error:
            raise SiteError(414, f"privacy: {error}") from None
        return Evaluation(request, address, counts, least)

    def answer(
        self,
        of: Evaluation,
        num_examples: int,
        count: Count,
        reply: Callable[[MetricRecord], RecordDict],
    ) -> RecordDict:
        """The reply to an evaluation in clear: charged, made, kept; or the one that was kept.

        Args:
            of: what is asked.
            num_examples: held out; told where the unit is an example, as when the site registered.
            count: the exact counters.
            reply: with these metrics.

        Raises:
            SiteError: 401, a counter is not finite; 427, 428, see ``SitePrivacy``.
        """

        def make(spent: Spent) -> RecordDict:
            metrics: dict[str, int | float] = {
                protocol.NUM_EXAMPLES: num_examples if of.counts.unit == "example" else 1,
                protocol.EPSILON_CONSUMERS: spent.consumers,
                protocol.EPSILON_SERVER: spent.server,
                **self._noised(of, count),
            }
            return self._privacy.vouch(reply(MetricRecord({**metrics})))

        asked, release = self._asked(of), Release(of.counts.noise_multiplier)
        return self._privacy.answer(asked, of.counts.unit, MECHANISM, release, make)

    def charged(self, of: Evaluation, count: Count) -> dict[str, float]:
        """Counters for one attempt at a secure sum, charged first; each attempt has noise of its own.

        Raises:
            SiteError: as ``answer``.
        """
        release = Release(of.counts.noise_multiplier)
        self._privacy.charge(self._asked(of), of.counts.unit, MECHANISM, release)
        return self._noised(of, count)

    def vouch(self, reply: RecordDict) -> RecordDict:
        """Put the ledger's digest into a reply."""
        return self._privacy.vouch(reply)

    def _noised(self, of: Evaluation, count: Count) -> dict[str, float]:
        found = count()
        try:
            return of.counts.make(found, self._privacy.entropy)
        except ValueError as error:
            raise SiteError(401, str(error)) from None

    @staticmethod
    def _asked(of: Evaluation) -> Asked:
        return Asked.of(protocol.EVALUATE, of.request, of.address)
