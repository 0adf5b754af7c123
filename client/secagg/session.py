"""A site's part in one secure sum: five steps, each taken once, each checked against what the site itself holds.

Practical Secure Aggregation for Privacy-Preserving Machine Learning, CCS 2017, https://eprint.iacr.org/2017/281, in its
version against active servers, with the sparse graph of Secure Single-Server Aggregation with (Poly)Logarithmic
Overhead, CCS 2020, https://eprint.iacr.org/2020/704, where many sites take part. What the server says is believed
nowhere: keys are looked up in the roster, the threshold is computed here, and an answer is given once.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Final

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from numpy.typing import NDArray

from fedge.client.secagg.input_vector import InputVector
from fedge.shared.errors import SiteError
from fedge.shared.roster.roster import Roster
from fedge.shared.secagg import (
    key_agreement,
    masking,
    neighbour_graph,
    shamir,
    share_encryption,
    transcript,
)
from fedge.shared.secagg.messages import (
    CIPHERTEXT_BYTES,
    SHARE_BYTES,
    Sharer,
    Signed,
)
from fedge.shared.secagg.transcript import MIN_SITES, Attempt, KeyAdvertisement

PROTOCOL_VIOLATION: Final = 422
TOO_FEW: Final = 424


class PeerError(SiteError):
    """Fault is found with a peer, as the server presents it.

    Attributes:
        peer: its name.
    """

    def __init__(self, code: int, peer: str, message: str) -> None:
        super().__init__(code, f"{peer}: {message}")
        self.peer = peer


@dataclass(frozen=True)
class Anchors:
    """What a site trusts, none of it from the server.

    Attributes:
        site: its own name.
        private: its key in the roster.
        roster: as it is now.
        min_sites: fewest sites of a sum, as its policy is now.
        today: the date by which roster entries expire.
    """

    site: str
    private: Ed25519PrivateKey
    roster: Callable[[], Roster]
    min_sites: Callable[[], int]
    today: Callable[[], date] = lambda: datetime.now(UTC).date()


@dataclass(frozen=True)
class Shared:
    """What a site gives out in exchange 1: encrypted shares in the order of its neighbours' names."""

    commitment: bytes
    signature: bytes
    encrypted_shares: bytes


@dataclass(frozen=True)
class Masked:
    """What a site gives out in exchange 2."""

    vector: NDArray[np.uint32]
    signature: bytes
    checksum: int


