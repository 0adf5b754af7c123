"""A round of our secure aggregation made ready: what others send to the side that fedge_secagg.py times."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedge.client.secagg import input_vector
from fedge.client.secagg.session import Anchors
from fedge.server.secagg.group import Group
from fedge.shared import protocol
from fedge.shared.roster.draft import entry_of
from fedge.shared.roster.roster import Roster
from fedge.shared.secagg import (
    key_agreement,
    masking,
    messages,
    neighbour_graph,
    request_digest,
    shamir,
    share_encryption,
    transcript,
    vector_layout,
)
from fedge.shared.secagg.messages import Sharer, Signed
from fedge.shared.secagg.transcript import MIN_SITES, Attempt, KeyAdvertisement
from fedge.shared.secagg.vector_layout import Bounds

RUN: Final = "timed"
#: Neither clip nor cap binds.
BOUNDS: Final = Bounds(clipping_bound=100.0, value_bound=0.1, state_bound=1.0, weight_cap=1000)
#: Every client's.
EXAMPLES: Final = 250

Vector = NDArray[np.uint32]


@dataclass(frozen=True)
class Site:
    """A peer, with all its secrets."""

    name: str
    private: Ed25519PrivateKey
    encryption: key_agreement.Pair
    mask: key_agreement.Pair
    seed: bytes
    bundle: KeyAdvertisement

    @classmethod
    def new(cls, name: str, attempt: Attempt) -> Site:
        """A site with new keys."""
        private = Ed25519PrivateKey.generate()
        encryption, mask = key_agreement.Pair.generate(), key_agreement.Pair.generate()
        bundle = transcript.new_advertisement(
            attempt, name, encryption.public, mask.public, private
        )
        return cls(name, private, encryption, mask, os.urandom(32), bundle)


@dataclass(frozen=True)
class Work:
    """The request to every site, and one site's update.

    Attributes:
        layout: of the vector.
        received: the round's weights.
        trained: the same after training.
        request: to train.
        attempt: as all sites compute it from the request.
    """

    layout: vector_layout.Layout
    received: dict[str, NDArray[Any]]
    trained: dict[str, NDArray[Any]]
    request: RecordDict
    attempt: Attempt

    def contribute(self) -> input_vector.InputVector:
        """The part of a site that trained."""
        return input_vector.training(
            self.layout, BOUNDS, self.received, self.trained, EXAMPLES, loss=0.5
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
    attempt = Attempt(request_digest.digest(protocol.TRAIN, request), RUN, "train", 1, 1)
    layout = vector_layout.of_training({"weight": (d,)}, ["weight"], BOUNDS, control=False)
    return Work(layout, received, trained, request, attempt)


class Peers:
    """The peers' messages to one client, and the unmasking of its vector."""

    def __init__(self, attempt: Attempt, peers: list[Site], own: KeyAdvertisement) -> None:
        self._peers, self._own = peers, own
        self._all = sorted([own, *(p.bundle for p in peers)], key=lambda b: b.site)
        self._t = transcript.transcript(attempt, self._all)
        self._names = [b.site for b in self._all]
        self._at = self._names.index(own.site)
        near = neighbour_graph.neighbours(self._t, len(self._all))[self._at]
        self._near = {self._names[i] for i in near}
        self._xs = {self._names[i]: i + 1 for i in near}
        digest = transcript.digest_of(self._names)
        self._commitment = transcript.commit_statement(self._t, digest, digest)

    def bundles(self, _: Mapping[str, RecordDict]) -> dict[str, bytes]:
        """Exchange 1: key advertisements of all sites."""
        return {messages.BUNDLES: messages.joined(self._all)}

    def sharers(self, replies: Mapping[str, RecordDict]) -> dict[str, bytes]:
        """Exchange 2: the sites that shared, with an encrypted share of each neighbour."""
        shared = replies[messages.SHARE][messages.SECURE]
        commitment, signature = shared[messages.COMMITMENT], shared[messages.SIGNATURE]
        entries = [Sharer(self._own.site, commitment, signature, b"")]
        for p in self._peers:
            encrypted = b""
            if p.name in self._near:
                # What a share says is for the others; the client only keeps it.
                key = self._encryption_key(p, p.name, self._own.site)
                plain = os.urandom(2 * messages.SHARE_BYTES)
                encrypted = share_encryption.encrypt_share(
                    key, plain, self._t, p.name, self._own.site
                )
                halves = plain[: messages.SHARE_BYTES], plain[messages.SHARE_BYTES :]
                encrypted += b"".join(hashlib.sha256(half).digest() for half in halves)
            hashed = hashlib.sha256(p.seed).digest()
            statement = transcript.share_statement(self._t, p.name, hashed)
            entries.append(Sharer(p.name, hashed, p.private.sign(statement), encrypted))
        return {messages.SHARERS: messages.joined(sorted(entries, key=lambda s: s.site))}

    def survivors(self, _: Mapping[str, RecordDict]) -> dict[str, bytes]:
        """Exchange 3: all of them."""
        return {messages.SURVIVORS: transcript.pack_sites(self._names)}

    def signatures(self, replies: Mapping[str, RecordDict]) -> dict[str, bytes]:
        """Exchange 4: signatures of all sites under that list."""
        own = Signed(self._own.site, replies[messages.COMMIT][messages.SECURE][messages.SIGNATURE])
        others = [Signed(p.name, p.private.sign(self._commitment)) for p in self._peers]
        signed = sorted([own, *others], key=lambda s: s.site)
        return {messages.SIGNATURES: messages.joined(signed)}

    def require_unmasked(
        self, replies: Mapping[str, RecordDict], sent: input_vector.InputVector
    ) -> None:
        """Unmask the client's vector with the shares that it sent to the peers and the one that it revealed."""
        raw = replies[messages.SHARE][messages.SECURE][messages.ENCRYPTED_SHARES]
        size, own = messages.ENCRYPTED_SHARE_BYTES, self._own.site
        revealed = replies[messages.UNMASK][messages.SECURE][messages.SHARES]
        place = messages.SHARE_BYTES * sorted([*self._near, own]).index(own)
        shares = {self._at + 1: revealed[place : place + messages.SHARE_BYTES]}
        masks = []
        by_name = {p.name: p for p in self._peers}
        for i, name in enumerate(sorted(self._near)):
            peer = by_name[name]
            key = self._encryption_key(peer, own, name)
            sealed = raw[i * size : i * size + messages.CIPHERTEXT_BYTES]
            decrypted = share_encryption.decrypt_share(key, sealed, self._t, own, name)
            shares[self._xs[name]] = decrypted[: messages.SHARE_BYTES]
            agreed = key_agreement.shared(peer.mask, self._own.mask_key)
            sign = -1 if own < name else 1
            masks.append((key_agreement.mask_key(agreed, self._t, own, name), sign))
        seed = shamir.combine(shares, neighbour_graph.threshold(len(self._near) + 1))
        masks.append((key_agreement.self_mask_key(seed, self._t), -1))
        record = replies[messages.MASKED][protocol.ARRAYS][messages.VECTOR]
        vector = np.frombuffer(record.data, "<u4").copy()
        masking.add_masks(vector, masks, counters=sent.layout.shape.counters)
        key = input_vector.rounding_key(1, "train", 1, own)
        if not np.array_equal(vector, sent.encode(len(self._all), key)):
            raise RuntimeError("vector: must be unmasked by the peers' shares, got another")

    def _encryption_key(self, peer: Site, src: str, dst: str) -> bytes:
        shared = key_agreement.shared(peer.encryption, self._own.encryption_key)
        return key_agreement.share_encryption_key(shared, self._t, src, dst)


