"""A round of training under differential privacy, from the request to what leaves the site, by mechanism."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flwr.app import RecordDict

from fedge.client import requests
from fedge.client.privacy.noising import PrivateWork, Round
from fedge.client.secagg.participant import is_secure
from fedge.client.secagg.secure_sums import SecureSums
from fedge.client.training.learner import Learner
from fedge.shared.config.privacy import CENTRAL
from fedge.shared.wire.tensors import NDArrays


class PrivateRounds:
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
        work: PrivateWork,
        secure: SecureSums,
        reply: Callable[..., RecordDict],
    ) -> None:
        self._learner, self._work, self._secure, self._reply = learner, work, secure, reply

    def answer(self, of: Round, received: NDArrays) -> RecordDict:
        """The reply to a round under any mechanism but ``off``.

        Args:
            of: the round.
            received: its weights.

        Raises:
            SiteError: 414, what is asked for would tell more than is charged; 401, 427, 428.
        """
        self._work.require_fit(of.section)
        if of.section.mechanism == "distributed":
            return self._under_masks(of, received)
        if of.section.mechanism == "example":
            return self._by_example(of, received)
        if is_secure(of.request):
            raise requests.refuse(
                "privacy.mechanism", "distributed under masks", of.section.mechanism
            )
        if of.section.mechanism in CENTRAL:
            # Plain training: it is the server that clips, and adds the noise.
            return self._told(of, partial(self._fitted, of, received))
        cover = self._work.cover(of, received)
        return self._told(
            of, lambda: cover(self._fitted(of, received) if len(of.examples.y) else None)
        )

    def _by_example(self, of: Round, received: NDArrays) -> RecordDict:
        def trained() -> NDArrays:
            self._learner.load(received)
            self._work.take_steps(self._learner.network, of)
            return self._learner.weights(of.address.server_round)

        if not is_secure(of.request):
            return self._told(of, trained)
        rows = len(of.examples.y)
        fitted = partial(self._work.charged, of, trained) if rows else None
        # Neither the loss nor how many examples there are is told.
        bundle = self._secure.train(
            of.request, of.terms, of.what, received, fitted, rows, private=True
        )
        return self._work.vouch(self._reply(of.address, bundle))

    def _under_masks(self, of: Round, received: NDArrays) -> RecordDict:
        """Plain training, whose update gets its part of the noise under the mask."""
        if not is_secure(of.request):
            raise requests.refuse("privacy.mechanism", "distributed under masks only", "in clear")
        noise, charge = self._work.noise(of, received)
        fitted = partial(self._fitted, of, received) if len(of.examples.y) else None
        bundle = self._secure.train_noised(of.request, of.terms, received, fitted, noise, charge)
        return self._work.vouch(self._reply(of.address, bundle))

    def _told(self, of: Round, trained: Callable[[], NDArrays]) -> RecordDict:
        return self._work.answer(of, lambda metrics: self._reply(of.address, metrics, trained()))

    def _fitted(self, of: Round, received: NDArrays) -> NDArrays:
        """Trained weights; the loss is not told."""
        return self._learner.train(of.terms, of.what, received, of.examples)[0]
