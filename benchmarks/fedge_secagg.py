"""Times our secure aggregation of a round for one client and for the server: their own code, in one process.

The client's part goes through ``Participant``, as in a site's worker: request digest over the weights received, update
and clipping, keys, signatures, encrypted shares, encoding, masks, checksum, the records that travel. The server's part
is a ``Group`` that hashes the request, reads every reply and writes every request, then what ``SecureSums`` makes of
the sum: decoded, divided, added to the weights. Peers are made here by hand, with real keys; that is not timed, and
neither are training and transport, nor the writing of the masked sum to the disk, by which a round survives a crash:
Flower's server writes nothing.

Used by secure_aggregation.py and secure_cost.py.
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedge.client.requests import Address
from fedge.client.secagg.participant import Participant
from fedge.client.secagg.replay_guard import ReplayGuard
from fedge.server.aggregation import updates
from fedge.server.secagg import decoding
from fedge.server.secagg.group import Group
from fedge.server.secagg.outcome import UnmaskedSum
from fedge.shared import protocol
from fedge.shared.config.sections import AdmissionSection
from fedge.shared.secagg import masking, messages, neighbour_graph, request_digest, transcript

# Beside this file; named here as a test loads this file by its path.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fedge_secagg_peers import (
    BOUNDS,
    RUN,
    Peers,
    Site,
    Vector,
    Work,
    anchors_of,
    names_of,
    share_reply,
    shares_of,
    upload_of,
    work_of,
)

#: Uploads that are made ahead, bytes: so many that none is still in the cache when it is added.
BATCH: Final = 2**30

Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """One timed piece of work.

    Attributes:
        seconds: wall clock, all parts together.
        upload_bytes: of the masked vector as it travels; 0 for the server.
        parts: seconds by exchange.
        other_bytes: all else that the one client sends and receives in exchanges 0 to 4; 0 for the server.
    """

    seconds: float
    upload_bytes: int = 0
    parts: Mapping[str, float] = field(default_factory=dict)
    other_bytes: int = 0


@contextmanager
def forced(degree: int | None) -> Iterator[None]:
    """Let every site have so many neighbours, which no setting of the product does; None changes nothing."""
    own = neighbour_graph.degree_of
    if degree is not None:
        neighbour_graph.degree_of = lambda _: degree
    try:
        yield
    finally:
        neighbour_graph.degree_of = own


def client_once(n: int, degree: int | None, d: int, seed: int = 0) -> Timing:
    """Time all work of one client in a round without drops, training excluded.

    Args:
        n: clients in the round.
        degree: neighbours of each client, None for the protocol's own number.
        d: parameters.
        seed: of weights and update; keys are new each time.

    Raises:
        RuntimeError: the peers' shares do not unmask the vector that was sent.
    """
    work, clock = work_of(d, seed), Clock()
    names = names_of(n)
    # One from the middle has masks of either sign.
    own = names.pop(n // 2)
    peers = [Site.new(name, work.attempt) for name in names]
    anchors = anchors_of(own, peers)
    with forced(degree), tempfile.TemporaryDirectory() as folder:
        answers = Participant(anchors, ReplayGuard(Path(folder)))
        address = Address(RUN, 1)
        begun = clock.time(
            "begin",
            lambda: answers.begin(protocol.TRAIN, work.request, address, 1, work.contribute),
        )
        exchanges = Peers(
            work.attempt, peers, transcript.unpack_advertisements(begun[messages.BUNDLE])[0]
        )
        counted = len(begun[messages.BUNDLE])
        replies: dict[str, RecordDict] = {}
        for kind, values_of in (
            (messages.SHARE, exchanges.bundles),
            (messages.MASKED, exchanges.sharers),
            (messages.COMMIT, exchanges.survivors),
            (messages.UNMASK, exchanges.signatures),
        ):
            values = {messages.PURPOSE: "train", messages.ATTEMPT: 1, **values_of(replies)}
            request = RecordDict({messages.SECURE: messages.record(values)})
            replies[kind] = clock.time(
                kind.removeprefix("query.secagg_"),
                lambda kind=kind, request=request: answers.step(kind, request, address),
            )
            counted += _bytes(request) + _bytes(replies[kind])
    sent = replies[messages.MASKED][protocol.ARRAYS][messages.VECTOR]
    exchanges.require_unmasked(replies, work.contribute())
    return clock.timing(len(sent.data), counted)


def server_once(n: int, degree: int | None, d: int, dropped: float = 0.0, seed: int = 0) -> Timing:
    """Time the server's work on the replies of a round, up to the new weights.

    Args:
        n: clients in the round.
        degree: neighbours of each client, None for the protocol's own number.
        d: parameters.
        dropped: fraction of the clients that drop between the encrypted shares and the upload, spread evenly.
        seed: of weights and update; keys are new each time.

    Raises:
        RuntimeError: the sum found is not the one that was sent.
    """
    work, clock = work_of(d, seed), Clock()
    with forced(degree):
        sites = {name: Site.new(name, work.attempt) for name in names_of(n)}
        dropped_out = {list(sites)[i * n // round(n * dropped)] for i in range(round(n * dropped))}
        alive = [name for name in sites if name not in dropped_out]
        plain = work.contribute().encode(n, os.urandom(32))
        # What every site was asked for goes into T.
        clock.time("begin", lambda: request_digest.digest(protocol.TRAIN, work.request))
        group = clock.time("begin", lambda: _group(work, sites))
        shares = shares_of(group, sites, dropped_out)
        for name in sites:
            reply = share_reply(group, sites[name], shares)
            clock.time("share", lambda r=reply, n=name: _hear_share(group, n, r))
        clock.time("masked", lambda: [messages.record(group.masked_values(s)) for s in sites])
        each = max(1, BATCH // plain.nbytes)
        for start in range(0, len(alive), each):
            some = alive[start : start + each]
            uploads = [(name, upload_of(group, sites, name, dropped_out, plain)) for name in some]
            clock.time("masked", lambda u=uploads: _hear_masked(group, u))
            del uploads
        signed = messages.record({messages.SIGNATURE: os.urandom(64)})
        clock.time("commit", lambda: _hear_commit(group, alive, signed))
        replies = {
            name: messages.record(
                {messages.SHARES: b"".join(shares[name][o] for o in sorted(shares[name]))}
            )
            for name in alive
        }
        clock.time("shares", lambda: _hear_shares(group, replies))
        total, wrong = clock.time("unmask", group.unmask)
        wanted = masking.zeros(plain.size)
        counters = work.layout.shape.counters
        for _ in alive:
            masking.add_vectors(wanted, [plain], counters=counters)
        if wrong or not np.array_equal(total, wanted):
            raise RuntimeError("secure sum: must be the sum of what was sent, got another")
        decoded = clock.time("decode", lambda: _decode(work, total, n, alive))
    if not all(np.allclose(decoded[k].numpy(), a, atol=1e-6) for k, a in work.trained.items()):
        raise RuntimeError("weights: must be those that every site trained, got others")
    return clock.timing()


def _group(work: Work, sites: Mapping[str, Site]) -> Group:
    advertisements = {}
    for name, site in sites.items():
        (advertisements[name],) = transcript.unpack_advertisements(site.bundle.encode())
    group = Group(work.attempt, work.layout.shape, advertisements)
    for _ in sites:
        messages.record(group.share_values())
    return group


def _hear_share(group: Group, name: str, reply: ConfigRecord) -> None:
    group.take_share(name, reply)


def _hear_masked(group: Group, uploads: list[tuple[str, RecordDict]]) -> None:
    for name, content in uploads:
        group.take_masked(name, content)
    if group.add_masked():
        raise RuntimeError("masked vector: must be whole, got a damaged one")


def _hear_commit(group: Group, alive: list[str], reply: ConfigRecord) -> None:
    for name in alive:
        messages.record(group.commit_values())
        group.take_commit(name, reply)


def _hear_shares(group: Group, replies: Mapping[str, ConfigRecord]) -> None:
    for name, reply in replies.items():
        messages.record(group.unmask_values())
        group.take_unmask(name, reply)


def _decode(work: Work, total: Vector, sharers: int, sites: list[str]) -> ArrayRecord:
    """As ``SecureSums`` and FedAvg: counters, mean update, its norm, new weights, the next round's record."""
    unmasked = UnmaskedSum(tuple(sites), sharers, neighbour_graph.threshold(sharers), total)
    mean, _ = decoding.mean_weights(
        work.layout, unmasked, BOUNDS, work.received, AdmissionSection()
    )
    return updates.record(mean.mean)


def _bytes(content: RecordDict) -> int:
    values = content[messages.SECURE].values()
    return sum(len(value) for value in values if isinstance(value, bytes))


class Clock:
    """Seconds of each part; calls of one part add up. Garbage is collected before the first."""

    def __init__(self) -> None:
        gc.collect()
        self._parts: dict[str, float] = {}

    def time(self, part: str, work: Callable[[], Result]) -> Result:
        """Do and time a piece of work."""
        started = time.perf_counter()
        result = work()
        self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - started
        return result

    def timing(self, upload_bytes: int = 0, other_bytes: int = 0) -> Timing:
        """All parts."""
        return Timing(sum(self._parts.values()), upload_bytes, self._parts, other_bytes)
