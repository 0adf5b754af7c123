"""Between the worker and the exchanges: what the site computes becomes what it adds under a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from flwr.app import ConfigRecord, RecordDict

from fedge.client.requests import Address, Terms, Training
from fedge.client.secagg import input_vector, participant
from fedge.client.secagg.input_vector import InputVector, SiteNoise
from fedge.client.secagg.participant import Participant
from fedge.client.secagg.replay_guard import ReplayGuard
from fedge.client.secagg.session import Anchors
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.preprocessing.steps import Statistics
from fedge.shared.secagg import messages, vector_layout
from fedge.shared.secagg import request_digest as request_digests
from fedge.shared.tasks.standardised_columns import column_bounds
from fedge.shared.tasks.task import Task
from fedge.shared.wire.tensors import NDArrays

_REFUSED: Final = 418
#: Folder of a site's home that says which rounds were answered.
FOLDER: Final = "secagg"


class SecureSums:
    """The secure sums of one worker.

    Args:
        task: what is learnt.
        shapes: of the network's floating-point tensors, in its order.
        parameters: names of those that are trained.
        anchors: the site's own; without them it takes part in nothing.
        home: folder of this site alone.
    """

    def __init__(
        self,
        task: Task,
        shapes: Mapping[str, tuple[int, ...]],
        parameters: Sequence[str],
        anchors: Anchors | None,
        home: Path,
    ) -> None:
        self._task, self._shapes, self._parameters = task, shapes, parameters
        self._answers = Participant(anchors, ReplayGuard(home / FOLDER)) if anchors else None
        self._trained: tuple[bytes, int, InputVector] | None = None

    def require(self) -> Participant:
        """The site's sums.

        Raises:
            SiteError: 418, the site has no roster, so it cannot take part.
        """
        if self._answers is None:
            raise SiteError(_REFUSED, "secure aggregation: must have a roster here, got none")
        return self._answers

    def train(
        self,
        request: RecordDict,
        terms: Terms,
        training: Training,
        received: NDArrays,
        fit: Callable[[], tuple[NDArrays | None, float]] | None,
        num_examples: int,
        *,
        private: bool = False,
    ) -> ConfigRecord:
        """Begin the sum of a round's updates; a further attempt at the same round does not train again.

        Args:
            request: to train.
            terms: of it.
            training: the training that the request asks for.
            received: its weights.
            fit: trains, and gives weights and loss; it or the weights are None where the site has no examples.
            num_examples: that it trains on.
            private: the weights are noised, and neither loss nor number of examples may be reported.
        """
        bounds = participant.bounds_of(request)
        request_digest = request_digests.digest(protocol.TRAIN, request)

        def contribute() -> InputVector:
            last_trained = self._trained
            if last_trained is not None and last_trained[:2] == (
                request_digest,
                training.accepted_round,
            ):
                return last_trained[2]
            layout = vector_layout.of_training(
                self._shapes, self._parameters, bounds, control=training.control
            )
            trained, loss = fit() if fit else (None, 0.0)
            vector = input_vector.training(
                layout, bounds, received, trained, num_examples, loss, private=private
            )
            self._trained = (request_digest, training.accepted_round, vector)
            return vector

        return self.require().begin(protocol.TRAIN, request, terms.address, terms.seed, contribute)

    def train_noised(
        self,
        request: RecordDict,
        terms: Terms,
        received: NDArrays,
        fit: Callable[[], NDArrays] | None,
        noise: SiteNoise,
        charge: Callable[[], None],
    ) -> ConfigRecord:
        """Begin the sum of a round's updates with distributed noise.

        Args:
            request: to train.
            terms: of it.
            received: its weights.
            fit: trains, and gives the weights; None where the site has no examples.
            noise: the site's.
            charge: pays for an attempt, each of which has noise of its own.

        Raises:
            SiteError: 427, the budget would be exceeded, and the site begins nothing.
        """
        layout = vector_layout.of_noised(self._shapes, self._parameters, noise.clipping_bound)
        request_digest = request_digests.digest(protocol.TRAIN, request)
        least = participant.min_sites_of(request)

        def contribute() -> InputVector:
            charge()
            last_trained = self._trained
            if last_trained is not None and last_trained[:2] == (request_digest, 0):
                return last_trained[2]
            vector = input_vector.noised(layout, noise, received, fit() if fit else None)
            self._trained = (request_digest, 0, vector)
            return vector

        return self.require().begin(
            protocol.TRAIN, request, terms.address, terms.seed, contribute, least
        )

    def evaluate(
        self,
        request: RecordDict,
        terms: Terms,
        kind: str,
        names: Sequence[str],
        count: Callable[[], Mapping[str, float]],
        *,
        noised: bool = False,
        min_sites: int = 0,
    ) -> ConfigRecord:
        """Begin the sum of counters.

        Args:
            request: to evaluate, calibrate or qualify.
            terms: of it.
            kind: its message type.
            names: of the counters, in the order of the vector.
            count: the counters; where there is noise, with new noise that is charged each time.
            noised: whether there is.
            min_sites: fewest sites whose noise together hides each; 0 where there is none.

        Raises:
            SiteError: 427, the budget would be exceeded, and the site begins nothing.
        """
        layout = vector_layout.of_evaluation(tuple(names), noised=noised)

        def contribute() -> InputVector:
            found = count()
            return input_vector.evaluation(layout, {n: found[n] for n in names})

        return self.require().begin(
            kind, request, terms.address, terms.seed, contribute, min_sites, exact=not noised
        )

    def statistics(
        self,
        request: RecordDict,
        address: Address,
        found: Statistics | None,
        *,
        hides_site: bool,
    ) -> ConfigRecord:
        """Begin the sum over standardised columns; see ``input_vector.statistics``."""
        bounds = column_bounds(self._task)
        layout = vector_layout.of_statistics(len(bounds))
        return self.require().begin(
            messages.STATISTICS,
            request,
            address,
            0,
            lambda: input_vector.statistics(layout, found, bounds, hides_site=hides_site),
        )

    def step(self, kind: str, request: RecordDict, address: Address) -> RecordDict:
        """Exchanges 1 to 4."""
        return self.require().step(kind, request, address)
