"""What our secure aggregation costs one client and the server in a round: the code that runs there, in one process.

The client's part goes through ``SecureAnswers``, as in a site's worker: job hash over the weights received, update and
clipping, keys, signatures, boxes, encoding, masks, checksum, the records that travel. The server's part is a ``Group``
that reads every reply and writes every request, then what ``SecureSums`` makes of the sum: decoded, divided, added to
the weights. Peers are made here by hand, with real keys; that is not timed, and neither are training and transport.

Used by secure_aggregation.py and secure_cost.py.
"""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedge.client import contribution
from fedge.client.answered import Answered
from fedge.client.requests import Address
from fedge.client.secure_answers import SecureAnswers
from fedge.client.secure_session import Anchors
from fedge.server.secagg.group import Group
from fedge.shared import protocol
from fedge.shared.roster import Roster
from fedge.shared.roster_file import entry_of
from fedge.shared.secagg import (
    agreement,
    boxes,
    encoding,
    graph,
    job,
    layout,
    limbs,
    masking,
    messages,
    shamir,
    transcript,
)
from fedge.shared.secagg.layout import Bounds
from fedge.shared.secagg.messages import Sharer, Signed
from fedge.shared.secagg.transcript import Attempt, Bundle

RUN: Final = "timed"
#: Neither clip nor cap binds.
BOUNDS: Final = Bounds(clipping_bound=100.0, value_bound=0.1, state_bound=1.0, weight_cap=1000)
EXAMPLES: Final = 250
#: Uploads that are made ahead, bytes: so many that none is still in the cache when it is added.
BATCH: Final = 2**30

Result = TypeVar("Result")
Vector = NDArray[np.uint32]


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


@dataclass(frozen=True)
class Site:
    """A peer, with all its secrets."""

    name: str
    private: Ed25519PrivateKey
    box: agreement.Pair
    mask: agreement.Pair
    seed: bytes
    bundle: Bundle

    @classmethod
    def new(cls, name: str, attempt: Attempt) -> Site:
        """With new keys."""
        private = Ed25519PrivateKey.generate()
        box, mask = agreement.Pair.generate(), agreement.Pair.generate()
        bundle = transcript.new_bundle(attempt, name, box.public, mask.public, private)
        return cls(name, private, box, mask, os.urandom(32), bundle)


@dataclass(frozen=True)
class Work:
    """What is asked of every site, and one site's update.

    Attributes:
        of: layout of the vector.
        received: the round's weights.
        trained: the same after training.
        request: to train.
        attempt: as all sites compute it from the request.
    """

    of: layout.Layout
    received: dict[str, NDArray[Any]]
    trained: dict[str, NDArray[Any]]
    request: RecordDict
    attempt: Attempt

    def contribute(self) -> contribution.Contribution:
        """The part of a site that trained."""
        return contribution.training(
            self.of, BOUNDS, self.received, self.trained, EXAMPLES, loss=0.5
        )


def work_of(d: int, seed: int) -> Work:
    """A round of ``d`` parameters."""
    random = np.random.default_rng(seed)
    received = {"weight": random.standard_normal(d, np.float32)}
    trained = {"weight": received["weight"] + np.float32(1e-3)}
    config = ConfigRecord(
        {protocol.RUN_ID: RUN, protocol.SERVER_ROUND: 1, protocol.TASK: "timed", protocol.SEED: 1}
    )
    secure = messages.record(
        {
            messages.PROTOCOL: transcript.VERSION,
            messages.ATTEMPT: 1,
            messages.CLIPPING_BOUND: BOUNDS.clipping_bound,
            messages.VALUE_BOUND: BOUNDS.value_bound,
            messages.STATE_BOUND: BOUNDS.state_bound,
            messages.WEIGHT_CAP: BOUNDS.weight_cap,
        }
    )
    arrays = ArrayRecord({name: Array(a) for name, a in received.items()})
    request = RecordDict(
        {protocol.CONFIG: config, messages.SECURE: secure, protocol.ARRAYS: arrays}
    )
    attempt = Attempt(job.of(protocol.TRAIN, request), RUN, "train", 1, 1)
    of = layout.of_training({"weight": (d,)}, ["weight"], BOUNDS, control=False)
    return Work(of, received, trained, request, attempt)


