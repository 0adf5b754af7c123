"""A round of training under differential privacy, from the request to what leaves the site, by mechanism."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flwr.app import RecordDict

from fedge.client import requests
from fedge.client.privacy.noising import NoisedTraining, Round
from fedge.client.secagg.participant import is_secure
from fedge.client.secagg.secure_sums import SecureSums
from fedge.client.training.learner import Learner
from fedge.shared.config.privacy import CENTRAL
from fedge.shared.wire.tensors import NDArrays


class TrainingByMechanism:
    """Training under differential privacy of one worker.

    Args:
        learner: the site's.
        work: charges, noise, and what was answered before.
        secure: the site's secure sums.
        reply: makes one of an address, values and arrays.
    """

    def __init__(
        self,
        learner: Learner,
        work: NoisedTraining,
        secure: SecureSums,
        reply: Callable[..., RecordDict],
    ) -> None:
        self._learner, self._work, self._secure, self._reply = learner, work, secure, reply

    def answer(self, round_: Round, received: NDArrays) -> RecordDict:
        """The reply to a round under any mechanism but ``off``.

        Args:
            round_: the round.
            received: its weights.

        Raises:
            SiteError: 414, the request would reveal more than is charged; 401, 427, 428.
        """
        self._work.require_compatible(round_.section)
        if round_.section.mechanism == "distributed":
            return self._distributed(round_, received)
        if round_.section.mechanism == "example":
            return self._dp_sgd(round_, received)
        if is_secure(round_.request):
            raise requests.refuse(
                "privacy.mechanism",
                "distributed under secure aggregation",
                round_.section.mechanism,
            )
        if round_.section.mechanism in CENTRAL:
            # Plain training: it is the server that clips, and adds the noise.
            return self._charged_reply(round_, partial(self._trained_weights, round_, received))
        add_noise = self._work.add_noise(round_, received)
        return self._charged_reply(
            round_,
            lambda: add_noise(
                self._trained_weights(round_, received) if len(round_.examples.y) else None
            ),
        )

    def _dp_sgd(self, round_: Round, received: NDArrays) -> RecordDict:
        def trained() -> NDArrays:
            self._learner.load(received)
            self._work.train_privately_on(self._learner.network, round_)
            return self._learner.weights(round_.address.server_round)

        if not is_secure(round_.request):
            return self._charged_reply(round_, trained)
        rows = len(round_.examples.y)
        fitted = partial(self._work.charged, round_, trained if rows else None)
        # Neither the loss nor how many examples there are is told.
        bundle = self._secure.train(
            round_.request, round_.terms, round_.training, received, fitted, rows, private=True
        )
        return self._work.attach_ledger_digest(self._reply(round_.address, bundle))

    def _distributed(self, round_: Round, received: NDArrays) -> RecordDict:
        """Plain training, whose update gets its part of the noise under the mask."""
        if not is_secure(round_.request):
            raise requests.refuse(
                "privacy.mechanism", "distributed under secure aggregation only", "in clear"
            )
        noise, charge = self._work.noise(round_, received)
        fitted = (
            partial(self._trained_weights, round_, received) if len(round_.examples.y) else None
        )
        bundle = self._secure.train_noised(
            round_.request, round_.terms, received, fitted, noise, charge
        )
        return self._work.attach_ledger_digest(self._reply(round_.address, bundle))

    def _charged_reply(self, round_: Round, trained: Callable[[], NDArrays]) -> RecordDict:
        return self._work.answer(
            round_, lambda metrics: self._reply(round_.address, metrics, trained())
        )

    def _trained_weights(self, round_: Round, received: NDArrays) -> NDArrays:
        """Trained weights; the loss is not told."""
        return self._learner.train(round_.terms, round_.training, received, round_.examples)[0]
