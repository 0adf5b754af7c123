"""Between the worker and its ledger: a round of training under differential privacy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import nn

from fedge.client import requests
from fedge.client.contribution import SiteNoise
from fedge.client.privacy import Asked, SitePrivacy
from fedge.client.private_release import Noise, release_of
from fedge.client.requests import Address, Training
from fedge.client.secure_answers import min_sites_of
from fedge.client.train import Examples
from fedge.shared import protocol
from fedge.shared.arrays import NDArrays
from fedge.shared.privacy.accounting import Release
from fedge.shared.privacy.charges import CENTRAL, Spent
from fedge.shared.privacy.run_terms import RunTerms, run_terms
from fedge.shared.privacy.section import PrivacySection
from fedge.shared.tasks.task import Task


@dataclass(frozen=True)
class Round:
    """What is asked, and of which examples.

    Attributes:
        request: to train.
        address: of it.
        section: the mechanism.
        config: of the request.
        what: the training.
        examples: the site's training split.
    """

    request: RecordDict
    address: Address
    section: PrivacySection
    config: ConfigRecord
    what: Training
    examples: Examples


class PrivateWork:
    """Training under differential privacy in one worker."""

    def __init__(self, task: Task, privacy: SitePrivacy) -> None:
        self._task, self._privacy = task, privacy

    def answer(self, of: Round, reply: Callable[[MetricRecord], RecordDict]) -> RecordDict:
        """The round's reply: charged, made, kept; or the one that was kept.

        Args:
            of: the round.
            reply: trains, and makes the reply with these metrics.

        Raises:
            SiteError: 414, what is asked for would tell more than is charged; 427, 428, see ``SitePrivacy``.
        """
        once = False
        if of.section.mechanism in CENTRAL:
            terms = self._run_terms(of)
            release, once = terms.release, terms.once
        else:
            release = self._release(of)

        def make(spent: Spent) -> RecordDict:
            metrics: dict[str, int | float] = {
                protocol.NUM_EXAMPLES: len(of.examples.y),
                protocol.EPSILON_CONSUMERS: spent.consumers,
                protocol.EPSILON_SERVER: spent.server,
            }
            return self.vouch(reply(MetricRecord({**metrics})))

        asked = Asked.of(protocol.TRAIN, of.request, of.address)
        section = of.section
        return self._privacy.answer(
            asked, section.unit, section.mechanism, release, make, once=once
        )

    def vouch(self, reply: RecordDict) -> RecordDict:
        """Put the ledger's digest into a reply: what has left the site shows if its ledger is rewritten."""
        config = reply[protocol.CONFIG]
        if isinstance(config, ConfigRecord):
            config[protocol.PRIVACY_LEDGER] = self._privacy.digest()
        return reply

    def charged(self, of: Round, train: Callable[[], NDArrays]) -> tuple[NDArrays, float]:
        """Trained weights for a secure sum, charged first; there is no loss to tell, so it is 0."""
        asked = Asked.of(protocol.TRAIN, of.request, of.address)
        self._privacy.charge(asked, "example", of.section.mechanism, self._release(of))
        return train(), 0.0

    def noise(self, of: Round) -> tuple[SiteNoise, Callable[[], None]]:
        """The site's part of distributed noise, and what pays for an attempt with it.

        Raises:
            SiteError: 414, what is asked for would tell more than is charged.
        """
        _require_bare(of.what)
        terms, least = _noise(of.section), min_sites_of(of.request)
        honest = least - of.section.corrupt_sites
        if honest < 1:
            raise requests.refuse(
                "privacy.corrupt-sites", f"below {least}", of.section.corrupt_sites
            )
        entropy = self._privacy.entropy
        noise = SiteNoise(terms.clipping_bound, terms.noise_multiplier, honest, entropy)

        def charge() -> None:
            asked = Asked.of(protocol.TRAIN, of.request, of.address)
            release = Release(terms.noise_multiplier)
            self._privacy.charge(asked, "site", of.section.mechanism, release)

        return noise, charge

    def take_steps(self, network: nn.Module, of: Round) -> None:
        """Train the loaded network in place."""
        # Only here: Opacus takes seconds to import, which a site without it need not pay.
        from fedge.client.private_training import train_privately

        train_privately(
            self._task,
            network,
            of.examples,
            of.what.settings,
            _noise(of.section),
            self._privacy.entropy,
            proximal_mu=of.what.proximal_mu,
        )

    @staticmethod
    def _run_terms(of: Round) -> RunTerms:
        _require_bare(of.what)
        return run_terms(of.section, requests.rounds(of.config))

    @staticmethod
    def _release(of: Round) -> Release:
        _require_bare(of.what)
        if of.what.settings.mixed_precision != "off":
            raise requests.refuse(
                "mixed-precision",
                "off under differential privacy",
                of.what.settings.mixed_precision,
            )
        return release_of(_noise(of.section), of.what.settings, len(of.examples.y))


def _require_bare(what: Training) -> None:
    """Hold a request to weights alone: nothing else of the reply has noise."""
    if what.control:
        raise requests.refuse(protocol.CONTROL, "false under differential privacy", True)
    if what.loss_at != "running":
        raise requests.refuse(protocol.LOSS_AT, "running under differential privacy", what.loss_at)


def _noise(section: PrivacySection) -> Noise:
    if section.noise_multiplier is None:
        raise requests.refuse("privacy.noise-multiplier", "a number", None)
    return Noise(section.noise_multiplier, section.clipping_bound)
