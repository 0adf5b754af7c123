"""The five exchanges with all sites of a sum, tried again with new keys where too few are left.

Whoever is lost at an exchange is out for the attempt and asked again at the next; after the last exchange has begun
there is no next, as sites answer a round once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedge.server.admission.reply_fields import ledger_of
from fedge.server.admission.validation_result import Rejection, printable, reported, reported_words
from fedge.server.participants import request_content as requests
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.members import Member
from fedge.server.secagg.attempt import STEPS, GroupAttempt, lost_at
from fedge.server.secagg.group import Group, LostError
from fedge.server.secagg.outcome import NAMES, SAMPLE, Outcome, SumRequest, UnmaskedSum
from fedge.server.secagg.restart_state import RecoveryStore
from fedge.server.transport.exchange import Exchange, no_reply_reason
from fedge.shared import protocol
from fedge.shared.failpoints import reach
from fedge.shared.secagg import messages, request_digest, transcript
from fedge.shared.secagg.transcript import MIN_SITES, Attempt, KeyAdvertisement

_log = logging.getLogger(__name__)

_UNTRUSTED = 421
#: With which a site may find fault with a peer: its entry in the roster, its signatures, its share.
_FAULTS = (_UNTRUSTED, 422, 425)


class _FaultFoundError(ValueError):
    """A site finds fault with a peer, by the number that it gives; any other number stands for a malformed reply."""

    def __init__(self, why: str, code: object) -> None:
        super().__init__(why)
        self.code = code if type(code) is int and code in _FAULTS else 411


class SecureSum:
    """Runs sums over members.

    Args:
        member_exchange: to the members.
        recovery: what a restart needs, of the run.
        min_sites: fewest sites of a sum.
        attempts: at a sum.
        deadline: seconds for each exchange after the first.
    """

    def __init__(
        self,
        member_exchange: MemberExchange,
        recovery: RecoveryStore,
        *,
        min_sites: int,
        attempts: int,
        deadline: float,
    ) -> None:
        self._member_exchange, self._recovery = member_exchange, recovery
        self._min_sites = max(min_sites, MIN_SITES)
        self._attempts, self._deadline = attempts, deadline
        # Sites that the sites' rosters do not trust: that does not change from one sum to the next.
        self._untrusted: set[str] = set()

    def run(self, begin: SumRequest, groups: Sequence[list[Member]]) -> Outcome:
        """Sum over each group of members.

        Raises:
            RunError: 501, the SuperLink does not answer; 504, what a restart needs is damaged.
        """
        outcome = Outcome()
        members = {m.site: m for some in groups for m in some}
        kept = self._recovery.kept(self._member_exchange.run_id, begin.purpose, begin.server_round)
        done = {site for group in kept for site in group.bundles}
        if kept:
            _log.info("round %d: %d kept sums are opened", begin.server_round, len(kept))
            outcome.attempts = max(group.attempt.number for group in kept)
            self._tell_lost(groups, kept, outcome)
            self._open(begin, kept, members, outcome)
        left = [list(some) for some in groups if not any(m.site in done for m in some)]
        left = [self._trusted_members(some, outcome) for some in left]
        tried = 0
        while tried < self._attempts:
            # A sum that was about to be unmasked and was not is lost for good: then no other is unmasked for nothing.
            if not left or len(outcome.unmasked_sums) < len(kept):
                break
            if few := [len(some) for some in left if len(some) < self._min_sites]:
                outcome.failed.append(f"sites: must be at least {self._min_sites}, got {few[0]}")
                break
            if outcome.failed:
                _log.warning(
                    "round %d: %s; tried again", begin.server_round, "; ".join(outcome.failed)
                )
            number = self._recovery.next_attempt(begin.purpose, begin.server_round)
            outcome.attempts += 1
            outcome.failed = []
            known = len(self._untrusted)
            committed, left = self._attempt(begin, number, left, outcome)
            # Each site that is found out this way costs an attempt, so those are not counted; there are only so many.
            tried += len(self._untrusted) == known
            if committed:
                self._recovery.keep(committed)
                kept += committed
                reach("before-unmask", begin.server_round)
                self._open(begin, committed, members, outcome)
        return outcome

    def attempts(self, purpose: transcript.Purpose, server_round: int) -> int:
        """How many were made at a round's sum, in all."""
        return self._recovery.attempts(purpose, server_round)

    def _trusted_members(self, some: list[Member], outcome: Outcome) -> list[Member]:
        """The members without those that no roster trusts."""
        for member in some:
            if member.site in self._untrusted:
                why = "left out, as no roster vouches for it"
                self._lose(outcome, member.site, "begin", why, _UNTRUSTED)
        return [m for m in some if m.site not in self._untrusted]

    def settled(self) -> None:
        """What the sums gave is in the journal, or is lost: nothing of them is needed any more."""
        self._recovery.drop()

    def _tell_lost(
        self, groups: Sequence[list[Member]], kept: Sequence[Group], outcome: Outcome
    ) -> None:
        """Note whom kept sums are without; why, only the coordinator knew that has ended."""
        for some in groups:
            group = next((g for g in kept if any(m.site in g.bundles for m in some)), None)
            for site in (m.site for m in some if group is not None):
                if exchange := lost_at(group, site):
                    why = "lost before the coordinator was restarted"
                    self._lose(outcome, site, exchange, why, 409, "absent")

    def _attempt(
        self, begin: SumRequest, number: int, groups: list[list[Member]], outcome: Outcome
    ) -> tuple[list[Group], list[list[Member]]]:
        """Exchanges 0 to 3.

        Returns:
            Groups whose survivors have signed, and the members of those that are to be tried again.
        """
        everybody = [m for some in groups for m in some]
        asked = begin.messages(everybody, number)
        purpose, server_round = begin.purpose, begin.server_round
        attempt = Attempt(
            request_digest.digest(messages.BEGIN[purpose], asked[0].content),
            self._member_exchange.run_id,
            purpose,
            server_round,
            number,
        )
        if purpose == "train":
            reach("before-dispatch", server_round)
        phase = purpose if purpose != "statistics" else "sum"
        result = self._member_exchange.ask(server_round, phase, everybody, asked)
        if purpose == "train":
            reach("all-received", server_round)
        bundles: dict[str, KeyAdvertisement] = {}

        def take(site: str, content: RecordDict) -> None:
            values = messages.values_of(content)
            raw = messages.data(values, messages.BUNDLE, 256, 1)
            (bundle,) = transcript.unpack_advertisements(raw)
            if bundle.site != site:
                raise ValueError(f"bundle: must be of {site}, got {bundle.site}")
            bundles[site] = bundle
            if ledger := ledger_of(content):
                outcome.ledgers[site] = ledger

        self._hear(result, everybody, "begin", outcome, take)
        open_groups: list[GroupAttempt] = []
        for some in groups:
            there = {m.site: bundles[m.site] for m in some if m.site in bundles}
            trial = GroupAttempt(some, None)
            if len(there) >= self._min_sites:
                trial.group = Group(attempt, begin.length, there)
            else:
                trial.failed = (
                    f"begin: must be answered by {self._min_sites} sites, got {len(there)}"
                )
            open_groups.append(trial)
        for kind, told, hear in STEPS:
            self._step(begin, kind, told, hear, open_groups, outcome)
        committed = [t.group for t in open_groups if t.group is not None]
        again: list[list[Member]] = []
        for trial in open_groups:
            if trial.group is None:
                outcome.failed.append(trial.failed)
                again.append([m for m in trial.members if m.site not in trial.excluded])
        return committed, again

    def _step(
        self,
        begin: SumRequest,
        kind: str,
        told: Callable[[Group, str], Mapping[str, bytes]],
        hear: Callable[[Group, str, RecordDict], object],
        trials: list[GroupAttempt],
        outcome: Outcome,
    ) -> None:
        """One exchange with all groups that are still in it."""
        members: list[Member] = []
        asked: list[Message] = []
        by_site: dict[str, GroupAttempt] = {}
        for trial in trials:
            if trial.group is None:
                continue
            left = trial.left(kind)
            for member in (m for m in trial.members if m.site in left):
                members.append(member)
                by_site[member.site] = trial
                asked.append(
                    self._message(kind, trial.group, told(trial.group, member.site), member)
                )
        if not asked:
            return
        result = self._member_exchange.ask(
            begin.server_round, NAMES[kind], members, asked, deadline=self._deadline
        )

        def take(site: str, content: RecordDict) -> None:
            group = by_site[site].group
            values = content.get(messages.SECURE)
            if isinstance(values, ConfigRecord) and messages.BLAMED in values:
                peer = str(values.get(messages.BLAMED))
                by_site[site].blames.setdefault(peer, set()).add(site)
                if values.get(messages.CODE) == _UNTRUSTED:
                    by_site[site].untrusted.add(peer)
                why = f"finds fault with {printable(peer)}, {_code(values)}"
                raise _FaultFoundError(why, values.get(messages.CODE))
            if group is not None:
                heard = hear(group, site, content)
                if isinstance(heard, np.ndarray) and not outcome.sample:
                    outcome.sample = heard[:SAMPLE].tolist()

        self._hear(result, members, NAMES[kind], outcome, take)
        for trial in {id(t): t for t in by_site.values()}.values():
            if trial.group is not None and kind == messages.MASKED:
                for site, why in trial.group.add_masked().items():
                    self._lose(outcome, site, NAMES[kind], why, 411)
            for peer in trial.check(kind, self._min_sites):
                count = len(trial.blames[peer])
                if count > 1 and peer in trial.untrusted:
                    self._untrusted.add(peer)
                who = "1 site finds" if count == 1 else f"{count} sites find"
                codes = [
                    outcome.out[by].code for by in sorted(trial.blames[peer]) if by in outcome.out
                ]
                code = max(sorted(set(codes), reverse=True), key=codes.count, default=411)
                why = f"left out, as {who} fault with it"
                self._lose(outcome, peer, NAMES[kind], why, code)

    def _open(
        self,
        begin: SumRequest,
        groups: list[Group],
        members: Mapping[str, Member],
        outcome: Outcome,
    ) -> None:
        """Exchange 4, and the sums."""
        asked: list[Message] = []
        whom: list[Member] = []
        by_site: dict[str, Group] = {}
        for group in groups:
            for site in group.survivors:
                if site in members:
                    whom.append(members[site])
                    by_site[site] = group
                    asked.append(
                        self._message(messages.UNMASK, group, group.unmask_values(), members[site])
                    )
        result = self._member_exchange.ask(
            begin.server_round, NAMES[messages.UNMASK], whom, asked, deadline=self._deadline
        )

        def take(site: str, content: RecordDict) -> None:
            by_site[site].take_unmask(site, messages.values_of(content))

        self._hear(result, whom, NAMES[messages.UNMASK], outcome, take)
        for group in groups:
            try:
                group.require(group.shares, NAMES[messages.UNMASK])
                total, wrong = group.unmask()
            except LostError as error:
                outcome.failed.append(str(error))
                continue
            for site in sorted(wrong):
                self._lose(outcome, site, "unmask", "its shares are not those it was given")
            outcome.unmasked_sums.append(
                UnmaskedSum(tuple(group.survivors), len(group.sharers), group.threshold, total)
            )

    def _message(
        self, kind: str, group: Group, values: Mapping[str, bytes], member: Member
    ) -> Message:
        config, a = self._member_exchange.config, group.attempt
        address = requests.address(a.run_id, a.server_round, config.task.name, len(group.bundles))
        secure = messages.record(
            {messages.PURPOSE: a.purpose, messages.ATTEMPT: a.number, **values}
        )
        content = RecordDict({protocol.CONFIG: ConfigRecord({**address}), messages.SECURE: secure})
        return requests.message(content, member, kind, a.server_round, self._deadline)

    def _hear(
        self,
        result: Exchange,
        asked: Sequence[Member],
        exchange: str,
        outcome: Outcome,
        take: Callable[[str, RecordDict], None],
    ) -> None:
        """Take every reply; note who is lost, and why."""
        outcome.sent += result.sent
        outcome.received += result.received
        deadline = (
            self._member_exchange.config.round.deadline if exchange == "begin" else self._deadline
        )
        for member in asked:
            reply = result.replies.get(member.node_id)
            if reply is None:
                why, code, how = no_reply_reason(result, member.node_id, deadline), 409, "absent"
                if member.node_id in result.late:
                    why, code, how = f"reply after the deadline of {deadline:g} s", 408, "late"
                self._lose(outcome, member.site, exchange, why, code, how)
            elif reply.has_error():
                words = reported_words(reply.error)
                self._lose(
                    outcome, member.site, exchange, words, reported(reply.error) or 410, "error"
                )
            else:
                try:
                    _require_answer(reply.content, member.site, self._member_exchange.run_id)
                    take(member.site, reply.content)
                except ValueError as error:
                    code = error.code if isinstance(error, _FaultFoundError) else 411
                    self._lose(outcome, member.site, exchange, printable(str(error), 160), code)

    def _lose(
        self,
        outcome: Outcome,
        site: str,
        exchange: str,
        why: str,
        code: int = 411,
        how: Any = "rejected",
    ) -> None:
        _log.warning("%s is lost at %s: %s", site, exchange, why)
        outcome.lost.append(
            {"site": site, "exchange": exchange, "attempt": outcome.attempts, "reason": why}
        )
        code = code if how != "error" else 410
        outcome.out[site] = Rejection(site, code, how, f"{exchange}: {why}")


def _require_answer(content: RecordDict, site: str, run_id: str) -> None:
    config = content.get(protocol.CONFIG)
    if not isinstance(config, ConfigRecord):
        raise ValueError(f"must hold a {protocol.CONFIG} record, got none")
    if (config.get(protocol.SITE), config.get(protocol.RUN_ID)) != (site, run_id):
        raise ValueError("must answer as this site in this run, got another")


def _code(values: ConfigRecord) -> str:
    code = values.get(messages.CODE)
    return f"FE-{code}" if type(code) is int and 400 <= code < 500 else "without a number"
