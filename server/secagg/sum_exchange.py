"""One exchange of a secure sum with some of its sites: what is sent, who has answered, and who is lost and why."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from flwr.app import ConfigRecord, Message, RecordDict

from fedge.server.admission.validation_result import Rejection, printable, reported, reported_words
from fedge.server.participants import request_content as requests
from fedge.server.participants.member_exchange import MemberExchange
from fedge.server.participants.members import Member
from fedge.server.secagg.group import Group
from fedge.server.secagg.outcome import Outcome
from fedge.server.transport.exchange import no_reply_reason
from fedge.shared import protocol
from fedge.shared.secagg import messages

_log = logging.getLogger(__name__)

#: With which a site may find fault with a peer: its entry in the roster, its signatures, its share.
_FAULTS: Final = (421, 422, 425)
#: The name of exchange 0, which has the round's own deadline.
BEGIN: Final = "begin"


class FaultFoundError(ValueError):
    """A site finds fault with a peer, by the number that it gives; any other number stands for a malformed reply."""

    def __init__(self, why: str, code: object) -> None:
        super().__init__(why)
        self.code = code if type(code) is int and code in _FAULTS else 411


class SumExchange:
    """Asks members of a run.

    Args:
        member_exchange: to the members.
        deadline: seconds for each exchange after the first.
    """

    def __init__(self, member_exchange: MemberExchange, deadline: float) -> None:
        self._member_exchange, self._deadline = member_exchange, deadline

    @property
    def run_id(self) -> str:
        """The run."""
        return self._member_exchange.run_id

    def ask(
        self,
        server_round: int,
        exchange: str,
        members: list[Member],
        asked: list[Message],
        outcome: Outcome,
        take: Callable[[str, RecordDict], None],
        *,
        phase: str | None = None,
    ) -> None:
        """Send, and take every reply; note who is lost, and why.

        Args:
            server_round: of the run.
            exchange: its name, ``BEGIN`` or of ``outcome.NAMES``.
            members: whom to ask.
            asked: their requests, in the same order.
            outcome: to be added to.
            take: a site's reply; a ValueError is what is wrong with it.
            phase: of the round, as the journal of requests names it; the exchange's name unless given.
        """
        deadline = (
            self._member_exchange.config.round.deadline if exchange == BEGIN else self._deadline
        )
        result = self._member_exchange.ask(
            server_round, phase or exchange, members, asked, deadline=deadline
        )
        outcome.sent += result.sent
        outcome.received += result.received
        for member in members:
            reply = result.replies.get(member.node_id)
            if reply is None:
                why, code, how = no_reply_reason(result, member.node_id, deadline), 409, "absent"
                if member.node_id in result.late:
                    why, code, how = f"reply after the deadline of {deadline:g} s", 408, "late"
                self.lose(outcome, member.site, exchange, why, code, how)
            elif reply.has_error():
                words = reported_words(reply.error)
                self.lose(
                    outcome, member.site, exchange, words, reported(reply.error) or 410, "error"
                )
            else:
                try:
                    _require_answer(reply.content, member.site, self.run_id)
                    take(member.site, reply.content)
                except ValueError as error:
                    code = error.code if isinstance(error, FaultFoundError) else 411
                    self.lose(outcome, member.site, exchange, printable(str(error), 160), code)

    def lose(
        self,
        outcome: Outcome,
        site: str,
        exchange: str,
        why: str,
        code: int = 411,
        how: Any = "rejected",
    ) -> None:
        """Note that a site is lost at an exchange."""
        _log.warning("%s is lost at %s: %s", site, exchange, why)
        outcome.lost.append(
            {"site": site, "exchange": exchange, "attempt": outcome.attempts, "reason": why}
        )
        code = code if how != "error" else 410
        outcome.out[site] = Rejection(site, code, how, f"{exchange}: {why}")

    def message(
        self, kind: str, group: Group, values: Mapping[str, bytes], member: Member
    ) -> Message:
        """A request of an exchange after the first."""
        config, a = self._member_exchange.config, group.attempt
        address = requests.address(a.run_id, a.server_round, config.task.name, len(group.bundles))
        secure = messages.record(
            {messages.PURPOSE: a.purpose, messages.ATTEMPT: a.number, **values}
        )
        content = RecordDict({protocol.CONFIG: ConfigRecord({**address}), messages.SECURE: secure})
        return requests.message(content, member, kind, a.server_round, self._deadline)


def _require_answer(content: RecordDict, site: str, run_id: str) -> None:
    config = content.get(protocol.CONFIG)
    if not isinstance(config, ConfigRecord):
        raise ValueError(f"must hold a {protocol.CONFIG} record, got none")
    if (config.get(protocol.SITE), config.get(protocol.RUN_ID)) != (site, run_id):
        raise ValueError("must answer as this site in this run, got another")