def shares_of(
    group: Group, sites: Mapping[str, Site], dropped: set[str]
) -> dict[str, dict[str, bytes]]:
    """By holder and owner, a share of the one secret of each owner that will be requested."""
    held: dict[str, dict[str, bytes]] = {name: {} for name in sites}
    at = {name: i + 1 for i, name in enumerate(group.sites)}
    for owner, site in sites.items():
        holders = sorted([owner, *group.neighbours[owner]])
        secret = site.mask.private_bytes() if owner in dropped else site.seed
        split = shamir.split(
            secret, neighbour_graph.threshold(len(holders)), [at[h] for h in holders]
        )
        for holder in holders:
            held[holder][owner] = split[at[holder]]
    return held


def share_reply(
    group: Group, site: Site, shares: Mapping[str, Mapping[str, bytes]]
) -> ConfigRecord:
    """A reply to exchange 1; the server reads neither the encrypted shares nor the signature.

    Both hashes are of the one secret's share that will be requested.
    """
    dealt = [
        os.urandom(messages.CIPHERTEXT_BYTES)
        + 2 * hashlib.sha256(shares[holder][site.name]).digest()
        for holder in group.neighbours[site.name]
    ]
    return messages.record(
        {
            messages.COMMITMENT: hashlib.sha256(site.seed).digest(),
            messages.SIGNATURE: os.urandom(64),
            messages.ENCRYPTED_SHARES: b"".join(dealt),
        }
    )


def upload_of(
    group: Group, sites: Mapping[str, Site], name: str, dropped: set[str], plain: Vector
) -> RecordDict:
    """A masked vector; masks between two sites that both upload cancel in the sum, so they are left out."""
    site, vector = sites[name], plain.copy()
    masks = [(key_agreement.self_mask_key(site.seed, group.t), 1)]
    for peer in group.neighbours[name]:
        if peer in dropped:
            agreed = key_agreement.shared(site.mask, sites[peer].mask.public)
            key = key_agreement.mask_key(agreed, group.t, name, peer)
            masks.append((key, 1 if name < peer else -1))
    masking.add_masks(vector, masks, counters=group.shape.counters)
    checksum = masking.checksum(vector).to_bytes(8, "big")
    values = {messages.SIGNATURE: os.urandom(64), messages.CHECKSUM: checksum}
    return RecordDict(
        {messages.SECURE: messages.record(values), protocol.ARRAYS: messages.vector_record(vector)}
    )


def names_of(n: int) -> list[str]:
    """Names of sites, sorted."""
    return [f"site-{i:04d}" for i in range(n)]


def anchors_of(own: str, peers: list[Site]) -> Anchors:
    """Trust anchors of a site: a key, and the roster with all keys in it."""
    private = Ed25519PrivateKey.generate()
    keys = {peer.name: peer.private for peer in peers} | {own: private}
    raw = {name: key.public_key().public_bytes_raw() for name, key in keys.items()}
    roster = Roster("timed", 1, {name: entry_of(raw[name], date.max) for name in raw})
    return Anchors(own, private, lambda: roster, lambda: MIN_SITES)
