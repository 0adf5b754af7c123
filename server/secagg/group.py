"""The server's side of one secure sum: what it has heard of whom, and what it says next.

Pure bookkeeping, no network. The server holds no secret before the last exchange, and then only those that open the
sum: of each site either the seed of its own mask or the key of its pairwise masks, never both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from numpy.typing import NDArray

from fedge.shared import protocol
from fedge.shared.secagg import (
    key_agreement,
    masking,
    messages,
    neighbour_graph,
    shamir,
    transcript,
)
from fedge.shared.secagg.masking import Shape
from fedge.shared.secagg.messages import (
    CIPHERTEXT_BYTES,
    ENCRYPTED_SHARE_BYTES,
    SHARE_BYTES,
    Sharer,
    Signed,
)
from fedge.shared.secagg.transcript import HASH_BYTES, Attempt, KeyAdvertisement
from fedge.shared.wire.npy import decode_raw


class LostError(Exception):
    """Too few sites are left, or a secret cannot be recovered: the attempt is over.

    Attributes:
        dealers: sites that shared something else than the secret that they committed to, which is then proved.
    """

    def __init__(self, message: str, dealers: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.dealers = dealers


@dataclass
class Group:
    """One attempt at one sum.

    Attributes:
        attempt: as in every request of it.
        shape: of the vector.
        bundles: by site, sorted: who answered exchange 0.
        sharers: by site: who answered exchange 1, with commitment and signature.
        encrypted_shares: of each sharer, by the site that they are for, with the hashes of both shares.
        total: sum of the masked vectors: values modulo 2^32, counters modulo 2^128.
        survivors: whose vector is in it.
        signatures: of the survivors on the list of survivors.
        shares: by the site that gave them, by the site that they are of.
    """

    attempt: Attempt
    shape: Shape
    bundles: dict[str, KeyAdvertisement]
    sharers: dict[str, Sharer] = field(default_factory=dict)
    encrypted_shares: dict[str, dict[str, bytes]] = field(default_factory=dict)
    total: NDArray[np.uint32] = field(default_factory=lambda: np.zeros(0, np.uint32))
    survivors: list[str] = field(default_factory=list)
    signatures: dict[str, bytes] = field(default_factory=dict)
    shares: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bundles = dict(sorted(self.bundles.items()))
        self.sites = list(self.bundles)
        # Where each site's shares lie.
        self._x = {site: x for x, site in enumerate(self.sites, 1)}
        self.t = transcript.transcript(self.attempt, list(self.bundles.values()))
        indices = neighbour_graph.neighbours(self.t, len(self.sites))
        self.neighbours = {
            site: [self.sites[i] for i in near]
            for site, near in zip(self.sites, indices, strict=True)
        }
        self.threshold = neighbour_graph.threshold(len(self.sites))
        self._heard: dict[str, tuple[NDArray[np.uint32], int]] = {}
        # What every site is told alike is put together once.
        self._bundled = self._signed = b""
        if not self.total.size:
            self.total = masking.zeros(self.shape.length)

    def require(self, left: Iterable[str], exchange: str) -> None:
        """Go on only with as many sites as the clients will ask for.

        Raises:
            LostError: fewer.
        """
        count = len(list(left))
        if count < self.threshold:
            raise LostError(f"{exchange}: must be answered by {self.threshold} sites, got {count}")

    # Exchange 1.

    def share_values(self) -> dict[str, bytes]:
        """What every site is told: all bundles."""
        if not self._bundled:
            self._bundled = messages.joined(list(self.bundles.values()))
        return {messages.BUNDLES: self._bundled}

    def take_share(self, site: str, values: ConfigRecord) -> None:
        """A site's commitment and encrypted shares.

        Raises:
            ValueError: malformed.
        """
        near = self.neighbours[site]
        size = ENCRYPTED_SHARE_BYTES * len(near)
        raw = messages.data(values, messages.ENCRYPTED_SHARES, size, size)
        commitment = messages.data(values, messages.COMMITMENT, 32, 32)
        signature = messages.data(values, messages.SIGNATURE, 64, 64)
        self.encrypted_shares[site] = dict(zip(near, _cut(raw, ENCRYPTED_SHARE_BYTES), strict=True))
        self.sharers[site] = Sharer(site, commitment, signature, b"")

    # Exchange 2.

    def masked_values(self, site: str) -> dict[str, bytes]:
        """What one site is told: who shared, with the shares encrypted for it."""
        told = [
            self.sharers[peer].encode_with(self.encrypted_shares[peer].get(site, b""))
            for peer in sorted(self.sharers)
        ]
        return {messages.SHARERS: b"".join(told)}

    def take_masked(self, site: str, content: RecordDict) -> NDArray[np.uint32]:
        """A site's vector, which ``add_masked`` will add to the sum.

        Returns:
            It, as it came.

        Raises:
            ValueError: malformed.
        """
        values = messages.values_of(content)
        messages.data(values, messages.SIGNATURE, 64, 64)
        arrays = content.get(protocol.ARRAYS)
        if not isinstance(arrays, ArrayRecord) or list(arrays) != [messages.VECTOR]:
            raise ValueError(f"must hold one array, {messages.VECTOR}, got another")
        vector = decode_raw(arrays[messages.VECTOR], self.shape.length, np.dtype("<u4"))
        told = int.from_bytes(messages.data(values, messages.CHECKSUM, 8, 8), "big")
        self._heard[site] = (vector, told)
        return vector

    def add_masked(self) -> dict[str, str]:
        """Add what was heard since the last call; who is in the sum survives.

        Returns:
            By site: what is wrong with a vector. It is not in the sum.
        """
        heard, self._heard = self._heard, {}
        wrong: dict[str, str] = {}
        counters = self.shape.counters
        vectors = [vector for vector, _ in heard.values()]
        found = masking.add_vectors(self.total, vectors, counters=counters)
        for (site, (vector, told)), value in zip(heard.items(), found, strict=True):
            if value != told:
                masking.subtract_vector(self.total, vector, counters=counters)
                wrong[site] = "masked vector: must have the checksum that was signed, got another"
        self.survivors = sorted({*self.survivors, *heard} - wrong.keys())
        return wrong

    # Exchange 3.

    def commit_values(self) -> dict[str, bytes]:
        """What every survivor is told: who survived."""
        return {messages.SURVIVORS: transcript.pack_sites(self.survivors)}

    def take_commit(self, site: str, values: ConfigRecord) -> None:
        """A survivor's signature.

        Raises:
            ValueError: malformed.
        """
        self.signatures[site] = messages.data(values, messages.SIGNATURE, 64, 64)
        self._signed = b""

    # Exchange 4.

    def unmask_values(self) -> dict[str, bytes]:
        """What every survivor is told: that the others signed."""
        if not self._signed:
            signed = [Signed(site, s) for site, s in sorted(self.signatures.items())]
            self._signed = messages.joined(signed)
        return {messages.SIGNATURES: self._signed}

    def holds(self, site: str) -> list[str]:
        """Of whom a site holds shares, sorted."""
        return sorted({site, *(p for p in self.neighbours[site] if p in self.sharers)})

    def take_unmask(self, site: str, values: ConfigRecord) -> None:
        """A survivor's shares.

        Raises:
            ValueError: malformed.
        """
        peers = self.holds(site)
        size = SHARE_BYTES * len(peers)
        raw = messages.data(values, messages.SHARES, size, size)
        self.shares[site] = dict(zip(peers, _cut(raw, SHARE_BYTES), strict=True))

    def unmask(self) -> tuple[NDArray[np.uint32], set[str]]:
        """Take the masks off the sum, in place: it can be done once.

        Returns:
            The sum of the survivors' vectors, and the sites that gave another share than they had been dealt.

        Raises:
            LostError: a secret cannot be recovered.
        """
        alive, wrong = set(self.survivors), set[str]()
        masks: list[tuple[bytes, int]] = []
        dealers: list[str] = []
        lost: list[str] = []
        for site in sorted(self.sharers):
            try:
                secret = self._recover(site, wrong)
                if site in alive:
                    masks.append((key_agreement.self_mask_key(secret, self.t), -1))
                    continue
                pair = key_agreement.Pair.from_private(secret)
                near = [p for p in self.neighbours[site] if p in alive]
                masks += [self._pair_mask(pair, site, p) for p in near]
            except LostError as error:
                dealers += error.dealers
                lost.append(str(error))
        if lost:
            raise LostError("; ".join(lost), tuple(dealers))
        total, self.total = self.total, np.zeros(0, np.uint32)
        masking.add_masks(total, masks, counters=self.shape.counters)
        return total, wrong

    def _pair_mask(self, pair: key_agreement.Pair, lost: str, peer: str) -> tuple[bytes, int]:
        """What takes the mask between a lost site and a survivor off the sum."""
        try:
            agreed = key_agreement.shared(pair, self.bundles[peer].mask_key)
        except ValueError as error:
            raise LostError(f"{peer}: {error}") from None
        return key_agreement.mask_key(agreed, self.t, peer, lost), -1 if peer < lost else 1

    def _recover(self, site: str, wrong: set[str]) -> bytes:
        """A lost site's mask key, or a survivor's seed, whichever was asked for.

        Raises:
            LostError: too few of its shares are left, or those that it dealt do not give what it committed to.
        """
        survived = site in self.survivors
        # After the ciphertext: the hash of the share of the seed, then that of the share of the mask key.
        start = CIPHERTEXT_BYTES if survived else CIPHERTEXT_BYTES + HASH_BYTES
        dealt, given = self.encrypted_shares[site], dict[int, bytes]()
        for holder in self.neighbours[site]:
            share = self.shares.get(holder, {}).get(site)
            if share is None:
                continue
            if hashlib.sha256(share).digest() == dealt[holder][start : start + HASH_BYTES]:
                given[self._x[holder]] = share
            else:
                # The holder has found it right when it got it.
                wrong.add(holder)
        threshold = neighbour_graph.threshold(len(self.neighbours[site]) + 1)
        own = self.shares.get(site, {}).get(site)
        # Its own share has no hash: nobody else can be to blame for it.
        if len(given) < threshold and own is not None:
            given[self._x[site]] = own
        if len(given) < threshold:
            raise LostError(f"shares of {site}: must be {threshold} right ones, got {len(given)}")
        is_right = self._is_seed if survived else self._is_mask_key
        try:
            secret = shamir.combine(given, threshold)
        except ValueError:
            # Shares of a number that is no secret, as their dealer has dealt them: no commitment makes that right.
            secret = None
        if secret is None or not is_right(site, secret):
            why = "must give the secret that it committed to, got another"
            raise LostError(f"shares of {site}: {why}", (site,))
        return secret

    def _is_seed(self, site: str, secret: bytes) -> bool:
        return hashlib.sha256(secret).digest() == self.sharers[site].commitment

    def _is_mask_key(self, site: str, secret: bytes) -> bool:
        public = self.bundles[site].mask_key
        return key_agreement.Pair.from_private(secret).public == public


def to_json(group: Group) -> dict[str, object]:
    """What must outlive the coordinator before the last two exchanges, without the sum itself."""
    a = group.attempt
    return {
        "attempt": [a.request_digest.hex(), a.run_id, a.purpose, a.server_round, a.number],
        "shape": list(group.shape),
        "bundles": messages.joined(list(group.bundles.values())).hex(),
        "sharers": messages.joined([group.sharers[s] for s in sorted(group.sharers)]).hex(),
        "share_hashes": {
            site: b"".join(dealt[p][CIPHERTEXT_BYTES:] for p in group.neighbours[site]).hex()
            for site, dealt in sorted(group.encrypted_shares.items())
        },
        "survivors": group.survivors,
    }


def from_json(told: Mapping[str, Any], total: NDArray[np.uint32]) -> Group:
    """The reverse of ``to_json``.

    Raises:
        ValueError, KeyError, TypeError: damaged.
    """
    job, run_id, purpose, server_round, number = told["attempt"]
    bundles = transcript.unpack_advertisements(bytes.fromhex(told["bundles"]))
    sharers = messages.sharers_of(
        messages.record({messages.SHARERS: bytes.fromhex(told["sharers"])})
    )
    shape = Shape(*map(int, told["shape"]))
    if total.shape != (shape.length,) or total.dtype != np.uint32:
        raise ValueError("sum: must have the length that was written down, got another")
    group = Group(
        Attempt(bytes.fromhex(job), run_id, purpose, server_round, number),
        shape,
        {b.site: b for b in bundles},
        {s.site: s for s in sharers},
        {},
        total,
        list(told["survivors"]),
    )
    hashes = {site: bytes.fromhex(one) for site, one in told["share_hashes"].items()}
    for site in group.sharers:
        # The ciphertexts have been sent to whom they are for, and nobody is sent them again.
        held = [bytes(CIPHERTEXT_BYTES) + h for h in _cut(hashes[site], 2 * HASH_BYTES)]
        group.encrypted_shares[site] = dict(zip(group.neighbours[site], held, strict=True))
    return group


def _cut(raw: bytes, size: int) -> list[bytes]:
    return [raw[start : start + size] for start in range(0, len(raw), size)]
