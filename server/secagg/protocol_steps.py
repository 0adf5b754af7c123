"""The five exchanges with all sites of a sum, tried again with new keys where too few are left.

Whoever is lost at an exchange is out for the attempt and asked again at the next. Once the list of survivors has been
sent out there is no next, as a site that signed it has answered the round: exchange 3 itself is asked again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedge.server.admission.reply_fields import ledger_of
from fedge.server.admission.validation_result import printable
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.members import Member
from fedge.server.secagg.attempt import STEPS, GroupAttempt, is_agreed, lost_at
from fedge.server.secagg.group import Group, LostError
from fedge.server.secagg.outcome import NAMES, SAMPLE, Outcome, SumRequest, UnmaskedSum
from fedge.server.secagg.restart_state import RecoveryStore
from fedge.server.secagg.sum_exchange import BEGIN, FaultFoundError, SumExchange
from fedge.shared.failpoints import reach
from fedge.shared.secagg import messages, request_digest, transcript
from fedge.shared.secagg.transcript import MIN_SITES, Attempt, KeyAdvertisement

_log = logging.getLogger(__name__)

_UNTRUSTED, _DEVIATES = 421, 422


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
        self._exchange, self._recovery = SumExchange(member_exchange, deadline), recovery
        self._min_sites = max(min_sites, MIN_SITES)
        self._attempts = attempts
        # Of no further sum, by code and reason: who is proved to have dealt wrong shares, and whom so many sites find
        # fault with that an honest one does.
        self._left_out = recovery.left_out()

    def run(
        self,
        begin: SumRequest,
        asked: Sequence[Member],
        divide: Callable[[list[Member]], list[list[Member]]],
    ) -> Outcome:
        """Sum over each group of members.

        Args:
            begin: how the sum begins.
            asked: members that are invited.
            divide: into groups; of those that have been found out in a sum before, none is in any.

        Raises:
            RunError: 501, the SuperLink does not answer; 504, what a restart needs is damaged.
        """
        outcome = Outcome()
        members = {m.site: m for m in asked}
        left = divide(self._members_left(asked, outcome))
        tried, begun, small = 0, 0, list[str]()
        if kept := self._recovery.kept(self._exchange.run_id, begin.purpose, begin.server_round):
            _log.info("round %d: %d kept sums are opened", begin.server_round, len(kept))
            outcome.attempts = max(group.attempt.number for group in kept)
            self._tell_lost(left, kept, outcome)
            opened = self._open(begin, kept, members, outcome)
            begun += len(opened)
            done = {site for group in opened for site in group.bundles}
            left = [some for some in left if not any(m.site in done for m in some)]
        # A sum whose unmasking has begun and failed is lost for good: then no other is unmasked for nothing.
        while tried < self._attempts and begun == len(outcome.unmasked_sums):
            few = [some for some in left if len(some) < self._min_sites]
            small += [f"sites: must be at least {self._min_sites}, got {len(some)}" for some in few]
            left = [some for some in left if len(some) >= self._min_sites]
            if not left:
                break
            if outcome.failed:
                _log.warning(
                    "round %d: %s; tried again", begin.server_round, "; ".join(outcome.failed)
                )
            number = self._recovery.next_attempt(begin.purpose, begin.server_round)
            outcome.attempts += 1
            outcome.failed = []
            known, groups = len(self._left_out), left
            summed, left = self._attempt(begin, number, groups, outcome)
            # Each site that is found out this way costs an attempt, so those are not counted; there are only so many.
            tried += len(self._left_out) == known
            if summed:
                self._recovery.keep(summed)
                reach("before-commit", begin.server_round)
                opened = self._open(begin, summed, members, outcome)
                begun += len(opened)
                # Who has signed refuses a further attempt; the others may be enough.
                over = {site for group in opened for site in group.bundles}
                unsigned = {s for group in summed for s in group.bundles} - over
                left += [some for some in groups if any(m.site in unsigned for m in some)]
        outcome.failed += small
        return outcome

    def attempts(self, purpose: transcript.Purpose, server_round: int) -> int:
        """How many were made at a round's sum, in all."""
        return self._recovery.attempts(purpose, server_round)

    def _members_left(self, asked: Sequence[Member], outcome: Outcome) -> list[Member]:
        """The members without those that have been found out."""
        for member in asked:
            if member.site in self._left_out:
                code, why = self._left_out[member.site]
                self._exchange.lose(outcome, member.site, BEGIN, f"left out, as {why}", code)
        return [m for m in asked if m.site not in self._left_out]

    def _leave_out(self, site: str, code: int, why: str) -> None:
        self._left_out[site] = (code, why)
        self._recovery.leave_out(self._left_out)

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
                    self._exchange.lose(outcome, site, exchange, why, 409, "absent")

    def _attempt(
        self, begin: SumRequest, number: int, groups: list[list[Member]], outcome: Outcome
    ) -> tuple[list[Group], list[list[Member]]]:
        """Exchanges 0 to 2.

        Returns:
            Groups whose masked vectors are summed, and the members of those that are to be tried again.
        """
        everybody = [m for some in groups for m in some]
        asked = begin.messages(everybody, number)
        purpose, server_round = begin.purpose, begin.server_round
        attempt = Attempt(
            request_digest.digest(messages.BEGIN[purpose], asked[0].content),
            self._exchange.run_id,
            purpose,
            server_round,
            number,
        )
        if purpose == "train":
            reach("before-dispatch", server_round)
        phase = purpose if purpose != "statistics" else "sum"
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

        self._exchange.ask(server_round, BEGIN, everybody, asked, outcome, take, phase=phase)
        if purpose == "train":
            reach("all-received", server_round)
        open_groups: list[GroupAttempt] = []
        for some in groups:
            there = {m.site: bundles[m.site] for m in some if m.site in bundles}
            trial = GroupAttempt(some, None)
            if len(there) >= self._min_sites:
                trial.group = Group(attempt, begin.shape, there)
            else:
                trial.failed = (
                    f"begin: must be answered by {self._min_sites} sites, got {len(there)}"
                )
            open_groups.append(trial)
        for kind, told, hear in STEPS:
            self._step(begin, kind, told, hear, open_groups, outcome)
        summed = [t.group for t in open_groups if t.group is not None]
        again: list[list[Member]] = []
        for trial in open_groups:
            if trial.group is None:
                outcome.failed.append(trial.failed)
                again.append([m for m in trial.members if m.site not in trial.excluded])
        return summed, again

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
                    self._exchange.message(
                        kind, trial.group, told(trial.group, member.site), member
                    )
                )
        if not asked:
            return

        def take(site: str, content: RecordDict) -> None:
            group = by_site[site].group
            values = content.get(messages.SECURE)
            if isinstance(values, ConfigRecord) and messages.BLAMED in values:
                fault = _fault(values)
                by_site[site].blames.setdefault(str(values[messages.BLAMED]), {})[site] = fault.code
                raise fault
            if group is not None:
                heard = hear(group, site, content)
                if isinstance(heard, np.ndarray) and not outcome.sample:
                    outcome.sample = heard[:SAMPLE].tolist()

        self._exchange.ask(begin.server_round, NAMES[kind], members, asked, outcome, take)
        for trial in {id(t): t for t in by_site.values()}.values():
            if trial.group is not None and kind == messages.MASKED:
                for site, why in trial.group.add_masked().items():
                    self._exchange.lose(outcome, site, NAMES[kind], why, 411)
            for peer in trial.check(kind, self._min_sites):
                by = trial.blames[peer]
                codes = list(by.values())
                code = max(sorted(set(codes), reverse=True), key=codes.count)
                who = "1 site finds" if len(by) == 1 else f"{len(by)} sites find"
                why, words = f"{who} fault with it", f"left out, as {who} fault with it"
                if peer in trial.found_out:
                    # Its accusers are right, and are lost by its fault alone.
                    for site in by.keys() - trial.found_out:
                        outcome.out.pop(site, None)
                    known = "no roster has a valid key of it" if code == _UNTRUSTED else why
                    self._leave_out(peer, code, known)
                    words = f"left out from now on, as {why}"
                self._exchange.lose(outcome, peer, NAMES[kind], words, code)

    def _open(
        self,
        begin: SumRequest,
        groups: list[Group],
        members: Mapping[str, Member],
        outcome: Outcome,
    ) -> list[Group]:
        """Exchanges 3 and 4, and the sums.

        Returns:
            The groups whose unmasking was begun; of the others too few have signed, so that nobody can unmask them.
        """
        for _ in range(self._attempts):
            unsigned = [g for g in groups if len(g.signatures) < g.threshold]
            if not unsigned:
                break
            self._ask_survivors(begin, messages.COMMIT, unsigned, members, outcome)
        signed: list[Group] = []
        for group in groups:
            try:
                group.require(group.signatures, NAMES[messages.COMMIT])
            except LostError as error:
                outcome.failed.append(str(error))
            else:
                signed.append(group)
        for number in {g.attempt.number for g in groups}:
            left = [g for g in signed if g.attempt.number == number]
            if not left:
                self._recovery.forget(begin.purpose, number)
            elif len(left) < sum(g.attempt.number == number for g in groups):
                self._recovery.keep(left)
        # Before anybody is asked for shares: who was takes no signature back, and gives none again.
        self._recovery.keep_signatures(signed)
        if signed:
            reach("before-unmask", begin.server_round)
        self._ask_survivors(begin, messages.UNMASK, signed, members, outcome)
        for group in signed:
            try:
                group.require(group.shares, NAMES[messages.UNMASK])
                total, wrong = group.unmask()
            except LostError as error:
                outcome.failed.append(str(error))
                for site in error.dealers:
                    why = "the shares that it dealt do not give the secret that it committed to"
                    self._leave_out(site, 411, why)
                    self._exchange.lose(
                        outcome, site, NAMES[messages.SHARE], f"left out from now on, as {why}"
                    )
                continue
            for site in sorted(wrong):
                self._exchange.lose(
                    outcome, site, "unmask", "its shares are not those it was given"
                )
            outcome.unmasked_sums.append(
                UnmaskedSum(tuple(group.survivors), len(group.sharers), group.threshold, total)
            )
        return signed

    def _ask_survivors(
        self,
        begin: SumRequest,
        kind: str,
        groups: list[Group],
        members: Mapping[str, Member],
        outcome: Outcome,
    ) -> None:
        """Exchange 3 with survivors that have not signed, or exchange 4 with all, as a signature may have been lost."""
        commits = kind == messages.COMMIT
        by_site = {
            site: group
            for group in groups
            for site in group.survivors
            if site in members and not (commits and site in group.signatures)
        }
        if not by_site:
            return
        whom = [members[site] for site in by_site]
        asked = [
            self._exchange.message(
                kind, group, group.commit_values() if commits else group.unmask_values(), member
            )
            for group, member in zip(by_site.values(), whom, strict=True)
        ]

        blames: dict[str, set[str]] = {}

        def take(site: str, content: RecordDict) -> None:
            group, values = by_site[site], messages.values_of(content)
            if messages.BLAMED in values:
                peer = str(values.get(messages.BLAMED))
                if peer != site and by_site.get(peer) is group:
                    blames.setdefault(peer, set()).add(site)
                raise _fault(values)
            hear = group.take_commit if commits else group.take_unmask
            hear(site, values)

        self._exchange.ask(begin.server_round, NAMES[kind], whom, asked, outcome, take)
        for peer, by in sorted(blames.items()):
            # Fewer may all be lying, and a signature that they find wrong may be right.
            if is_agreed(len(by), len(by_site[peer].sites)):
                why = f"{len(by)} sites find its signature on the survivors wrong"
                self._leave_out(peer, _DEVIATES, why)
                words = f"left out from now on, as {why}"
                self._exchange.lose(outcome, peer, NAMES[messages.COMMIT], words, _DEVIATES)


def _fault(values: ConfigRecord) -> FaultFoundError:
    """What a site says of a peer."""
    code = values.get(messages.CODE)
    told = f"FE-{code}" if type(code) is int and 400 <= code < 500 else "without a number"
    peer = printable(str(values.get(messages.BLAMED)))
    return FaultFoundError(f"finds fault with {peer}, {told}", code)
