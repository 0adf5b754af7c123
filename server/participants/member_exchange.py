"""An exchange of a run with some of its members: who is told of it, and what is remembered of who was silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Message

from fedge.server.participants import messages as requests
from fedge.server.participants.availability import Availability
from fedge.server.participants.members import Member
from fedge.server.runs.listener import Listener
from fedge.server.transport.delivery import DeliveryEvents
from fedge.server.transport.exchange import Exchange, exchange
from fedge.server.transport.node_status import NodeStatus
from fedge.shared.config.federation import Config
from fedge.shared.failpoints import reach


@dataclass(frozen=True)
class MemberExchange:
    """How a run asks its members.

    Attributes:
        run_id: fedge's.
        config: of the run.
        live: Flower's grid, and what is known of its nodes.
        attendance: remembers who let a deadline pass.
        listener: is told of every reply.
    """

    run_id: str
    config: Config
    live: NodeStatus
    attendance: Availability
    listener: Listener

    def ask(
        self,
        server_round: int,
        phase: str,
        asked: list[Member],
        messages: list[Message],
        *,
        deadline: float | None = None,
    ) -> Exchange:
        """Send a message to each of some members, and collect the replies.

        Args:
            server_round: of the run.
            phase: "train", "evaluate", or the name of a secure exchange; failpoints lie in "train" alone.
            asked: in the order of the messages.
            messages: one each.
            deadline: seconds; ``round.deadline`` where None.

        Raises:
            RunError: 501, the SuperLink does not answer.
        """
        sites = {m.node_id: m.site for m in self.attendance.members.values()}
        listener, link = self.listener, self.live.link

        def replied(node: int, count: int) -> None:
            if phase == "train" and count == 1:
                reach("one-received", server_round)
            listener.site(server_round, sites[node], count, len(asked))

        def pushed() -> None:
            if phase == "train":
                reach("after-dispatch", server_round)

        def waiting(nodes: Sequence[int], seconds: float) -> None:
            what = phase if link.failing_since is None else "superlink"
            listener.waiting(server_round, what, [sites[n] for n in nodes], seconds)

        def back(node: int, seconds: float) -> None:
            if node in sites:
                listener.back(server_round, sites[node], seconds)

        watch = DeliveryEvents(
            reply=replied,
            pushed=pushed,
            sent=lambda done, total, nbytes: listener.sent(server_round, done, total, nbytes),
            waiting=waiting,
            lost=lambda node, seconds: listener.lost(server_round, sites[node], seconds),
            back=back,
        )
        probe = requests.probe(self.run_id, server_round, self.config.task.name, len(asked))
        wait = self.config.round.deadline if deadline is None else deadline
        result = exchange(self.live, messages, wait, watch, None if link.direct else probe)
        self.attendance.note(asked, result)
        return result