@contextmanager
def forced(degree: int | None) -> Iterator[None]:
    """Let every site have so many neighbours, which no setting of the product does; None changes nothing."""
    own = graph.degree_of
    if degree is not None:
        graph.degree_of = lambda _: degree
    try:
        yield
    finally:
        graph.degree_of = own


def client_once(n: int, degree: int | None, d: int, seed: int = 0) -> Timing:
    """All that one client does in a round without drops, training excluded.

    Args:
        n: clients in the round.
        degree: neighbours of each client, None for the protocol's own number.
        d: parameters.
        seed: of weights and update; keys are new each time.

    Raises:
        RuntimeError: the vector that was sent is not opened by what the peers hold.
    """
    work, clock = work_of(d, seed), Clock()
    peers = [Site.new(name, work.attempt) for name in _names(n) if name != _names(n)[n // 2]]
    own, private = _names(n)[n // 2], Ed25519PrivateKey.generate()
    entries = {p.name: p.private for p in peers} | {own: private}
    roster = Roster("timed", 1, {name: _entry(key) for name, key in entries.items()})
    anchors = Anchors(own, private, lambda: roster, lambda: 3)
    with forced(degree), tempfile.TemporaryDirectory() as folder:
        answers = SecureAnswers(anchors, Answered(Path(folder)))
        address = Address(RUN, 1)
        begun = clock.time(
            "begin",
            lambda: answers.begin(protocol.TRAIN, work.request, address, 1, work.contribute),
        )
        talk = _Peers(work.attempt, peers, transcript.unpack_bundles(begun[messages.BUNDLE])[0])
        counted = len(begun[messages.BUNDLE])
        replies: dict[str, RecordDict] = {}
        for kind, told in (
            (messages.SHARE, talk.bundles),
            (messages.MASKED, talk.sharers),
            (messages.COMMIT, talk.survivors),
            (messages.UNMASK, talk.signatures),
        ):
            values = {messages.PURPOSE: "train", messages.ATTEMPT: 1, **told(replies)}
            asked = RecordDict({messages.SECURE: messages.record(values)})
            replies[kind] = clock.time(
                kind.removeprefix("query.secagg_"),
                lambda kind=kind, asked=asked: answers.step(kind, asked, address),
            )
            counted += _bytes(asked) + _bytes(replies[kind])
    sent = replies[messages.MASKED][protocol.ARRAYS][messages.VECTOR]
    talk.require_opened(replies, work.contribute())
    return clock.timing(len(sent.data), counted)


def server_once(n: int, degree: int | None, d: int, dropped: float = 0.0, seed: int = 0) -> Timing:
    """What the server does with the replies of a round, up to the new weights.

    Args:
        n: clients in the round.
        degree: neighbours of each client, None for the protocol's own number.
        d: parameters.
        dropped: fraction of the clients that drop between the boxes and the upload, spread evenly.
        seed: of weights and update; keys are new each time.

    Raises:
        RuntimeError: the sum found is not the one that was sent.
    """
    work, clock = work_of(d, seed), Clock()
    with forced(degree):
        sites = {name: Site.new(name, work.attempt) for name in _names(n)}
        lost = {list(sites)[i * n // round(n * dropped)] for i in range(round(n * dropped))}
        alive = [name for name in sites if name not in lost]
        plain = work.contribute().encode(n, os.urandom(32))
        group = clock.time("begin", lambda: _group(work, sites))
        shares = _shares(group, sites, lost)
        for name in sites:
            reply = _share_reply(group, sites[name])
            clock.time("share", lambda r=reply, n=name: _hear_share(group, n, r))
        clock.time("masked", lambda: [messages.record(group.masked_values(s)) for s in sites])
        each = max(1, BATCH // plain.nbytes)
        for start in range(0, len(alive), each):
            some = alive[start : start + each]
            uploads = [(name, _upload(group, sites, name, lost, plain)) for name in some]
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
        if wrong or not np.array_equal(total, plain * np.uint32(len(alive))):
            raise RuntimeError("secure sum: must be the sum of what was sent, got another")
        found = clock.time("decode", lambda: _decode(work, total, n, len(alive)))
    if not all(np.allclose(found[k].numpy(), a, atol=1e-6) for k, a in work.trained.items()):
        raise RuntimeError("weights: must be those that every site trained, got others")
    return clock.timing()


class _Peers:
    """What the peers say to one client, and what they can open of it."""

    def __init__(self, attempt: Attempt, peers: list[Site], own: Bundle) -> None:
        self._peers, self._own = peers, own
        self._all = sorted([own, *(p.bundle for p in peers)], key=lambda b: b.site)
        self._t = transcript.transcript(attempt, self._all)
        self._names = [b.site for b in self._all]
        self._at = self._names.index(own.site)
        near = graph.neighbours(self._t, len(self._all))[self._at]
        self._near = {self._names[i] for i in near}
        self._xs = {self._names[i]: i + 1 for i in near}
        digest = transcript.digest_of(self._names)
        self._commitment = transcript.commit_statement(self._t, digest, digest)

    def bundles(self, _: Mapping[str, RecordDict]) -> dict[str, bytes]:
        return {messages.BUNDLES: messages.joined(self._all)}

    def sharers(self, replies: Mapping[str, RecordDict]) -> dict[str, bytes]:
        shared = replies[messages.SHARE][messages.SECURE]
        commitment, signature = shared[messages.COMMITMENT], shared[messages.SIGNATURE]
        found = [Sharer(self._own.site, commitment, signature, b"")]
        for p in self._peers:
            box = b""
            if p.name in self._near:
                # What a share says is for the others; the client only keeps it.
                key = self._box_key(p, p.name, self._own.site)
                box = boxes.seal(key, os.urandom(66), self._t, p.name, self._own.site)
            hashed = hashlib.sha256(p.seed).digest()
            statement = transcript.share_statement(self._t, p.name, hashed)
            found.append(Sharer(p.name, hashed, p.private.sign(statement), box))
        return {messages.SHARERS: messages.joined(sorted(found, key=lambda s: s.site))}

    def survivors(self, _: Mapping[str, RecordDict]) -> dict[str, bytes]:
        return {messages.SURVIVORS: transcript.pack_sites(self._names)}

    def signatures(self, replies: Mapping[str, RecordDict]) -> dict[str, bytes]:
        own = Signed(self._own.site, replies[messages.COMMIT][messages.SECURE][messages.SIGNATURE])
        others = [Signed(p.name, p.private.sign(self._commitment)) for p in self._peers]
        signed = sorted([own, *others], key=lambda s: s.site)
        return {messages.SIGNATURES: messages.joined(signed)}

    def require_opened(
        self, replies: Mapping[str, RecordDict], given: contribution.Contribution
    ) -> None:
        """Open the client's vector with the shares it gave the peers."""
        raw = replies[messages.SHARE][messages.SECURE][messages.BOXES]
        size, own = messages.BOX_BYTES, self._own.site
        shares = {}
        masks = []
        by_name = {p.name: p for p in self._peers}
        for i, name in enumerate(sorted(self._near)):
            peer = by_name[name]
            key, sealed = self._box_key(peer, own, name), raw[i * size : (i + 1) * size]
            opened = boxes.open_box(key, sealed, self._t, own, name)
            shares[self._xs[name]] = opened[: messages.SHARE_BYTES]
            agreed = agreement.shared(peer.mask, self._own.mask_key)
            sign = -1 if own < name else 1
            masks.append((agreement.mask_key(agreed, self._t, own, name), sign))
        seed = shamir.combine(shares, graph.threshold(len(self._near) + 1))
        masks.append((agreement.self_mask_key(seed, self._t), -1))
        record = replies[messages.MASKED][protocol.ARRAYS][messages.VECTOR]
        vector = np.frombuffer(record.data, "<u4").copy()
        masking.add_masks(vector, masks)
        key = contribution.rounding_key(1, "train", 1, own)
        if not np.array_equal(vector, given.encode(len(self._all), key)):
            raise RuntimeError("vector: must be opened by what the peers hold, got another")

    def _box_key(self, peer: Site, src: str, dst: str) -> bytes:
        shared = agreement.shared(peer.box, self._own.box_key)
        return agreement.box_key(shared, self._t, src, dst)


def _group(work: Work, sites: Mapping[str, Site]) -> Group:
    found = {}
    for name, site in sites.items():
        (found[name],) = transcript.unpack_bundles(site.bundle.encode())
    group = Group(work.attempt, work.of.length, found)
    for _ in sites:
        messages.record(group.share_values())
    return group


def _shares(group: Group, sites: Mapping[str, Site], lost: set[str]) -> dict[str, dict[str, bytes]]:
    """By holder and owner, a share of the one secret of each owner that will be asked for."""
    held: dict[str, dict[str, bytes]] = {name: {} for name in sites}
    at = {name: i + 1 for i, name in enumerate(group.sites)}
    for owner, site in sites.items():
        holders = sorted([owner, *group.neighbours[owner]])
        secret = site.mask.private_bytes() if owner in lost else site.seed
        split = shamir.split(secret, graph.threshold(len(holders)), [at[h] for h in holders])
        for holder in holders:
            held[holder][owner] = split[at[holder]]
    return held


def _share_reply(group: Group, site: Site) -> ConfigRecord:
    size = messages.BOX_BYTES * len(group.neighbours[site.name])
    return messages.record(
        {
            messages.COMMITMENT: hashlib.sha256(site.seed).digest(),
            messages.SIGNATURE: os.urandom(64),
            messages.BOXES: os.urandom(size),
        }
    )


def _upload(
    group: Group, sites: Mapping[str, Site], name: str, lost: set[str], plain: Vector
) -> RecordDict:
    """A masked vector; masks between two sites that both upload cancel in the sum, so they are left out."""
    site, vector = sites[name], plain.copy()
    masks = [(agreement.self_mask_key(site.seed, group.t), 1)]
    for peer in group.neighbours[name]:
        if peer in lost:
            agreed = agreement.shared(site.mask, sites[peer].mask.public)
            key = agreement.mask_key(agreed, group.t, name, peer)
            masks.append((key, 1 if name < peer else -1))
    masking.add_masks(vector, masks)
    checksum = masking.checksum(vector).to_bytes(8, "big")
    values = {messages.SIGNATURE: os.urandom(64), messages.CHECKSUM: checksum}
    return RecordDict(
        {messages.SECURE: messages.record(values), protocol.ARRAYS: messages.vector_record(vector)}
    )


def _hear_share(group: Group, name: str, reply: ConfigRecord) -> None:
    group.take_share(name, reply)


def _hear_masked(group: Group, uploads: list[tuple[str, RecordDict]]) -> None:
    for name, content in uploads:
        group.take_masked(name, content)


def _hear_commit(group: Group, alive: list[str], reply: ConfigRecord) -> None:
    for name in alive:
        messages.record(group.commit_values())
        group.take_commit(name, reply)


def _hear_shares(group: Group, replies: Mapping[str, ConfigRecord]) -> None:
    for name, reply in replies.items():
        messages.record(group.unmask_values())
        group.take_unmask(name, reply)


def _decode(work: Work, total: Vector, sharers: int, sites: int) -> ArrayRecord:
    """As ``SecureSums`` and FedAvg: counters, mean update, its norm, new weights, the next round's record."""
    of = work.of
    counted = limbs.decode_counters(total[of.values :], of.counters, sites)
    flat = encoding.decode(total[: of.values], of.segments, sharers)
    weight = counted[layout.EXAMPLES] / BOUNDS.weight_cap
    if not np.linalg.norm(flat) <= BOUNDS.clipping_bound * weight * 1.001:
        raise RuntimeError("secure sum: must be within its bound, got more")
    changes = of.unflatten(flat / weight)
    mean = {name: (a + changes[name]).astype(np.float32) for name, a in work.received.items()}
    return ArrayRecord({name: Array(a) for name, a in mean.items()})


def _names(n: int) -> list[str]:
    return [f"site-{i:04d}" for i in range(n)]


def _entry(private: Ed25519PrivateKey) -> Any:
    return entry_of(private.public_key().public_bytes_raw(), date.max)


def _bytes(content: RecordDict) -> int:
    values = content[messages.SECURE].values()
    return sum(len(value) for value in values if isinstance(value, bytes))


class Clock:
    """Seconds of each part; calls of one part add up, and garbage is collected before its first."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}

    def time(self, part: str, work: Callable[[], Result]) -> Result:
        """Do and time a piece of work."""
        if part not in self._parts:
            gc.collect()
        started = time.perf_counter()
        result = work()
        self._parts[part] = self._parts.get(part, 0.0) + time.perf_counter() - started
        return result

    def timing(self, upload_bytes: int = 0, other_bytes: int = 0) -> Timing:
        """All parts."""
        return Timing(sum(self._parts.values()), upload_bytes, self._parts, other_bytes)
