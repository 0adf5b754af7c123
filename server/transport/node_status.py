"""Which nodes Flower lists as connected, and since when the others are disconnected.

A node that stops is listed for another 60 s or so. For a node that is not listed, Flower answers with an error of its
own and drops the request: a node that reconnects must be sent the request again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fedge.server.transport.grid_calls import GridClient


@dataclass
class NodeStatus:
    """The connection status of nodes over the whole run.

    Attributes:
        grid_client: calls Flower's grid.
        disconnected: node id -> time, by the clock, at which the node was first found not to be connected.
        listed: ids of the nodes that Flower listed at the last look.
    """

    grid_client: GridClient
    disconnected: dict[int, float] = field(default_factory=dict)
    listed: frozenset[int] = frozenset()
    _looked: float | None = None

    def due(self) -> bool:
        """Whether the last look is older than ``timeouts.listing``."""
        now = self.grid_client.clock.now()
        return self._looked is None or now - self._looked >= self.grid_client.timeouts.listing

    def wait_for_next(self) -> None:
        """Postpone the next look by one interval, as an exchange has just begun."""
        self._looked = self.grid_client.clock.now()

    def look(
        self, nodes: Iterable[int], until: float, tick: Callable[[], None]
    ) -> tuple[list[int], list[tuple[int, float]]]:
        """List the connected nodes.

        Args:
            nodes: ids of the nodes to check.
            until: when to give up, by the clock.
            tick: called while this waits.

        Returns:
            Ids of ``nodes`` that are newly disconnected, and the reconnected nodes, each with the number of seconds
            for which it was disconnected.

        Raises:
            RunError: 501, the SuperLink did not answer in time.
        """
        grid = self.grid_client.grid
        listed = self.grid_client.call(
            "list the sites", lambda: frozenset(grid.get_node_ids()), until, tick
        )
        now = self.grid_client.clock.now()
        self.listed, self._looked = listed, now
        disconnected = [
            node for node in nodes if node not in listed and self.mark_disconnected(node)
        ]
        reconnected = [
            (node, now - self.disconnected.pop(node))
            for node in list(self.disconnected)
            if node in listed
        ]
        return disconnected, reconnected

    def mark_disconnected(self, node: int) -> bool:
        """Record that a node is not connected; True where it was connected until now."""
        if node in self.disconnected:
            return False
        self.disconnected[node] = self.grid_client.clock.now()
        return True

    def disconnected_for(self, node: int) -> float | None:
        """Number of seconds for which a node has been disconnected; None where it is connected."""
        since = self.disconnected.get(node)
        return None if since is None else self.grid_client.clock.now() - since