class Session:
    """One attempt at one sum, at one site.

    Args:
        anchors: the site's own.
        attempt: as the request says.
        contribution: the site's.
        rounding_key: of its stochastic rounding.
        note: writes down that the round is answered, before the list of survivors is signed.
        min_sites: fewest sites of this sum, besides what the policy asks for.
        allow: raises where these survivors, of which there must be so many, may not be in one sum.
    """

    def __init__(
        self,
        anchors: Anchors,
        attempt: Attempt,
        contribution: InputVector,
        rounding_key: bytes,
        note: Callable[[], None],
        min_sites: int = 0,
        allow: Callable[[frozenset[str], int], None] | None = None,
    ) -> None:
        self.attempt = attempt
        self._anchors, self._note, self._allow = anchors, note, allow
        self._contribution: InputVector | None = contribution
        self._rounding_key, self._min_sites = rounding_key, min_sites
        self._box, self._mask = key_agreement.Pair.generate(), key_agreement.Pair.generate()
        self._seed = bytearray(os.urandom(32))
        self.bundle = transcript.new_advertisement(
            attempt, anchors.site, self._box.public, self._mask.public, anchors.private
        )
        self._t = b""
        self._bundles: dict[str, KeyAdvertisement] = {}
        self._keys: dict[str, Ed25519PublicKey] = {}
        self._neighbours: tuple[str, ...] = ()
        self._agreed: dict[str, tuple[bytes, bytes]] = {}
        self._threshold = 0
        self._shared: Shared | None = None
        self._held: dict[str, tuple[bytes, bytes]] = {}
        self._sharers: frozenset[str] = frozenset()
        self._survivors: frozenset[str] = frozenset()

    @property
    def survivors(self) -> frozenset[str]:
        """The sites whose list this one has signed; empty before."""
        return self._survivors

    @property
    def _least(self) -> int:
        return max(self._threshold, self._anchors.min_sites(), self._min_sites, MIN_SITES)

    @property
    def site(self) -> str:
        """The site's name."""
        return self._anchors.site

    def share(self, bundles: Sequence[KeyAdvertisement]) -> Shared:
        """Exchange 1: share both secrets among the neighbours.

        Args:
            bundles: of all sites, sorted by site.

        Raises:
            SiteError: 422, the own bundle is missing or another; 424, fewer sites than the policy asks for.
            PeerError: 421, the roster does not list a site; 422, a bundle is not signed with its key, or holds
                one that is none.
        """
        names, own = [b.site for b in bundles], self.site
        if self.bundle not in bundles:
            raise protocol_violation("bundles", "hold this site's own", "none or another")
        self._require_enough(len(bundles))
        roster, today = self._anchors.roster(), self._anchors.today()
        keys: dict[str, Ed25519PublicKey] = {}
        for bundle in bundles:
            try:
                keys[bundle.site] = roster.key_of(bundle.site, today)
            except SiteError as error:
                raise PeerError(error.code, bundle.site, error.message) from None
            if not transcript.verifies(self.attempt, bundle, keys[bundle.site]):
                raise PeerError(
                    PROTOCOL_VIOLATION,
                    bundle.site,
                    "the bundle must carry its signature for this job",
                )
        self._bundles, self._keys = dict(zip(names, bundles, strict=True)), keys
        self._t = transcript.transcript(self.attempt, bundles)
        self._threshold = neighbour_graph.threshold(len(bundles))
        at = names.index(own)
        holders = sorted((*neighbour_graph.neighbours(self._t, len(bundles))[at], at))
        self._neighbours = tuple(names[i] for i in holders if i != at)
        for peer in self._neighbours:
            self._agree(self._bundles[peer])
        least = neighbour_graph.threshold(len(holders))
        xs = [i + 1 for i in holders]
        of_seed = shamir.split(bytes(self._seed), least, xs)
        of_mask = shamir.split(self._mask.private_bytes(), least, xs)
        self._held = {own: (of_seed[at + 1], of_mask[at + 1])}
        sealed = [
            share_encryption.encrypt_share(
                self._share_key(own, names[i]),
                of_seed[i + 1] + of_mask[i + 1],
                self._t,
                own,
                names[i],
            )
            + hashlib.sha256(of_seed[i + 1]).digest()
            + hashlib.sha256(of_mask[i + 1]).digest()
            for i in holders
            if i != at
        ]
        commitment = hashlib.sha256(bytes(self._seed)).digest()
        signature = self._sign(transcript.share_statement(self._t, own, commitment))
        self._shared = Shared(commitment, signature, b"".join(sealed))
        return self._shared

    def masked(self, sharers: Sequence[Sharer]) -> Masked:
        """Exchange 2: decrypt the peers' shares, then mask the vector with all of them.

        Raises:
            SiteError: 422, the list is not one that the exchange before allows; 424, too few sites; 401.
            PeerError: 422, a peer's signature is missing; 425, a share does not decrypt.
        """
        names = [s.site for s in sharers]
        self._require_subset("sharers", names, self._bundles)
        self._require_enough(len(names))
        for sharer in sharers:
            self._take(sharer)
        self._sharers = frozenset(names)
        if self._contribution is None:
            raise protocol_violation("exchange", "be taken once", "a second")
        counters = self._contribution.layout.shape.counters
        vector = self._contribution.encode(len(names), self._rounding_key)
        self._contribution = None
        masks = [(key_agreement.self_mask_key(bytes(self._seed), self._t), 1)]
        for peer in self._neighbours:
            if peer in self._sharers:
                key = key_agreement.mask_key(self._agreed[peer][1], self._t, self.site, peer)
                masks.append((key, 1 if self.site < peer else -1))
        masking.add_masks(vector, masks, counters=counters)
        checksum = masking.checksum(vector)
        statement = transcript.masked_statement(
            self._t, self.site, transcript.digest_of(names), len(vector), checksum
        )
        return Masked(vector, self._sign(statement), checksum)

    def commit(self, survivors: Sequence[str]) -> bytes:
        """Exchange 3: sign the one list of survivors, and with it the round is answered.

        From here on the sum can be unmasked without this site, so it adds to no other of the round.

        Raises:
            SiteError: 422, it is not a part of the sharers or lacks this site; 424, too few sites, or others than
                may be.
        """
        self._require_subset("survivors", survivors, self._sharers)
        self._require_enough(len(survivors))
        if self._allow is not None:
            self._allow(frozenset(survivors), self._least)
        self._survivors = frozenset(survivors)
        self._note()
        return self._sign(self._commitment())

    def unmask(self, signatures: Sequence[Signed]) -> bytes:
        """Exchange 4: one share a peer, of the mask key of who was lost, of the seed of who survived.

        Returns:
            The shares in the order of the names of those of whom this site holds some, 33 bytes each.

        Raises:
            SiteError: 422, fewer than the threshold have signed this very list of survivors.
            PeerError: 422, as a peer's signature is another, where with it there would be enough.
        """
        statement = self._commitment()
        given = [s for s in signatures if s.site in self._survivors]
        wrong = [
            s.site
            for s in given
            if not transcript.is_signed(self._keys[s.site], s.signature, statement)
        ]
        agreed = len(given) - len(wrong)
        if agreed < self._threshold:
            wanted = f"be {self._threshold} or more on these survivors"
            if wrong and len(given) >= self._threshold:
                # Enough for a server that cannot tell: it has no keys of the sites.
                message = f"its signature must be on these survivors, got another; {agreed} are"
                raise PeerError(PROTOCOL_VIOLATION, wrong[0], message)
            raise protocol_violation("signatures", wanted, agreed)
        shares = []
        for peer in sorted(self._held):
            of_seed, of_mask = self._held[peer]
            shares.append(of_seed if peer in self._survivors else of_mask)
        self.wipe()
        return b"".join(shares)

    def wipe(self) -> None:
        """Forget every secret, as far as Python lets one; no further step is possible."""
        self._seed[:] = bytes(len(self._seed))
        self._held, self._agreed = {}, {}
        self._contribution = None
        self._box = self._mask = key_agreement.Pair.generate()

    def _take(self, sharer: Sharer) -> None:
        if sharer.site == self.site:
            own = self._shared
            if own is None or (sharer.commitment, sharer.signature) != (
                own.commitment,
                own.signature,
            ):
                raise protocol_violation("sharers", "hold what this site shared", "another")
            return
        statement = transcript.share_statement(self._t, sharer.site, sharer.commitment)
        if not transcript.is_signed(self._keys[sharer.site], sharer.signature, statement):
            raise PeerError(
                PROTOCOL_VIOLATION,
                sharer.site,
                "must have signed its shares for the same job and sites",
            )
        if sharer.site in self._neighbours:
            key = self._share_key(sharer.site, self.site)
            try:
                ciphertext = sharer.encrypted_share[:CIPHERTEXT_BYTES]
                plain = share_encryption.decrypt_share(
                    key, ciphertext, self._t, sharer.site, self.site
                )
            except SiteError as error:
                raise PeerError(error.code, sharer.site, error.message) from None
            held = plain[:SHARE_BYTES], plain[SHARE_BYTES:]
            hashes = b"".join(hashlib.sha256(share).digest() for share in held)
            if hashes != sharer.encrypted_share[CIPHERTEXT_BYTES:]:
                # Later it would be this site's word against the dealer's.
                raise PeerError(425, sharer.site, "its share must have the hash that it gave")
            self._held[sharer.site] = held

    def _agree(self, bundle: KeyAdvertisement) -> None:
        try:
            self._agreed[bundle.site] = (
                key_agreement.shared(self._box, bundle.encryption_key),
                key_agreement.shared(self._mask, bundle.mask_key),
            )
        except ValueError as error:
            raise PeerError(PROTOCOL_VIOLATION, bundle.site, str(error)) from None

    def _share_key(self, src: str, dst: str) -> bytes:
        peer = dst if src == self.site else src
        return key_agreement.share_encryption_key(self._agreed[peer][0], self._t, src, dst)

    def _require_enough(self, count: int) -> None:
        if count < self._least:
            raise SiteError(TOO_FEW, f"sites: must be {self._least} or more, got {count}")

    def _require_subset(
        self, field: str, names: Sequence[str], allowed: Mapping[str, object] | frozenset[str]
    ) -> None:
        if self.site not in names:
            raise protocol_violation(field, "name this site", "a list without it")
        if stranger := next((name for name in names if name not in allowed), None):
            raise protocol_violation(field, "be among those of the exchange before", stranger)

    def _commitment(self) -> bytes:
        return transcript.commit_statement(
            self._t,
            transcript.digest_of(self._sharers),
            transcript.digest_of(self._survivors),
        )

    def _sign(self, statement: bytes) -> bytes:
        return self._anchors.private.sign(statement)


def protocol_violation(field: str, wanted: str, got: object) -> SiteError:
    """Error 422 in the project's wording."""
    return SiteError(PROTOCOL_VIOLATION, f"{field}: must {wanted}, got {str(got)[:80]}")
