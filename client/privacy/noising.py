"""Between the worker and its ledger: a round of training under differential privacy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import nn

from fedge.client import requests
from fedge.client.privacy.charging import ChargedReplies, ReleaseRequest
from fedge.client.privacy.noise_calibration import Noise, noise_within, release_of
from fedge.client.requests import Address, Terms, Training
from fedge.client.secagg.input_vector import SiteNoise
from fedge.client.secagg.participant import min_sites_of
from fedge.client.training.local_steps import Examples
from fedge.shared import protocol
from fedge.shared.config.privacy import CENTRAL, PrivacySection
from fedge.shared.errors import ConfigError, SiteError
from fedge.shared.privacy.accounting.charges import Spent
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.accounting.run_releases import RunTerms, run_terms
from fedge.shared.privacy.checks import compatibility
from fedge.shared.privacy.mechanisms import distributed, local
from fedge.shared.protocol import MAX_SITES
from fedge.shared.tasks.task import Task
from fedge.shared.wire.tensors import NDArrays


@dataclass(frozen=True)
class Round:
    """What is asked, and of which examples.

    Attributes:
        request: to train.
        terms: of it.
        section: the mechanism.
        config: of the request.
        what: the training.
        examples: the site's training split.
    """

    request: RecordDict
    terms: Terms
    section: PrivacySection
    config: ConfigRecord
    what: Training
    examples: Examples

    @property
    def address(self) -> Address:
        """Run and round."""
        return self.terms.address


class PrivateWork:
    """Training under differential privacy in one worker."""

    def __init__(self, task: Task, privacy: ChargedReplies) -> None:
        self._task, self._privacy = task, privacy
        self._fit: set[PrivacySection] = set()

    def require_fit(self, section: PrivacySection) -> None:
        """Hold the task against a mechanism, once for each: a failure later would have been charged.

        Raises:
            SiteError: 414, the task cannot be learnt under it.
        """
        if section in self._fit:
            return
        try:
            compatibility.require_compatible(section, self._task)
        except ConfigError as error:
            raise SiteError(414, error.message) from None
        self._fit.add(section)

    def answer(self, of: Round, reply: Callable[[MetricRecord], RecordDict]) -> RecordDict:
        """The round's reply: charged, made, kept; or the one that was kept.

        Args:
            of: the round.
            reply: trains, and makes the reply with these metrics.

        Raises:
            SiteError: 414, what is asked for would tell more than is charged; 427, 428, see ``SitePrivacy``.
        """
        once = False
        num_examples = len(of.examples.y)
        if of.section.mechanism in CENTRAL:
            terms = self._run_terms(of)
            release, once = terms.release, terms.once
        elif of.section.mechanism == "local":
            _require_bare(of.what)
            release, num_examples = Release(_noise(of.section).noise_multiplier), 1
        else:
            release = self._release(of)

        def make(spent: Spent) -> RecordDict:
            metrics: dict[str, int | float] = {
                protocol.NUM_EXAMPLES: num_examples,
                protocol.EPSILON_CONSUMERS: spent.consumers,
                protocol.EPSILON_SERVER: spent.server,
            }
            return self.vouch(reply(MetricRecord({**metrics})))

        asked = ReleaseRequest.of(protocol.TRAIN, of.request, of.address)
        section = of.section
        return self._privacy.answer(
            asked, section.unit, section.mechanism, release, make, once=once
        )

    def vouch(self, reply: RecordDict) -> RecordDict:
        """Put the ledger's digest into a reply."""
        return self._privacy.vouch(reply)

    def charged(self, of: Round, train: Callable[[], NDArrays]) -> tuple[NDArrays, float]:
        """Trained weights for a secure sum, charged first; there is no loss to tell, so it is 0."""
        asked = ReleaseRequest.of(protocol.TRAIN, of.request, of.address)
        self._privacy.charge(asked, "example", of.section.mechanism, self._release(of))
        return train(), 0.0

    def noise(self, of: Round, received: NDArrays) -> tuple[SiteNoise, Callable[[], None]]:
        """The site's part of distributed noise, and what pays for an attempt with it.

        Raises:
            SiteError: 414, what is asked for would tell more than is charged, or the noise does not fit its grid: at
                once, and not when it was charged.
        """
        _require_bare(of.what)
        terms, least = _noise(of.section), min_sites_of(of.request)
        honest = least - of.section.corrupt_sites
        if honest < 1:
            raise requests.refuse(
                "privacy.corrupt-sites", f"below {least}", of.section.corrupt_sites
            )
        try:
            distributed.stddev(terms.noise_multiplier, _size(received), honest, MAX_SITES)
        except ValueError as error:
            raise SiteError(414, f"privacy: {error}") from None
        entropy = self._privacy.entropy
        noise = SiteNoise(terms.clipping_bound, terms.noise_multiplier, honest, entropy)

        def charge() -> None:
            asked = ReleaseRequest.of(protocol.TRAIN, of.request, of.address)
            release = Release(terms.noise_multiplier)
            self._privacy.charge(asked, "site", of.section.mechanism, release)

        return noise, charge

    def cover(self, of: Round, received: NDArrays) -> Callable[[NDArrays | None], NDArrays]:
        """What puts all of the noise that hides the site on its update; None trained on nothing.

        Raises:
            SiteError: 414, the noise does not fit its grid: at once, and not when it was charged.
        """
        noise = _noise(of.section)
        try:
            local.stddev(noise.noise_multiplier, _size(received))
        except ValueError as error:
            raise SiteError(414, f"privacy: {error}") from None
        entropy = self._privacy.entropy

        def covered(trained: NDArrays | None) -> NDArrays:
            return local.noised_weights(
                received, trained, noise.clipping_bound, noise.noise_multiplier, entropy
            )

        return covered

    def take_steps(self, network: nn.Module, of: Round) -> None:
        """Train the loaded network in place."""
        # Only here: Opacus takes seconds to import, which a site without it need not pay.
        from fedge.client.privacy.dp_sgd import train_privately

        train_privately(
            self._task,
            network,
            of.examples,
            of.what.settings,
            _noise_of(of),
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
        return release_of(_noise_of(of), of.what.settings, len(of.examples.y))


def _size(received: NDArrays) -> int:
    return sum(a.size for a in received.values() if a.dtype.kind == "f")


def _require_bare(what: Training) -> None:
    """Hold a request to weights alone: nothing else of the reply has noise."""
    if what.control:
        raise requests.refuse(protocol.CONTROL, "false under differential privacy", True)
    if what.loss_at != "running":
        raise requests.refuse(protocol.LOSS_AT, "running under differential privacy", what.loss_at)


def _noise_of(of: Round) -> Noise:
    """The noise of each step of DP-SGD: as configured, or what keeps this site's whole run within epsilon."""
    section = of.section
    if section.epsilon is None:
        return _noise(section)
    rows, rounds = len(of.examples.y), requests.rounds(of.config)
    evaluations = None
    if section.metrics_noise_multiplier is not None:
        count = requests.evaluations(of.config)
        evaluations = Release(section.metrics_noise_multiplier, steps=count)
    try:
        return noise_within(
            section.epsilon,
            section.delta,
            section.clipping_bound,
            of.what.settings,
            rows,
            rounds,
            evaluations,
        )
    except ValueError as error:
        raise SiteError(414, f"privacy.{error}") from None


def _noise(section: PrivacySection) -> Noise:
    if section.noise_multiplier is None:
        raise requests.refuse("privacy.noise-multiplier", "a number", None)
    return Noise(section.noise_multiplier, section.clipping_bound)
