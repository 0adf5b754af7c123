"""The server's books of a secure sum: what it keeps, what it refuses, and whom it names. The sites here are real."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import date

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedge.client.secagg.input_vector import InputVector
from fedge.client.secagg.session import Anchors, Session
from fedge.server.secagg import group as groups
from fedge.server.secagg.group import Group, LostError
from fedge.shared.roster import roster
from fedge.shared.roster.draft import Draft, entry_of
from fedge.shared.secagg import exact_counters, masking, messages, shamir, vector_layout
from fedge.shared.secagg.transcript import Attempt

NAMES = [f"site-{i}" for i in range(7)]  # the threshold is 5
KEYS = {n: Ed25519PrivateKey.from_private_bytes(n.encode().ljust(32, b".")) for n in NAMES}
OF = vector_layout.of_evaluation(["correct", "examples"])
ATTEMPT = Attempt(bytes(32), "run-1", "evaluate", 1, 1)


def known():
    entries = {
        n: entry_of(k.public_key().public_bytes_raw(), date(2099, 1, 1)) for n, k in KEYS.items()
    }
    signed = roster.sign(Draft("consortium", 1, entries), KEYS["site-0"])
    return roster.open_roster(signed, KEYS["site-0"].public_key())


class Sites:
    """Seven honest sites and the server's books."""

    def __init__(self):
        trusted = known()
        self.sessions = {}
        for i, (n, key) in enumerate(KEYS.items()):
            counters = {"sites": 1, "task/correct": i, "task/examples": 10}
            made = InputVector(OF, np.zeros(0, np.float32), 1.0, counters)
            anchors = Anchors(n, key, lambda: trusted, lambda: 3)
            self.sessions[n] = Session(anchors, ATTEMPT, made, bytes(32), lambda: None)
        # Given in another order: the books sort them.
        bundles = {n: self.sessions[n].bundle for n in reversed(NAMES)}
        self.group = Group(ATTEMPT, OF.shape, bundles)

    def share(self, site):
        out = self.sessions[site].share(list(self.group.bundles.values()))
        return messages.record(
            {
                "commitment": out.commitment,
                "signature": out.signature,
                "boxes": out.encrypted_shares,
            }
        )

    def masked(self, site):
        told = messages.sharers_of(messages.record(self.group.masked_values(site)))
        out = self.sessions[site].masked(told)
        return masked_reply(out.vector, out.checksum)

    def until_masked(self, lost=()):
        for n in NAMES:
            self.group.take_share(n, self.share(n))
        for n in (n for n in NAMES if n not in lost):
            self.group.take_masked(n, self.masked(n))
        assert self.group.add_masked() == {}
        return self

    def until_committed(self, lost=()):
        self.until_masked(lost)
        for n in self.group.survivors:
            signature = self.sessions[n].commit(self.group.survivors)
            self.group.take_commit(n, messages.record({"signature": signature}))
        return self

    def shares(self):
        told = messages.signatures_of(messages.record(self.group.unmask_values()))
        return {n: self.sessions[n].unmask(told) for n in self.group.survivors}


def masked_reply(vector, checksum, **others):
    values = {"signature": bytes(64), "checksum": checksum.to_bytes(8, "big")}
    return RecordDict(
        {"secagg": messages.record(values), "arrays": messages.vector_record(vector), **others}
    )


def take(group, shares):
    for n, given in shares.items():
        group.take_unmask(n, messages.record({"shares": given}))


def counted(total):
    return exact_counters.decode_counters(total.view(np.uint64).reshape(-1, 2), OF.counters, 7)


TRUE = {"sites": 7, "task/correct": 21.0, "task/examples": 70.0}


def test_sites_are_sorted_and_everybody_is_a_neighbour():
    group = Sites().group
    assert group.sites == NAMES == list(group.bundles)
    assert group.threshold == 5
    assert group.neighbours["site-3"] == [n for n in NAMES if n != "site-3"]


@pytest.mark.parametrize("count", [5, 6, 7])
def test_so_many_shares_open_the_sum(count):
    sites = Sites().until_committed()
    given = sites.shares()
    take(sites.group, {n: given[n] for n in NAMES[-count:]})
    total, wrong = sites.group.unmask()
    assert not wrong
    assert counted(total) == TRUE


def test_one_share_fewer_opens_nothing():
    sites = Sites().until_committed()
    given = sites.shares()
    take(sites.group, {n: given[n] for n in NAMES[:4]})
    with pytest.raises(LostError, match="shares of site-0: "):
        sites.group.unmask()
    with pytest.raises(LostError, match="unmask: must be answered by 5 sites, got 4"):
        sites.group.require(sites.group.shares, "unmask")
    sites.group.require(NAMES[:5], "unmask")


