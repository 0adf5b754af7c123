"""Which nodes Flower lists as connected, since when others are not, and which of them were asked in vain.

A node that stops is listed for another 60 s or so. Flower answers for a node that is not listed with an error of its
own, and drops the request: whoever comes back must be asked anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from fedge.server.transport.grid_calls import GridClient


@dataclass
class NodeStatus:
    """What is known of nodes over the whole run.

    Attributes:
        gone: by node id, when it was first found not to be connected.
        listed: of the last look.
    """

    link: GridClient
    gone: dict[int, float] = field(default_factory=dict)
    listed: frozenset[int] = frozenset()
    _looked: float | None = None

    def due(self) -> bool:
        """Whether the last look is too old."""
        now = self.link.clock.now()
        return self._looked is None or now - self._looked >= self.link.patience.listing

    def wait_for_next(self) -> None:
        """Let one pause pass before the next look, as an exchange has just begun."""
        self._looked = self.link.clock.now()

    def look(
        self, nodes: Iterable[int], until: float, tick: Callable[[], None]
    ) -> tuple[list[int], list[tuple[int, float]]]:
        """Ask who is connected.

        Args:
            nodes: that matter.
            until: by the clock, when to give up.
            tick: called while this waits.

        Returns:
            Nodes that are newly gone, and those that came back with the seconds that they were away.
        """
        grid = self.link.grid
        listed = self.link.call(
            "list the sites", lambda: frozenset(grid.get_node_ids()), until, tick
        )
        now = self.link.clock.now()
        self.listed, self._looked = listed, now
        lost = [node for node in nodes if node not in listed and self.mark_gone(node)]
        back = [(node, now - self.gone.pop(node)) for node in list(self.gone) if node in listed]
        return lost, back

    def mark_gone(self, node: int) -> bool:
        """Note that a node is not connected; whether that is news."""
        if node in self.gone:
            return False
        self.gone[node] = self.link.clock.now()
        return True

    def away(self, node: int) -> float | None:
        """For how many seconds a node has not been connected; None where it is."""
        since = self.gone.get(node)
        return None if since is None else self.link.clock.now() - since
