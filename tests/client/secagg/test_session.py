"""Sessions of many sites against the server's books: the sum is the true one to the last bit, or there is none."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from datetime import date

import numpy as np
import pytest
from builders import refusal
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedge.client.secagg.input_vector import InputVector, rounding_key
from fedge.client.secagg.session import Anchors, PeerError, Session
from fedge.server.secagg.group import Group
from fedge.shared.roster import roster
from fedge.shared.roster.draft import Draft, entry_of
from fedge.shared.secagg import (
    masking,
    messages,
    vector_layout,
)
from fedge.shared.secagg.messages import (
    CIPHERTEXT_BYTES,
    ENCRYPTED_SHARE_BYTES,
    Sharer,
    Signed,
)
from fedge.shared.secagg.transcript import Attempt
from fedge.shared.secagg.vector_layout import Bounds

ATTEMPT = Attempt(bytes(range(32)), "run-1", "train", 3, 1)
BOUNDS = Bounds(10.0, 0.5, 2.0, 100)
LAYOUT = vector_layout.of_training(
    {"w": (3, 2), "mean": (3,), "b": (4,)}, ["w", "b"], BOUNDS, control=False
)
LAST = date(2099, 1, 1)


def keys_of(names):
    seeds = {n: hashlib.sha256(n.encode()).digest() for n in names}
    return {n: Ed25519PrivateKey.from_private_bytes(seed) for n, seed in seeds.items()}


def known_to(names):
    consortium = Ed25519PrivateKey.from_private_bytes(bytes(32))
    entries = {
        n: entry_of(k.public_key().public_bytes_raw(), LAST) for n, k in keys_of(names).items()
    }
    signed = roster.sign(Draft("consortium", 1, entries), consortium)
    return roster.open_roster(signed, consortium.public_key())


def contribution(name, layout=LAYOUT):
    """Values, some of them beyond their bounds, a weight and counters of a site."""
    draw = random.Random(name)
    values = np.array([draw.uniform(-3, 3) for _ in range(layout.values)], np.float32)
    examples = draw.randint(0, 100)
    counters = {"sites": 1, "examples": examples, "loss": draw.uniform(0, 1e6)}
    return InputVector(layout, values, examples / 100, counters | {"clipped": 1, "capped": 0})


class Round:
    """All sites and an honest server."""

    def __init__(
        self,
        names,
        *,
        min_sites=3,
        attempt=ATTEMPT,
        layout=LAYOUT,
        made=contribution,
        own_min_sites=0,
    ):
        known = known_to(names)
        self.noted = []
        self.layout = layout
        self.contributions = {n: made(n, layout) for n in names}
        self.sessions = {
            n: Session(
                Anchors(n, key, lambda: known, lambda: min_sites),
                attempt,
                self.contributions[n],
                rounding_key(7, "train", attempt.server_round, n),
                lambda n=n: self.noted.append(n),
                own_min_sites,
            )
            for n, key in keys_of(names).items()
        }
        bundles = {n: s.bundle for n, s in self.sessions.items()}
        self.group = Group(attempt, layout.shape, bundles)

    def bundles(self):
        return list(self.group.bundles.values())

    def sharers(self, name):
        return messages.sharers_of(messages.record(self.group.masked_values(name)))

    def signatures(self):
        return [Signed(n, s) for n, s in sorted(self.group.signatures.items())]

    def share(self, lost=()):
        for n in (n for n in self.group.bundles if n not in lost):
            out = self.sessions[n].share(self.bundles())
            values = {
                "commitment": out.commitment,
                "signature": out.signature,
                "boxes": out.encrypted_shares,
            }
            self.group.take_share(n, messages.record(values))
        self.group.require(self.group.sharers, "share")
        return self

    def masked(self, lost=()):
        for n in (n for n in self.group.sharers if n not in lost):
            out = self.sessions[n].masked(self.sharers(n))
            content = {"signature": out.signature, "checksum": out.checksum.to_bytes(8, "big")}
            records = {
                "secagg": messages.record(content),
                "arrays": messages.vector_record(out.vector),
            }
            self.group.take_masked(n, records)
        assert self.group.add_masked() == {}
        self.group.require(self.group.survivors, "masked")
        return self

    def commit(self, lost=()):
        for n in (n for n in self.group.survivors if n not in lost):
            signature = self.sessions[n].commit(self.group.survivors)
            self.group.take_commit(n, messages.record({"signature": signature}))
        self.group.require(self.group.signatures, "commit")
        return self

    def unmask(self, lost=()):
        for n in (n for n in self.group.survivors if n not in lost):
            shares = self.sessions[n].unmask(self.signatures())
            self.group.take_unmask(n, messages.record({"shares": shares}))
        return self.group.unmask()

    def true_sum(self):
        """In whole numbers, from what the survivors would send without masks."""
        layout, sharers = self.layout, len(self.group.sharers)
        values = np.zeros(layout.values, np.int64)
        counters = np.zeros((layout.shape.counters, 2), np.uint64)
        for n in self.group.survivors:
            vector = self.contributions[n].encode(sharers, rounding_key(7, "train", 3, n))
            values += vector[: layout.values].view(np.int32)
            masking.add_counters(counters, masking.counters_in(vector, len(counters)))
        return values.tolist(), counters.tolist()

    def is_true(self, total):
        counters = masking.counters_in(total, self.layout.shape.counters)
        values = total[: self.layout.values].view(np.int32)
        return (values.tolist(), counters.tolist()) == self.true_sum()


def named(count, how):
    if how == "contiguous":
        return [f"site-{i}" for i in range(count)]
    draw = random.Random(f"{count} {how}")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    return sorted(
        "".join(draw.choice(letters) for _ in range(draw.randint(1, 40))) for _ in range(count)
    )


def lost_of(names, threshold, how, exchanges=4):
    """Sites for each exchange at which they are lost, so many that the threshold is left at the end."""
    order = list(names)
    if how == "random":
        random.Random(str(names)).shuffle(order)
    gone = order[: len(names) - threshold]
    return [gone[i::exchanges] for i in range(exchanges)]


def refused(code, call, *args, peer=None):
    error = refusal(code, call, *args)
    assert getattr(error, "peer", None) == peer
    return error.message


# What a site looks at.


def test_fewer_sites_than_the_policy_asks_for_are_refused():
    names = named(5, "contiguous")
    assert Round(names, min_sites=5).share()
    one = Round(names, min_sites=6)
    assert refused(424, one.sessions[names[0]].share, one.bundles()) == (
        "sites: must be 6 or more, got 5"
    )


def test_the_policy_is_asked_again_at_each_exchange():
    names = named(5, "contiguous")
    known, least = known_to(names), [5]
    one = Round(names)
    anchors = Anchors(names[0], keys_of(names)[names[0]], lambda: known, lambda: least[0])
    mine = Session(anchors, ATTEMPT, contribution(names[0]), bytes(32), lambda: None)
    one.sessions[names[0]] = mine
    one.group = Group(ATTEMPT, LAYOUT.shape, {n: s.bundle for n, s in one.sessions.items()})
    one.share()
    least[0] = 6
    refused(424, mine.masked, one.sharers(names[0]))


def test_the_other_party_of_a_fault_is_named():
    one = Round(named(5, "contiguous"))
    bundles = one.bundles()
    bundles[2] = replace(bundles[2], mask_key=bundles[1].mask_key)
    assert refused(422, one.sessions["site-0"].share, bundles, peer="site-2") == (
        "site-2: the bundle must carry its signature for this job"
    )
    one = Round(named(5, "contiguous")).share()
    told = one.sharers("site-0")
    told[2] = replace(
        told[2],
        encrypted_share=told[2].encrypted_share[:-1] + bytes([told[2].encrypted_share[-1] ^ 1]),
    )
    refused(425, one.sessions["site-0"].masked, told, peer="site-2")


def test_an_error_of_a_peer_is_one_of_the_site():
    error = PeerError(425, "site-2", "must open")
    assert (str(error), error.peer) == ("FE-425 site-2: must open", "site-2")


@pytest.mark.parametrize("field", ["commitment", "signature", "missing box"])
def test_a_sharer_is_believed_by_its_signature_alone(field):
    one = Round(named(5, "contiguous")).share()
    told: list[Sharer] = one.sharers("site-0")
    if field == "missing box":
        told[3] = replace(told[3], encrypted_share=b"")
        refused(425, one.sessions["site-0"].masked, told, peer="site-3")
        return
    told[3] = replace(told[3], **{field: bytes(len(getattr(told[3], field)))})
    refused(422, one.sessions["site-0"].masked, told, peer="site-3")


def test_its_own_shares_must_be_those_that_it_gave():
    one = Round(named(5, "contiguous")).share()
    told = one.sharers("site-0")
    told[0] = replace(told[0], commitment=bytes(32))
    refused(422, one.sessions["site-0"].masked, told)


def test_a_bundle_of_another_attempt_or_job_is_refused():
    names = named(5, "contiguous")
    for other in (
        replace(ATTEMPT, number=2),
        replace(ATTEMPT, server_round=2),
        replace(ATTEMPT, run_id="run-2"),
        replace(ATTEMPT, purpose="evaluate"),
        replace(ATTEMPT, request_digest=bytes(32)),
    ):
        one, foreign = Round(names), Round(names, attempt=other)
        bundles = [one.bundles()[0], *foreign.bundles()[1:]]
        refused(422, one.sessions["site-0"].share, bundles, peer="site-1")


# Shares.


def test_each_share_is_of_one_kind_and_given_once():
    names = named(5, "contiguous")
    one = Round(names).share().masked().commit()
    session = one.sessions["site-0"]
    first = session.unmask(one.signatures())
    assert len(first) == 33 * 5
    assert session.unmask(one.signatures()) == b""


def test_whose_vector_is_in_the_sum_is_opened_by_its_seed_and_others_by_their_key():
    names = named(5, "contiguous")
    one = Round(names).share().masked(["site-4"]).commit()
    held = {n: dict(one.sessions[n]._held) for n in names[:4]}
    one.unmask()
    for giver, shares in one.group.shares.items():
        assert shares == {peer: held[giver][peer][peer == "site-4"] for peer in names}


class Full(list):
    def append(self, name):
        raise OSError(28, "No space left on device")


def test_a_round_that_cannot_be_noted_is_not_answered():
    one = Round(named(5, "contiguous")).share().masked()
    session, one.noted = one.sessions["site-0"], Full()
    with pytest.raises(OSError, match="No space"):
        session.commit(one.group.survivors)
    one.noted = []
    assert len(session.commit(one.group.survivors)) == 64
    assert one.noted == ["site-0"]


def test_a_wrong_share_is_found_and_its_giver_named():
    names = named(10, "contiguous")
    one = Round(names).share().masked(["site-9"]).commit()
    wrong = bytearray(one.sessions["site-2"].unmask(one.signatures()))
    wrong[40] ^= 1
    shares = {n: one.sessions[n].unmask(one.signatures()) for n in names[:9] if n != "site-2"}
    for n, given in {**shares, "site-2": bytes(wrong)}.items():
        one.group.take_unmask(n, messages.record({"shares": given}))
    total, found = one.group.unmask()
    assert found == {"site-2"}
    assert one.is_true(total)


def test_a_share_that_is_not_the_one_whose_hash_was_given_is_refused_by_its_holder():
    """A dealer that gave one share and the hash of another could say later that its holder had altered it."""
    one = Round(named(5, "contiguous")).share()
    told = one.sharers("site-0")
    for place in (CIPHERTEXT_BYTES, ENCRYPTED_SHARE_BYTES - 1):
        altered = bytearray(told[2].encrypted_share)
        altered[place] ^= 1
        liar = [*told[:2], replace(told[2], encrypted_share=bytes(altered)), *told[3:]]
        said = refused(425, one.sessions["site-0"].masked, liar, peer="site-2")
        assert said == "site-2: its share must have the hash that it gave"
    assert one.sessions["site-0"].masked(told)


def test_no_secret_is_left_behind_a_wipe():
    one = Round(named(5, "contiguous")).share().masked()
    session = one.sessions["site-0"]
    seed, private = bytes(session._seed), session._mask.private_bytes()
    session.wipe()
    assert bytes(session._seed) == bytes(32) != seed
    assert session._mask.private_bytes() != private
    assert not session._held
    assert not session._agreed
    assert session._contribution is None


# What a masked vector looks like.

#: Chi-squared of 255 degrees of freedom, and Kolmogorov's statistic: each is beyond once in 1e7.
CHI_SQUARED, KOLMOGOROV = 390.3, 2.90
SIZE = 2**16


def passes(vector):
    """Whether the bytes are even (chi-squared) and the values are uniform (Kolmogorov and Smirnov)."""
    expected = vector.nbytes / 256
    counts = np.bincount(vector.view(np.uint8), minlength=256)
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    ordered = np.sort(vector) / 2**32
    ranks = np.arange(1, vector.size + 1) / vector.size
    distance = max((ranks - ordered).max(), (ordered - ranks + 1 / vector.size).max())
    return chi_squared < CHI_SQUARED, np.sqrt(vector.size) * distance < KOLMOGOROV


@pytest.mark.parametrize("value", [0.0, BOUNDS.value_bound, -BOUNDS.value_bound])
def test_a_masked_vector_cannot_be_told_from_noise(value):
    """Two verdicts on each of three vectors, wrong once in 1e7: less than once in 1e6 runs, this fails by chance."""
    layout = vector_layout.of_training({"w": (SIZE,)}, ["w"], BOUNDS, control=False)

    def made(name, _):
        return replace(
            contribution(name, layout), values=np.full(SIZE, value, np.float32), weight=1.0
        )

    one = Round(named(3, "contiguous"), layout=layout, made=made).share()
    vector = one.sessions["site-0"].masked(one.sharers("site-0")).vector[:SIZE]
    assert passes(vector) == (True, True)
    plain = one.contributions["site-0"].encode(3, bytes(32))[:SIZE]
    assert passes(plain) == (False, False)


def test_two_masked_vectors_of_one_input_have_nothing_in_common():
    names = named(3, "contiguous")
    first, second = (Round(names).share() for _ in range(2))
    a, b = (one.sessions["site-0"].masked(one.sharers("site-0")).vector for one in (first, second))
    assert (a == b).sum() == 0


def test_a_sum_with_distributed_noise_is_not_opened_over_fewer_sites_than_add_enough():
    names = named(7, "contiguous")
    # Five of seven would be enough for the masks, but six must have added their noise.
    one = Round(names, own_min_sites=6).share().masked(names[:1])
    left = [n for n in names if n != names[0]]
    one.sessions[left[0]].commit(left)
    two = Round(names, own_min_sites=6).share().masked(names[:2])
    fewer = [n for n in names if n not in names[:2]]
    assert refused(424, two.sessions[fewer[0]].commit, fewer) == ("sites: must be 6 or more, got 5")
    Round(names).share().masked(names[:2]).sessions[fewer[0]].commit(fewer)
