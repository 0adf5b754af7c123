"""A round of training under differential privacy: checked, charged to the ledger, noised."""

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
from fedge.shared.privacy.accounting.run_releases import RunReleases, run_releases
from fedge.shared.privacy.checks import compatibility
from fedge.shared.privacy.mechanisms import distributed, local
from fedge.shared.protocol import MAX_SITES
from fedge.shared.tasks.task import Task
from fedge.shared.wire.tensors import NDArrays


@dataclass(frozen=True)
class Round:
    """A request to train, and the examples that it is about.

    Attributes:
        request: to train.
        terms: of it.
        section: the mechanism.
        config: of the request.
        training: the settings of the local training.
        examples: the site's training split.
    """

    request: RecordDict
    terms: Terms
    section: PrivacySection
    config: ConfigRecord
    training: Training
    examples: Examples

    @property
    def address(self) -> Address:
        """Run and round."""
        return self.terms.address

    @property
    def release_request(self) -> ReleaseRequest:
        """What the reply answers.

        Raises:
            SiteError: 414, a value in the request has no canonical text.
        """
        return ReleaseRequest.of(protocol.TRAIN, self.request, self.address, self.section.delta)


class NoisedTraining:
    """Training under differential privacy in one worker."""

    def __init__(self, task: Task, privacy: ChargedReplies) -> None:
        self._task, self._privacy = task, privacy
        self._compatible: set[PrivacySection] = set()

    def require_compatible(self, section: PrivacySection) -> None:
        """Hold the task against a mechanism, once for each: a failure later would have been charged.

        Raises:
            SiteError: 414, the task cannot be learnt under it.
        """
        if section in self._compatible:
            return
        try:
            compatibility.require_compatible(section, self._task)
        except ConfigError as error:
            raise SiteError(414, error.message) from None
        self._compatible.add(section)

    def answer(self, round_: Round, reply: Callable[[MetricRecord], RecordDict]) -> RecordDict:
        """The round's reply: charged, made, kept; or the one that was kept.

        Args:
            round_: the round.
            reply: trains, and makes the reply with these metrics.

        Raises:
            SiteError: 414, the request would reveal more than is charged; 427, 428, see ``ChargedReplies``.
        """
        once = False
        num_examples = 1 if round_.section.hides_sites else len(round_.examples.y)
        if round_.section.mechanism in CENTRAL:
            terms = self._run_release(round_)
            release, once = terms.release, terms.once
        elif round_.section.mechanism == "local":
            _require_weights_only(round_.training)
            release = Release(_noise(round_.section).noise_multiplier)
        else:
            release = self._release(round_)

        def make(spent: Spent) -> RecordDict:
            metrics: dict[str, int | float] = {
                protocol.NUM_EXAMPLES: num_examples,
                **self._privacy.told(spent),
            }
            return self.attach_ledger_digest(reply(MetricRecord({**metrics})))

        section = round_.section
        release_request = round_.release_request
        return self._privacy.answer(
            release_request, section.unit, section.mechanism, release, make, once=once
        )

    def attach_ledger_digest(self, reply: RecordDict) -> RecordDict:
        """Put the ledger's digest into a reply."""
        return self._privacy.attach_ledger_digest(reply)

    def charged(
        self, round_: Round, train: Callable[[], NDArrays] | None
    ) -> tuple[NDArrays | None, float]:
        """Trained weights for a secure sum, charged first; there is no loss to tell, so it is 0.

        A site without examples is charged as with one, and has no weights: else its ledger's digest, by staying the
        same, would tell the server that it is one.
        """
        self._privacy.charge(
            round_.release_request, "example", round_.section.mechanism, self._release(round_)
        )
        return train() if train else None, 0.0

    def noise(self, round_: Round, received: NDArrays) -> tuple[SiteNoise, Callable[[], None]]:
        """The site's part of distributed noise, and what pays for an attempt with it.

        Raises:
            SiteError: 414, the request would reveal more than is charged, or the noise does not fit its grid: at
                once, and not when it was charged.
        """
        _require_weights_only(round_.training)
        terms, min_sites = _noise(round_.section), min_sites_of(round_.request)
        honest = min_sites - round_.section.corrupt_sites
        if honest < 1:
            raise requests.refuse(
                "privacy.corrupt-sites", f"below {min_sites}", round_.section.corrupt_sites
            )
        try:
            distributed.stddev(terms.noise_multiplier, _size(received), honest, MAX_SITES)
        except ValueError as error:
            raise SiteError(414, f"privacy: {error}") from None
        entropy = self._privacy.entropy
        noise = SiteNoise(terms.clipping_bound, terms.noise_multiplier, honest, entropy)

        def charge() -> None:
            release = Release(terms.noise_multiplier)
            self._privacy.charge(round_.release_request, "site", round_.section.mechanism, release)

        return noise, charge

    def add_noise(self, round_: Round, received: NDArrays) -> Callable[[NDArrays | None], NDArrays]:
        """A function that adds all of the noise that hides the site to its update; None is a site without examples.

        Raises:
            SiteError: 414, the noise does not fit its grid: at once, and not when it was charged.
        """
        noise = _noise(round_.section)
        try:
            local.stddev(noise.noise_multiplier, _size(received))
        except ValueError as error:
            raise SiteError(414, f"privacy: {error}") from None
        entropy = self._privacy.entropy

        def noised(trained: NDArrays | None) -> NDArrays:
            return local.noised_weights(
                received, trained, noise.clipping_bound, noise.noise_multiplier, entropy
            )

        return noised

    def train_privately_on(self, network: nn.Module, round_: Round) -> None:
        """Train the loaded network in place."""
        # Only here: Opacus takes seconds to import, which a site without it need not pay.
        from fedge.client.privacy.dp_sgd import train_privately

        train_privately(
            self._task,
            network,
            round_.examples,
            round_.training.settings,
            _noise_of(round_),
            self._privacy.entropy,
            proximal_mu=round_.training.proximal_mu,
        )

    @staticmethod
    def _run_release(round_: Round) -> RunReleases:
        _require_weights_only(round_.training)
        return run_releases(round_.section, requests.rounds(round_.config))

    @staticmethod
    def _release(round_: Round) -> Release:
        _require_weights_only(round_.training)
        if round_.training.settings.mixed_precision != "off":
            raise requests.refuse(
                "mixed-precision",
                "off under differential privacy",
                round_.training.settings.mixed_precision,
            )
        return release_of(
            _noise_of(round_), round_.training.settings, max(1, len(round_.examples.y))
        )


def _size(received: NDArrays) -> int:
    return sum(a.size for a in received.values() if a.dtype.kind == "f")


def _require_weights_only(training: Training) -> None:
    """Hold a request to weights alone: nothing else of the reply has noise."""
    if training.control:
        raise requests.refuse(protocol.CONTROL, "false under differential privacy", True)
    if training.loss_at != "running":
        raise requests.refuse(
            protocol.LOSS_AT, "running under differential privacy", training.loss_at
        )


def _noise_of(round_: Round) -> Noise:
    """The noise of each step of DP-SGD: as configured, or what keeps this site's whole run within epsilon."""
    section = round_.section
    if section.epsilon is None:
        return _noise(section)
    rows, rounds = max(1, len(round_.examples.y)), requests.rounds(round_.config)
    evaluations = None
    if section.metrics_noise_multiplier is not None:
        count = requests.evaluations(round_.config)
        evaluations = Release(section.metrics_noise_multiplier, steps=count)
    try:
        return noise_within(
            section.epsilon,
            section.delta,
            section.clipping_bound,
            round_.training.settings,
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