def test_a_sum_that_does_not_open_stays_as_it_was_until_it_does():
    sites = Sites().until_committed()
    before, given = sites.group.total.copy(), sites.shares()
    take(sites.group, {n: given[n] for n in NAMES[:4]})
    with pytest.raises(LostError):
        sites.group.unmask()
    assert (sites.group.total == before).all()
    take(sites.group, given)
    total, _ = sites.group.unmask()
    assert counted(total) == TRUE


@pytest.mark.parametrize("lost", [[], ["site-2"], ["site-0", "site-6"]])
def test_masks_with_lost_sites_are_taken_off(lost):
    sites = Sites().until_committed(lost)
    take(sites.group, sites.shares())
    total, _ = sites.group.unmask()
    alive = [n for n in NAMES if n not in lost]
    assert sites.group.survivors == alive
    found = exact_counters.decode_counters(
        total.view(np.uint64).reshape(-1, 2), OF.counters, len(alive)
    )
    assert found["task/correct"] == sum(NAMES.index(n) for n in alive)


@pytest.mark.parametrize(("liars", "found"), [(["site-1"], {"site-1"}), ([], set())])
def test_a_wrong_share_does_no_harm_and_is_named(liars, found):
    sites = Sites().until_committed(["site-4"])
    given = sites.shares()
    for liar in liars:
        given[liar] = bytes(len(given[liar]))
    take(sites.group, given)
    total, wrong = sites.group.unmask()
    assert wrong == found
    assert (
        exact_counters.decode_counters(total.view(np.uint64).reshape(-1, 2), OF.counters, 6)[
            "task/correct"
        ]
        == 21 - 4
    )


def test_too_many_wrong_shares_open_nothing_and_no_dealer_is_to_blame():
    sites = Sites().until_committed()
    given = sites.shares()
    take(sites.group, given | {n: bytes(33 * 7) for n in NAMES[:3]})
    with pytest.raises(LostError) as caught:
        sites.group.unmask()
    # A liar's own secret lacks its own share besides: by it the liar itself is found out.
    assert set(caught.value.dealers) <= set(NAMES[:3])


def test_a_site_that_shared_another_secret_than_it_committed_to_is_lost_and_named():
    sites = Sites().until_committed()
    changed = dict(vars(sites.group.sharers["site-5"])) | {"commitment": bytes(32)}
    sites.group.sharers["site-5"] = messages.Sharer(**changed)
    take(sites.group, sites.shares())
    with pytest.raises(LostError, match="shares of site-5") as caught:
        sites.group.unmask()
    assert caught.value.dealers == ("site-5",)


def test_shares_of_no_secret_are_their_dealer_s_doing_whatever_it_committed_to(monkeypatch):
    """The largest numbers that 33 bytes hold are none of the field, and no secret is what nobody may be led to take."""
    sites, honest = Sites(), None
    honest = sites.share

    def deal(site):
        with monkeypatch.context() as patched:
            if site == "site-5":
                patched.setattr(
                    shamir, "split", lambda _, least, xs: dict.fromkeys(xs, b"\xff" * 33)
                )
            values = honest(site)
        if site == "site-5":
            values["commitment"] = hashlib.sha256(b"").digest()
        return values

    monkeypatch.setattr(sites, "share", deal)
    for n in NAMES:
        sites.group.take_share(n, sites.share(n))
    # Its peers would refuse the commitment that it did not sign: what counts here is what the server makes of it.
    sites.group.survivors = list(NAMES)
    dealt = {n: dict.fromkeys(sites.group.holds(n), bytes(33)) for n in NAMES}
    for n in NAMES:
        dealt[n]["site-5"] = b"\xff" * 33
    sites.group.shares = dealt
    with pytest.raises(LostError, match="shares of site-5: must give the secret") as caught:
        sites.group.unmask()
    assert caught.value.dealers == ("site-5",)


@pytest.mark.parametrize("lost", [[], ["site-5"]])
def test_a_dealer_of_random_shares_is_proved_to_be_one(lost, monkeypatch):
    """Right commitment and key, each share random, and the hash of each: nobody could notice before the end."""
    sites = Sites()
    honest = sites.share

    def deal(site):
        with monkeypatch.context() as patched:
            if site == "site-5":
                at_random = lambda _, least, xs: {x: b"\0" + os.urandom(32) for x in xs}  # noqa: E731
                patched.setattr(shamir, "split", at_random)
            return honest(site)

    monkeypatch.setattr(sites, "share", deal)
    sites.until_committed(lost)
    take(sites.group, sites.shares())
    with pytest.raises(LostError, match="shares of site-5: must give the secret") as caught:
        sites.group.unmask()
    assert caught.value.dealers == ("site-5",)


# Replies that are none.


