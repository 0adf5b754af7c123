"""What a run sums under secure aggregation: statistics before the first round, updates, and evaluations."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedge.server.aggregation.updates import Groups, Summed
from fedge.server.participants import request_content as requests
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.members import Member
from fedge.server.secagg import decoding
from fedge.server.secagg.outcome import Outcome, SumRequest, UnmaskedSum
from fedge.server.secagg.protocol_steps import SecureSum
from fedge.server.secagg.restart_state import RecoveryStore
from fedge.shared import protocol
from fedge.shared.config.federation import Config
from fedge.shared.config.strategies import COMPARING, least_replies
from fedge.shared.errors import RunError
from fedge.shared.preprocessing.steps import Statistics
from fedge.shared.privacy.mechanisms import noised_counts
from fedge.shared.privacy.mechanisms.noised_counts import NoisedCounts
from fedge.shared.secagg import messages, transcript, vector_layout
from fedge.shared.secagg.vector_layout import Bounds, Layout
from fedge.shared.tasks.standardised_columns import column_bounds
from fedge.shared.tasks.task import Task
from fedge.shared.wire.tensors import NDArrays

_log = logging.getLogger(__name__)

_FAILED = 510
#: Sites of a failed sum that are named.
_NAMED = 8

Compose = Callable[[list[Member], ConfigRecord], list[Message]]


@dataclass(frozen=True)
class Trained:
    """What came of a round's updates.

    Attributes:
        result: the mean weights, or one mean a group; None where there is none.
        outcome: of the exchanges.
        facts: for the round's line.
        reason: why there is no sum.
        seen: the first values of one masked vector as it came, and of the mean update that was unmasked.
    """

    result: Summed | Groups | None
    outcome: Outcome
    facts: dict[str, Any]
    reason: str | None
    seen: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Counters:
    """What an evaluation counts.

    Attributes:
        purpose: of the sum.
        names: of the counters where they have no noise.
        noised: how they get noise; None where they have none.
    """

    purpose: transcript.Purpose
    names: tuple[str, ...]
    noised: NoisedCounts | None

    @property
    def summed(self) -> tuple[str, ...]:
        """Names of those that are in the sum."""
        return self.names if self.noised is None else self.noised.reported


class SecureSums:
    """The secure sums of one run.

    Args:
        member_exchange: to its members.
        recovery: what a restart needs, of its run directory.
        config: with ``secure-aggregation.enabled``.
        task: of the run.
    """

    def __init__(
        self, member_exchange: MemberExchange, recovery: RecoveryStore, config: Config, task: Task
    ) -> None:
        section = config.secure_aggregation
        self._member_exchange, self._config, self._task = member_exchange, config, task
        self._private = config.privacy.mechanism
        self._sum = SecureSum(
            member_exchange,
            recovery,
            min_sites=section.min_sites,
            attempts=section.attempts,
            deadline=section.deadline,
        )
        network = task.network()
        state = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        self._shapes = {n: a.shape for n, a in state.items() if a.dtype.kind == "f"}
        self._parameters = [n for n, _ in network.named_parameters(remove_duplicate=False)]
        self._bounds = Bounds(
            section.clipping_bound,
            section.value_bound,
            section.state_bound,
            section.weight_cap,
        )

    def train(
        self,
        server_round: int,
        asked: list[Member],
        compose: Compose,
        current: NDArrays,
        *,
        control: bool,
    ) -> Trained:
        """Sum the updates of a round.

        Args:
            server_round: from 1.
            asked: members that are invited.
            compose: makes the requests for some of them, with the record of an attempt.
            current: the round's weights.
            control: SCAFFOLD's changes of the control variates are summed too.

        """
        layout = self._layout(control=control)
        divide = partial(self._groups, server_round)
        outcome = self._run(server_round, "train", layout, asked, divide, compose)
        groups = self._config.secure_aggregation.groups
        sums: list[Summed] = []
        facts = _facts(outcome)
        for unmasked in outcome.unmasked_sums:
            try:
                made, counted = self._mean(layout, unmasked, current)
            except RunError as error:
                outcome.failed.append(f"{', '.join(unmasked.sites[:_NAMED])}: {error}")
                continue
            sums.append(made)
            for name in (vector_layout.CLIPPED, vector_layout.CAPPED, vector_layout.SATURATED):
                facts[name] = facts.get(name, 0) + int(counted.get(name, 0))
        facts["groups"] = [list(s.sites) for s in sums]
        facts["groups_failed"] = groups - len(sums)
        words = "; ".join(outcome.failed)[:400]
        if len(sums) < (least := self._least(groups)):
            reason = f"FE-{_FAILED} secure sums: must be {least}, got {len(sums)} ({words})"
            return Trained(None, outcome, facts, reason)
        if len(sums) < groups:
            # What a robust statistic is for: a bad group is left out, and the others are compared.
            _log.warning("round %d: goes on without a group (%s)", server_round, words)
        self._warn(server_round, facts)
        result = sums[0] if groups == 1 else Groups(tuple(sums))
        return Trained(result, outcome, facts, None, _seen(layout, outcome, sums[0], current))

    def _layout(self, *, control: bool) -> Layout:
        if self._private == "distributed":
            bound = self._config.privacy.clipping_bound
            return vector_layout.of_noised(self._shapes, self._parameters, bound)
        return vector_layout.of_training(
            self._shapes, self._parameters, self._bounds, control=control
        )

    def _mean(
        self, layout: Layout, unmasked: UnmaskedSum, current: NDArrays
    ) -> tuple[Summed, Mapping[str, float]]:
        if self._private == "distributed":
            return decoding.noised_mean(layout, unmasked, current), {}
        found, counted = decoding.mean_weights(
            layout, unmasked, self._bounds, current, self._config.admission
        )
        # Under DP-SGD the sites tell no loss, so that its sum is 0.
        return (found if self._private == "off" else replace(found, loss_total=None)), counted

    def _least(self, groups: int) -> int:
        """Sums without which a round makes no model."""
        chosen = self._config.strategy
        return least_replies(chosen) if isinstance(chosen, COMPARING) else groups

    @staticmethod
    def _warn(server_round: int, facts: dict[str, Any]) -> None:
        """Say where bounds have changed what the sites learnt: the model is then not the plain one."""
        cut = {
            name: facts[name]
            for name in (vector_layout.CLIPPED, vector_layout.SATURATED)
            if facts.get(name)
        }
        if cut:
            told = ", ".join(f"{name} {count}" for name, count in cut.items())
            _log.warning("round %d: bounds have changed updates (%s)", server_round, told)

    def evaluate(
        self,
        server_round: int,
        asked: list[Member],
        compose: Compose,
        counters: Counters | None = None,
    ) -> tuple[dict[str, float] | None, Outcome]:
        """Sum counters over the members' examples; None where the sum is not unmasked.

        Args:
            server_round: of the run.
            asked: members that are invited.
            compose: makes the requests for some of them, with the record of an attempt.
            counters: what is counted; the task's counters over test examples unless given.
        """
        counters = counters or Counters("evaluate", self._task.counter_names, self.noised_counts())
        names, noised = counters.summed, counters.noised
        layout = vector_layout.of_evaluation(names, noised=noised is not None)
        outcome = self._run(server_round, counters.purpose, layout, asked, _together, compose)
        for unmasked in outcome.unmasked_sums:
            try:
                counted = decoding.counted(layout, unmasked)
            except RunError as error:
                outcome.failed.append(str(error))
                continue
            return vector_layout.from_task_counters(counted, names), outcome
        return None, outcome

    def noised_counts(
        self, names: Sequence[str] | None = None, sensitivity: float | None = None
    ) -> NoisedCounts | None:
        """How each site's counters leave it, the task's unless named; None where they have no noise."""
        honest = 1
        if self._private == "distributed":
            least, corrupt = (
                self._config.secure_aggregation.min_sites,
                self._config.privacy.corrupt_sites,
            )
            honest = max(1, least - corrupt)
        names = self._task.counter_names if names is None else names
        return noised_counts.plan(self._config.privacy, names, honest, sensitivity)

    def attempts(self, purpose: transcript.Purpose, server_round: int) -> int:
        """How many were made at a round's sum, those before a restart of the coordinator too."""
        return self._sum.attempts(purpose, server_round)

    def statistics(self, asked: list[Member]) -> Statistics:
        """Sum what standardisation needs over the members' training examples.

        Raises:
            RunError: 510, the sum could not be unmasked, or is of no examples.
        """
        bounds = column_bounds(self._task)
        layout = vector_layout.of_statistics(len(bounds))

        def compose(members: list[Member], secure: ConfigRecord) -> list[Message]:
            address = requests.address(
                self._member_exchange.run_id, 0, self._task.name, len(members)
            )
            if self._config.privacy.mechanism != "off":
                address[protocol.PRIVACY] = self._config.privacy.model_dump_json(by_alias=True)
            content = RecordDict(
                {protocol.CONFIG: ConfigRecord({**address}), messages.SECURE: secure}
            )
            deadline = self._config.round.deadline
            return [requests.message(content, m, messages.STATISTICS, 0, deadline) for m in members]

        outcome = self._run(0, "statistics", layout, asked, _together, compose)
        if not outcome.unmasked_sums:
            # What is left of it opens nothing any more: a run that is resumed asks anew, and who has signed refuses.
            self.settled()
            raise RunError(_FAILED, f"statistics: must be summed, got {'; '.join(outcome.failed)}")
        counted = decoding.counted(layout, outcome.unmasked_sums[0])
        if not counted[vector_layout.EXAMPLES]:
            raise RunError(_FAILED, "statistics: must be of 1 example or more, got none")
        units = np.array([bound.unit for bound in bounds])
        kinds = (protocol.FEATURE_TOTAL, protocol.FEATURE_TOTAL_OF_SQUARES)
        total, squares = (
            np.array([counted[f"{kind}-{column}"] for column in range(len(bounds))])
            for kind in kinds
        )
        return Statistics(
            int(counted[vector_layout.EXAMPLES]),
            tuple((total * units).tolist()),
            tuple((squares * units**2).tolist()),
        )

    def settled(self) -> None:
        """What the sums of a round gave is in the journal: nothing of them is kept any longer."""
        self._sum.settled()

    def _run(
        self,
        server_round: int,
        purpose: transcript.Purpose,
        layout: Layout,
        asked: list[Member],
        divide: Callable[[list[Member]], list[list[Member]]],
        compose: Compose,
    ) -> Outcome:
        def begin(members: list[Member], number: int) -> list[Message]:
            return compose(members, self._record(number))

        request = SumRequest(purpose, server_round, layout.shape, begin)
        return self._sum.run(request, asked, divide)

    def _record(self, number: int) -> ConfigRecord:
        least = {messages.MIN_SITES: self._config.secure_aggregation.min_sites}
        return messages.record(
            {
                **(least if self._private == "distributed" else {}),
                messages.PROTOCOL: transcript.VERSION,
                messages.ATTEMPT: number,
                messages.CLIPPING_BOUND: self._bounds.clipping_bound,
                messages.VALUE_BOUND: self._bounds.value_bound,
                messages.STATE_BOUND: self._bounds.state_bound,
                messages.WEIGHT_CAP: self._bounds.weight_cap,
            }
        )

    def _groups(self, server_round: int, asked: list[Member]) -> list[list[Member]]:
        """Divide the members at random into groups of nearly one size, differently each round."""
        count = self._config.secure_aggregation.groups
        if count == 1:
            return [asked]
        words = f"fedge groups {self._config.run.seed} {server_round}".encode()
        drawn = sorted(asked, key=lambda m: m.site)
        random.Random(hashlib.sha256(words).digest()).shuffle(drawn)  # noqa: S311 - reproducible by intent
        return [sorted(drawn[i::count], key=lambda m: m.site) for i in range(count)]


def _together(asked: list[Member]) -> list[list[Member]]:
    """All in one group."""
    return [asked]


def _facts(outcome: Outcome) -> dict[str, Any]:
    """What the round's line says of a secure sum."""
    first = outcome.unmasked_sums[0] if outcome.unmasked_sums else None
    return {
        "attempts": outcome.attempts,
        "threshold": first.threshold if first else None,
        "lost": outcome.lost,
    }


def _seen(
    layout: Layout, outcome: Outcome, unmasked: Summed, current: NDArrays
) -> dict[str, list[float]]:
    update = decoding.sample(layout, unmasked, current)
    return {"masked": [float(v) for v in outcome.sample[: len(update)]], "opened": update}
