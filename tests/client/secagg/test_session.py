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
from fedge.server.secagg.group import Group, LostError
from fedge.shared.roster import roster
from fedge.shared.roster.draft import Draft, entry_of
from fedge.shared.secagg import (
    exact_counters,
    fixed_point,
    messages,
    neighbour_graph,
    transcript,
    vector_layout,
)
from fedge.shared.secagg.messages import Sharer, Signed
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
        self.group = Group(attempt, layout.length, bundles)

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
        total = np.zeros(layout.length, np.int64)
        for n in self.group.survivors:
            vector = self.contributions[n].encode(sharers, rounding_key(7, "train", 3, n))
            total[: layout.values] += vector[: layout.values].view(np.int32)
            total[layout.values :] += vector[layout.values :]
        return total

    def is_true(self, total):
        layout, true = self.layout, self.true_sum()
        found = np.concatenate([total[: layout.values].view(np.int32), total[layout.values :]])
        return found.tolist() == true.tolist()


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


@pytest.fixture
def each_signature_once(monkeypatch):
    """All sites check the same signatures; here each is checked for the first of them, or the test takes a minute."""
    checked, check = {}, transcript.is_signed

    def is_signed(key, signature, statement):
        asked = key.public_bytes_raw(), signature, statement
        if asked not in checked:
            checked[asked] = check(key, signature, statement)
        return checked[asked]

    monkeypatch.setattr(transcript, "is_signed", is_signed)


@pytest.mark.parametrize(
    ("count", "how"),
    [
        (3, "contiguous"),
        (3, "random"),
        (10, "contiguous"),
        (10, "random"),
        (50, "random"),
        pytest.param(50, "contiguous", marks=pytest.mark.slow),
        pytest.param(128, "random", marks=pytest.mark.soak),
        pytest.param(128, "contiguous", marks=pytest.mark.soak),
    ],
)
def test_the_sum_is_exact_with_losses_at_every_exchange(count, how, each_signature_once):
    names = named(count, how)
    lost = lost_of(names, neighbour_graph.threshold(count), how)
    one = Round(names).share(lost[0]).masked(lost[1]).commit(lost[2])
    # Whoever is lost at commit has its vector in the sum; it is not there to unmask either.
    total, wrong = one.unmask([*lost[2], *lost[3]])
    assert not wrong
    assert one.is_true(total)
    assert len(one.group.survivors) == count - len(lost[0]) - len(lost[1])
    assert len(one.group.shares) == neighbour_graph.threshold(count)
    assert sorted(one.noted) == sorted(one.group.shares)


@pytest.mark.soak
def test_the_sum_is_exact_in_a_ring(each_signature_once):
    names = named(200, "random")
    one = Round(names)
    assert {len(near) for near in one.group.neighbours.values()} == {60}
    total, wrong = (
        one.share(names[:4]).masked(names[4:12]).commit(names[12:16]).unmask(names[12:18])
    )
    assert not wrong
    assert one.is_true(total)


def test_the_sum_of_the_decoded_values_is_that_of_the_sites():
    """The same in real numbers: of clamped and weighted values, to one step a site."""
    one = Round(named(10, "random")).share().masked().commit()
    total, _ = one.unmask()
    found = fixed_point.decode(total[: LAYOUT.values], LAYOUT.segments, 10)
    bound = np.repeat([s.bound for s in LAYOUT.segments], [s.size for s in LAYOUT.segments])
    true = sum(
        c.weight * np.clip(c.values.astype(np.float64), -bound, bound)
        for c in one.contributions.values()
    )
    steps = np.repeat([1 / fixed_point.scale(s.bound, 10) for s in LAYOUT.segments], [10, 3])
    assert (np.abs(found - true) <= 10 * steps).all()
    counted = exact_counters.decode_counters(total[LAYOUT.values :], LAYOUT.counters, 10)
    assert counted["sites"] == 10
    assert counted["examples"] == sum(c.counters["examples"] for c in one.contributions.values())
    beyond = sum((np.abs(c.values) > bound).sum() for c in one.contributions.values())
    assert counted["saturated"] == beyond > 0


@pytest.mark.parametrize("exchange", range(4))
def test_the_threshold_of_survivors_is_enough_at_each_exchange(exchange):
    names = named(10, "contiguous")
    lost = [[], [], [], []]
    lost[exchange] = names[:3]
    one = Round(names).share(lost[0]).masked(lost[1]).commit(lost[2])
    assert one.is_true(one.unmask([*lost[2], *lost[3]])[0])


@pytest.mark.parametrize("exchange", range(4))
def test_one_fewer_ends_the_attempt(exchange):
    names = named(10, "contiguous")
    one = Round(names)
    steps = [one.share, one.masked, one.commit, one.unmask]
    for step in steps[:exchange]:
        step()
    with pytest.raises(LostError):
        steps[exchange](names[:4])


@pytest.mark.slow
def test_one_fewer_is_refused_by_the_sites_too():
    """A server that goes on with 6 of 10 is told so at each exchange where it names them."""
    names = named(10, "contiguous")
    few = names[:6]
    shared = Round(names).share()
    told = [s for s in shared.sharers(few[0]) if s.site in few]
    refused(424, shared.sessions[few[0]].masked, told)
    committed = Round(names).share().masked()
    refused(424, committed.sessions[few[0]].commit, few)
    unmasked = Round(names).share().masked().commit()
    refused(422, unmasked.sessions[few[0]].unmask, unmasked.signatures()[:6])
    assert unmasked.noted == []


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
    one.group = Group(ATTEMPT, LAYOUT.length, {n: s.bundle for n, s in one.sessions.items()})
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
    one = Round(named(5, "contiguous")).share().masked().commit()
    session, one.noted = one.sessions["site-0"], Full()
    with pytest.raises(OSError, match="No space"):
        session.unmask(one.signatures())
    one.noted = []
    assert len(session.unmask(one.signatures())) == 33 * 5
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
