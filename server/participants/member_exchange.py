"""One exchange of a run with some of its members: reported to the listener; members that time out are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flwr.app import Message

from fedge.server.participants import request_content as requests
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
    """Sends requests of a run to its members and collects the replies.

    Attributes:
        run_id: fedge's id of the run.
        config: configuration of the run.
        node_status: connection status of the nodes, with the client of Flower's grid.
        availability: records the members that time out.
        listener: gets the progress of every exchange.
    """

    run_id: str
    config: Config
    node_status: NodeStatus
    availability: Availability
    listener: Listener

    def ask(
        self,
        server_round: int,
        phase: str,
        members: list[Member],
        messages: list[Message],
        *,
        deadline: float | None = None,
    ) -> Exchange:
        """Send a message to each of some members, and collect the replies.

        Args:
            server_round: number of the round; 0 before the first.
            phase: "train", "evaluate", or the name of a secure exchange; failpoints lie in "train" alone.
            members: in the order of the messages.
            messages: one a member.
            deadline: in seconds; ``round.deadline`` where None.

        Returns:
            The replies by node id, and the nodes without one.

        Raises:
            RunError: 501, the SuperLink does not answer.
        """
        sites = {m.node_id: m.site for m in self.availability.members.values()}
        listener, grid_client = self.listener, self.node_status.grid_client

        def replied(node: int, count: int) -> None:
            if phase == "train" and count == 1:
                reach("one-received", server_round)
            listener.site(server_round, sites[node], count, len(members))

        def pushed() -> None:
            if phase == "train":
                reach("after-dispatch", server_round)

        def waiting(nodes: Sequence[int], seconds: float) -> None:
            shown = phase if grid_client.failing_since is None else "superlink"
            listener.waiting(server_round, shown, [sites[n] for n in nodes], seconds)

        def reconnected(node: int, seconds: float) -> None:
            if node in sites:
                listener.reconnected(server_round, sites[node], seconds)

        events = DeliveryEvents(
            reply=replied,
            pushed=pushed,
            sent=lambda done, total, nbytes: listener.sent(server_round, done, total, nbytes),
            waiting=waiting,
            disconnected=lambda node, seconds: listener.disconnected(
                server_round, sites[node], seconds
            ),
            reconnected=reconnected,
        )
        probe = requests.probe(self.run_id, server_round, self.config.task.name, len(members))
        wait = self.config.round.deadline if deadline is None else deadline
        result = exchange(
            self.node_status, messages, wait, events, None if grid_client.direct else probe
        )
        self.availability.note(members, result)
        return result
