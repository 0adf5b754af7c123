"""A server that may deviate, and fedge's own sites, in one process.

The sites are asked as a deployment asks them: a record in, a record out. The server is honest by itself and keeps its
books in ``Group``; each of its steps takes what it tells a site as an argument, so that an attack is an honest round
with one argument changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedge.client.worker.handlers import SiteWorker
from fedge.server.secagg.group import Group
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.secagg import (
    exact_counters,
    fixed_point,
    masking,
    messages,
    request_digest,
    transcript,
    vector_layout,
)
from fedge.shared.secagg.transcript import Attempt, KeyAdvertisement

from .parties import BOUNDS, weights_of

Values = Mapping[str, Any]
#: What one site is told in place of what an honest server tells it.
Change = Callable[[str, dict[str, Any]], Values]


@dataclass(frozen=True)
class Refusal:
    """A site that raised.

    Args:
        site: its name.
        kind: the message type that it was asked.
        code: number of its error.
        peer: whom it names, or "".
    """

    site: str
    kind: str
    code: int
    peer: str = ""


class Server:
    """One attempt at one sum of updates; honest but for what its steps are given to tell.

    Attributes:
        group: its books, once the bundles are there.
        refusals: every site that raised, in order.
    """

    group: Group

    def __init__(
        self,
        sites: Mapping[str, SiteWorker],
        *,
        server_round: int = 1,
        attempt: int = 1,
        run_id: str = "run-1",
    ) -> None:
        self.sites = dict(sites)
        self.task = next(iter(sites.values())).task
        self.weights = weights_of(self.task)
        self.server_round, self.attempt, self.run_id = server_round, attempt, run_id
        self.refusals: list[Refusal] = []
        self._total: np.ndarray | None = None

    @property
    def layout(self) -> vector_layout.Layout:
        """Of the masked vector."""
        shapes = {n: a.shape for n, a in self.weights.items() if a.dtype.kind == "f"}
        trained = [name for name, _ in self.task.network().named_parameters()]
        return vector_layout.of_training(shapes, trained, BOUNDS, control=False)

    def train_request(self, *, secure: bool = True, **changes: float) -> RecordDict:
        """What begins the sum; ``changes`` of the bounds, by name with _ for -."""
        config: dict[str, Any] = {
            **self._address(),
            protocol.STANDARDISE: "federated",
            protocol.SEED: 42,
            protocol.THREADS: 1,
            protocol.SETTINGS: '{"learning-rate": 0.1, "batch-size": 16, "local-steps": 3}',
        }
        content = RecordDict(
            {
                protocol.ARRAYS: ArrayRecord({n: Array(a) for n, a in self.weights.items()}),
                protocol.CONFIG: ConfigRecord(config),
            }
        )
        if secure:
            values: dict[str, Any] = {
                messages.PROTOCOL: transcript.VERSION,
                messages.ATTEMPT: self.attempt,
                messages.CLIPPING_BOUND: BOUNDS.clipping_bound,
                messages.VALUE_BOUND: BOUNDS.value_bound,
                messages.STATE_BOUND: BOUNDS.state_bound,
                messages.WEIGHT_CAP: BOUNDS.weight_cap,
            }
            values |= {name.replace("_", "-"): value for name, value in changes.items()}
            content[messages.SECURE] = messages.record(values)
        return content

    def begin(
        self,
        names: Iterable[str] | None = None,
        requests: Mapping[str, RecordDict] | None = None,
        bundles: Callable[[KeyAdvertisement], KeyAdvertisement] = lambda b: b,
    ) -> Server:
        """Exchange 0; ``requests`` of sites that are asked for something else, ``bundles`` to replace them."""
        honest = self.train_request()
        found: dict[str, KeyAdvertisement] = {}
        for site in names or self.sites:
            values = self.ask(site, protocol.TRAIN, (requests or {}).get(site, honest))
            if values is not None:
                (bundle,) = transcript.unpack_advertisements(
                    values[messages.SECURE][messages.BUNDLE]
                )
                found[site] = bundles(bundle)
        if len(found) >= transcript.MIN_SITES:
            attempt = Attempt(
                request_digest.digest(protocol.TRAIN, honest),
                self.run_id,
                "train",
                self.server_round,
                self.attempt,
            )
            self.group = Group(attempt, self.layout.shape, found)
        return self

    def share(self, change: Change | None = None) -> Server:
        """Exchange 1."""
        for site in list(self.group.bundles):
            reply = self.tell(site, messages.SHARE, self.group.share_values(), change)
            if reply is not None:
                self.group.take_share(site, messages.values_of(reply))
        return self

    def masked(self, change: Change | None = None, skip: str = "") -> Server:
        """Exchange 2; ``skip`` is not asked."""
        for site in (s for s in list(self.group.sharers) if s != skip):
            reply = self.tell(site, messages.MASKED, self.group.masked_values(site), change)
            if reply is not None:
                self.group.take_masked(site, reply)
        self.group.add_masked()
        return self

    def commit(self, change: Change | None = None) -> Server:
        """Exchange 3."""
        for site in list(self.group.survivors):
            reply = self.tell(site, messages.COMMIT, self.group.commit_values(), change)
            if reply is not None:
                self.group.take_commit(site, messages.values_of(reply))
        return self

    def unmask(self, change: Change | None = None) -> Server:
        """Exchange 4."""
        for site in list(self.group.survivors):
            reply = self.tell(site, messages.UNMASK, self.group.unmask_values(), change)
            if reply is not None:
                self.group.take_unmask(site, messages.values_of(reply))
        return self

    def tell(
        self, site: str, kind: str, values: Values, change: Change | None = None
    ) -> RecordDict | None:
        """One request of exchanges 1 to 4, and its reply; None where the site raised."""
        told = {messages.PURPOSE: "train", messages.ATTEMPT: self.attempt, **values}
        if change is not None:
            told = {**told, **change(site, dict(values))}
        content = RecordDict(
            {
                protocol.CONFIG: ConfigRecord(self._address()),
                messages.SECURE: messages.record(told),
            }
        )
        return self.ask(site, kind, content)

    def ask(self, site: str, kind: str, content: RecordDict) -> RecordDict | None:
        """Any request, and its reply; None where the site raised."""
        try:
            reply = self.sites[site].answer(kind, content)
        except SiteError as error:
            self.refusals.append(Refusal(site, kind, error.code))
            return None
        values = messages.values_of(reply)
        if messages.BLAMED in values:
            code, peer = values[messages.CODE], values[messages.BLAMED]
            self.refusals.append(Refusal(site, kind, int(str(code)), str(peer)))
            return None
        return reply

    def opened(self) -> tuple[np.ndarray, dict[str, float]]:
        """The sum of weight times value over the survivors, and of their counters."""
        if self._total is None:
            self._total, wrong = self.group.unmask()
            assert not wrong
        total = self._total
        layout, group = self.layout, self.group
        values = fixed_point.decode(total[: layout.values], layout.segments, len(group.sharers))
        return values, exact_counters.decode_counters(
            masking.counters_in(total, len(layout.counters)), layout.counters, len(group.survivors)
        )

    def plain(self, site: str) -> np.ndarray:
        """What a site adds, in clear: its weighted update, as it tells a server that asks without masks."""
        if not len(self.sites[site].learner.data.train_labels):
            return np.zeros(self.layout.values)
        reply = self.sites[site].answer(protocol.TRAIN, self.train_request(secure=False))
        trained = {n: a.numpy() for n, a in reply[protocol.ARRAYS].items()}
        weight = int(reply[protocol.METRICS][protocol.NUM_EXAMPLES]) / BOUNDS.weight_cap
        layout = self.layout
        flat = layout.flatten(trained).astype(np.float64) - layout.flatten(self.weights)
        return np.asarray(weight * flat)

    def is_right(self) -> bool:
        """Whether the sum that was unmasked is that of the survivors, to the rounding of each."""
        found, counted = self.opened()
        alive = self.group.survivors
        bound = np.concatenate([np.full(s.size, s.bound) for s in self.layout.segments])
        steps = 1 / np.array([fixed_point.scale(b, len(self.group.sharers)) for b in bound])
        off = np.abs(found - sum(self.plain(site) for site in alive)) / steps
        # One step a site for its rounding; and a float32 update may lie so much beside its difference in float64.
        limit = len(alive) * (1 + 1e-6 / steps.min())
        return float(off.max()) <= limit and counted[vector_layout.SITES] == len(alive)

    def shares_given(self, site: str) -> int:
        """Shares of a site's secrets that came out in this attempt, of whichever kind."""
        group = getattr(self, "group", None)
        return sum(site in given for given in group.shares.values()) if group else 0

    def _address(self) -> dict[str, Any]:
        return {
            protocol.RUN_ID: self.run_id,
            protocol.SERVER_ROUND: self.server_round,
            protocol.TASK: self.task.name,
            protocol.COHORT: len(self.sites),
        }