@pytest.mark.parametrize(
    "changes",
    [
        {"boxes": bytes(146 * 6 - 1)},
        {"boxes": bytes(146 * 7)},
        {"commitment": bytes(31)},
        {"signature": b""},
        {"signature": "text"},
    ],
)
def test_a_malformed_share_is_not_taken(changes):
    sites = Sites()
    values = ConfigRecord({**sites.share("site-0"), **changes})
    with pytest.raises(ValueError, match=next(iter(changes))):
        sites.group.take_share("site-0", values)
    assert not sites.group.sharers
    assert not sites.group.encrypted_shares


def test_a_damaged_or_malformed_vector_is_not_added():
    sites = Sites()
    good = np.arange(OF.shape.length, dtype=np.uint32)
    right = masking.checksum(good)
    moved = good[::-1].copy()
    arrays = messages.vector_record(good)
    bad = [
        masked_reply(good[:-1], masking.checksum(good[:-1])),
        masked_reply(good, right, arrays=ArrayRecord()),
        masked_reply(good, right, arrays=ArrayRecord({"other": arrays["masked"]})),
        masked_reply(
            good, right, arrays=ArrayRecord({"masked": arrays["masked"], "more": arrays["masked"]})
        ),
        masked_reply(good, right, arrays=ConfigRecord()),
        masked_reply(good, right, secagg=ConfigRecord({"signature": bytes(64)})),
        masked_reply(good, right, secagg=ConfigRecord({"checksum": bytes(8)})),
        RecordDict(),
    ]
    for content in bad:
        with pytest.raises(ValueError, match="must"):
            sites.group.take_masked("site-0", content)
    assert sites.group.add_masked() == {}
    assert not sites.group.total.any()
    assert sites.group.survivors == []
    sites.group.take_masked("site-1", masked_reply(moved, right))
    assert (sites.group.take_masked("site-0", masked_reply(good, right)) == good).all()
    sites.group.take_masked("site-2", masked_reply(good, right ^ 1))
    assert set(sites.group.add_masked()) == {"site-1", "site-2"}
    assert sites.group.survivors == ["site-0"]
    assert (sites.group.total == good).all()
    # Each is added once.
    assert sites.group.add_masked() == {}
    assert (sites.group.total == good).all()


def test_other_replies_must_have_their_lengths():
    sites = Sites().until_masked()
    for size in (0, 63, 65):
        with pytest.raises(ValueError, match="signature: must be 64 to 64 bytes"):
            sites.group.take_commit("site-0", messages.record({"signature": bytes(size)}))
    for size in (33 * 6, 33 * 7 - 1, 33 * 8):
        with pytest.raises(ValueError, match="shares: must be 231 to 231 bytes"):
            sites.group.take_unmask("site-0", messages.record({"shares": bytes(size)}))
    assert not sites.group.signatures
    assert not sites.group.shares


# What outlives the coordinator.


def test_a_sum_that_was_written_down_is_opened_as_before():
    sites = Sites().until_committed(["site-4"])
    told = json.loads(json.dumps(groups.to_json(sites.group)))
    again = groups.from_json(told, sites.group.total.copy())
    assert (again.t, again.threshold, again.survivors) == (
        sites.group.t, sites.group.threshold, sites.group.survivors
    )  # fmt: skip
    hashes, kept = (
        [g.encrypted_shares[n][p][82:] for n in NAMES for p in g.neighbours[n]]
        for g in (sites.group, again)
    )
    assert kept == hashes
    given = sites.shares()
    take(sites.group, given)
    take(again, given)
    opened, _ = again.unmask()
    assert (opened == sites.group.unmask()[0]).all()


def test_nothing_that_opens_a_sum_is_written_down():
    sites = Sites().until_committed()
    take(sites.group, sites.shares())
    text = json.dumps(groups.to_json(sites.group))
    for given in sites.group.shares.values():
        assert not any(share.hex() in text for share in given.values())
    assert not any(
        encrypted_share[:82].hex() in text
        for of in sites.group.encrypted_shares.values()
        for encrypted_share in of.values()
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"attempt": ["00", "run-1"]},
        {"bundles": "00"},
        {"bundles": "xx"},
        {"sharers": "01"},
        {"shape": [3, 3]},
        {"share_hashes": {}},
        {"share_hashes": dict.fromkeys(NAMES, "00")},
    ],
)
def test_what_is_damaged_is_not_read(changes):
    sites = Sites().until_committed()
    told = groups.to_json(sites.group) | changes
    with pytest.raises((ValueError, KeyError, TypeError)):
        groups.from_json(told, sites.group.total)


def test_a_sum_of_another_type_is_not_read():
    sites = Sites().until_committed()
    with pytest.raises(ValueError, match="sum: must have the length"):
        groups.from_json(groups.to_json(sites.group), sites.group.total.astype(np.int64))
