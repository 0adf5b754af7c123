"""The exchanges at a worker: each step once, the same again for the same question, and nothing after a deviation."""

import logging
from datetime import date

import numpy as np
import pytest
from builders import refused
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from fedge.client.requests import Address
from fedge.client.secagg.input_vector import InputVector
from fedge.client.secagg.participant import Participant, bounds_of, is_secure
from fedge.client.secagg.replay_guard import ReplayGuard
from fedge.client.secagg.session import Anchors
from fedge.server.secagg.group import Group
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.roster import roster
from fedge.shared.roster.draft import Draft, entry_of
from fedge.shared.secagg import exact_counters, messages, request_digest, transcript, vector_layout
from fedge.shared.secagg.transcript import Attempt
from fedge.shared.secagg.vector_layout import Bounds

NAMES = ["north", "south", "west"]
KEYS = {n: Ed25519PrivateKey.from_private_bytes(n.encode().ljust(32, b".")) for n in NAMES}
OF = vector_layout.of_evaluation(["correct", "examples"])
ADDRESS = Address("run-1", 2)


def known():
    entries = {
        n: entry_of(k.public_key().public_bytes_raw(), date(2099, 1, 1)) for n, k in KEYS.items()
    }
    signed = roster.sign(Draft("consortium", 1, entries), KEYS["north"])
    return roster.open_roster(signed, KEYS["north"].public_key())


ROSTER = known()


def made():
    counters = {"sites": 1, "task/correct": 3, "task/examples": 5}
    return InputVector(OF, np.zeros(0, np.float32), 1.0, counters)


def begins(number=1, **changes):
    values = {messages.PROTOCOL: transcript.VERSION, messages.ATTEMPT: number, **changes}
    return RecordDict({messages.SECURE: ConfigRecord(values)})


class Sites:
    """Three sites, and the books of an honest server."""

    def __init__(self, home, kind=protocol.EVALUATE):
        self.home, self.kind = home, kind
        self.answers = {n: self.of(n) for n in NAMES}

    def of(self, name):
        anchors = Anchors(name, KEYS[name], lambda: ROSTER, lambda: 3)
        return Participant(anchors, ReplayGuard(self.home / name))

    def begin(self, number=1, address=ADDRESS, names=NAMES, exact=False):
        content = begins(number)
        found = {}
        for n in names:
            values = self.answers[n].begin(self.kind, content, address, 7, made, exact=exact)
            (found[n],) = transcript.unpack_advertisements(values[messages.BUNDLE])
        purpose = {k: p for p, k in messages.BEGIN.items()}[self.kind]
        attempt = Attempt(
            request_digest.digest(self.kind, content),
            address.run_id,
            purpose,
            address.server_round,
            number,
        )
        if len(found) == 3:
            self.group = Group(attempt, OF.shape, found)
        self.number, self.address, self.purpose = number, address, purpose
        return self

    def request(self, values, **changes):
        told = {messages.PURPOSE: self.purpose, messages.ATTEMPT: self.number, **values, **changes}
        return RecordDict({messages.SECURE: ConfigRecord(told)})

    def told(self, kind, name):
        return {
            messages.SHARE: self.group.share_values,
            messages.MASKED: lambda: self.group.masked_values(name),
            messages.COMMIT: self.group.commit_values,
            messages.UNMASK: self.group.unmask_values,
        }[kind]()

    def step(self, kind, name, address=None, **changes):
        request = self.request(self.told(kind, name), **changes)
        return self.answers[name].step(kind, request, address or self.address)

    def take(self, kind, name, reply):
        values = reply[messages.SECURE]
        if kind == messages.SHARE:
            self.group.take_share(name, values)
        elif kind == messages.MASKED:
            self.group.take_masked(name, reply)
            assert self.group.add_masked() == {}
        elif kind == messages.COMMIT:
            self.group.take_commit(name, values)
        else:
            self.group.take_unmask(name, values)

    def until(self, kind):
        """All exchanges before this one."""
        for step in messages.STEPS[: messages.STEPS.index(kind)]:
            self.all(step)
        return self

    def all(self, kind):
        replies = {n: self.step(kind, n) for n in NAMES}
        for n, reply in replies.items():
            self.take(kind, n, reply)

    def opened(self):
        for kind in messages.STEPS:
            self.all(kind)
        total, wrong = self.group.unmask()
        assert not wrong
        return exact_counters.decode_counters(total.view(np.uint64).reshape(-1, 2), OF.counters, 3)


@pytest.fixture
def sites(tmp_path):
    return Sites(tmp_path)


def same(one, other):
    arrays = [r.get(protocol.ARRAYS) for r in (one, other)]
    return dict(one[messages.SECURE]) == dict(other[messages.SECURE]) and (
        arrays == [None, None] or arrays[0]["masked"].data == arrays[1]["masked"].data
    )


def test_an_honest_round_opens_the_sum(sites):
    assert sites.begin().opened() == {"sites": 3, "task/correct": 9, "task/examples": 15}


@pytest.mark.parametrize("kind", messages.STEPS)
def test_the_same_step_again_has_the_same_bytes(sites, kind, caplog):
    sites.begin().until(kind)
    first = sites.step(kind, "north")
    with caplog.at_level(logging.INFO, logger="fedge.client"):
        assert same(sites.step(kind, "north"), first)
    assert "answered as before" in caplog.text
    for n in NAMES:
        sites.take(kind, n, first if n == "north" else sites.step(kind, n))
    for later in messages.STEPS[messages.STEPS.index(kind) + 1 :]:
        sites.all(later)
    assert not sites.group.unmask()[1]


def no_more(sites, name):
    return all(refused(422, sites.step, kind, name) for kind in messages.STEPS)


@pytest.mark.parametrize("kind", messages.STEPS)
def test_a_step_twice_with_other_content_ends_the_session(sites, kind):
    sites.begin().until(kind).all(kind)
    assert "must be number" in refused(422, sites.step, kind, "north", more="x")
    assert no_more(sites, "north")


@pytest.mark.parametrize("skipped", range(2))
def test_a_step_left_out_ends_the_session(sites, skipped):
    sites.begin().until(messages.STEPS[skipped])
    refused(422, sites.step, messages.STEPS[skipped + 1], "north")
    assert no_more(sites, "north")


def test_what_is_no_list_ends_the_session(sites):
    sites.begin()
    text = refused(422, sites.step, messages.SHARE, "north", bundles=b"\x05north")
    assert text == "query.secagg_share: must be whole bundles, got a part of one"
    assert no_more(sites, "north")


def test_fault_with_a_peer_is_told_to_the_server_and_logged(sites, caplog):
    sites.begin().until(messages.MASKED)
    sites.group.encrypted_shares["south"]["north"] = bytes(146)
    reply = sites.step(messages.MASKED, "north")
    assert set(reply) == {messages.SECURE}
    assert dict(reply[messages.SECURE]) == {messages.BLAMED: "south", messages.CODE: 425}
    assert "FE-425 south: " in caplog.text
    assert no_more(sites, "north")


@pytest.mark.parametrize(
    "changes",
    [{"attempt": 2}, {"address": Address("run-1", 3)}, {"address": Address("run-2", 2)}],
)
def test_another_attempt_is_refused_and_leaves_the_open_one_alone(sites, changes):
    sites.begin()
    assert "that this site has begun" in refused(
        422, sites.step, messages.SHARE, "north", **changes
    )
    assert sites.opened()["sites"] == 3


@pytest.mark.parametrize("changes", [{"purpose": "train"}, {"purpose": "statistics"}])
def test_another_purpose_has_no_attempt_here(sites, changes):
    sites.begin()
    refused(426, sites.step, messages.SHARE, "north", **changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"purpose": "spy"}, "purpose: must be one of"),
        ({"purpose": 1}, "purpose: must be one of"),
        ({"attempt": 0}, "attempt: must be an integer from 1 to 1000"),
        ({"attempt": 1001}, "attempt: must be an integer from 1 to 1000"),
        ({"attempt": 1.0}, "attempt: must be an integer from 1 to 1000"),
        ({"attempt": True}, "attempt: must be an integer from 1 to 1000"),
    ],
)
def test_a_step_without_an_address_is_refused(sites, changes, says):
    sites.begin()
    assert says in refused(414, sites.step, messages.SHARE, "north", **changes)
    assert sites.opened()["sites"] == 3


def test_a_request_without_its_record_is_refused(sites):
    metrics = RecordDict({messages.SECURE: MetricRecord({"attempt": 1})})
    for content in (RecordDict(), metrics):
        refused(414, sites.of("north").begin, protocol.EVALUATE, content, ADDRESS, 7, made)
        refused(414, sites.answers["north"].step, messages.SHARE, content, ADDRESS)
    assert is_secure(metrics)
    assert not is_secure(RecordDict())


@pytest.mark.parametrize("version", [0, transcript.VERSION - 1, transcript.VERSION + 1, "2", None])
def test_another_version_of_the_protocol_is_refused(sites, version):
    changes = {} if version is None else {messages.PROTOCOL: version}
    content = begins()
    del content[messages.SECURE][messages.PROTOCOL]
    content[messages.SECURE].update(changes)
    north = sites.answers["north"]
    assert "version" in refused(414, north.begin, protocol.EVALUATE, content, ADDRESS, 7, made)


# Attempts, rounds and runs.


def test_an_attempt_comes_after_the_one_before(sites):
    sites.begin(2)
    for number in (1, 2):
        assert "each has new keys" in refused(422, sites.begin, number)
    refused(422, sites.begin, 3, Address("run-1", 1))
    assert sites.opened()["sites"] == 3


def test_a_new_attempt_has_new_keys_and_ends_the_old_one(sites):
    old = sites.begin(1).until(messages.COMMIT).group
    new = sites.begin(2).group
    for n in NAMES:
        assert {new.bundles[n].encryption_key, new.bundles[n].mask_key}.isdisjoint(
            {old.bundles[n].encryption_key, old.bundles[n].mask_key}
        )
    request = sites.request(old.commit_values(), attempt=1)
    refused(422, sites.answers["north"].step, messages.COMMIT, request, ADDRESS)
    assert sites.opened()["sites"] == 3


def test_an_answered_round_is_refused_for_good(sites):
    sites.begin().opened()
    for number in (1, 2, 9):
        assert refused(423, sites.begin, number) == (
            "evaluate round 2: must be later than 2, which was answered"
        )
    refused(423, sites.begin, 1, Address("run-1", 1))
    assert sites.begin(1, Address("run-1", 3)).opened()["sites"] == 3


def test_an_answered_round_is_refused_after_a_restart(sites):
    sites.begin().opened()
    again = Sites(sites.home)
    refused(423, again.begin, 1)
    refused(426, again.answers["north"].step, messages.UNMASK, sites.request({}), ADDRESS)
    assert again.begin(1, Address("run-2", 2)).opened()["sites"] == 3


def test_a_round_that_was_not_answered_is_begun_anew_after_a_restart(sites):
    """The secrets are gone with the process, and so are the shares that they would have opened."""
    sites.begin().until(messages.COMMIT)
    again = Sites(sites.home)
    refused(426, again.answers["north"].step, messages.COMMIT, sites.request({}), ADDRESS)
    assert again.begin(2).opened()["sites"] == 3


def test_nothing_is_answered_where_the_ledger_is_damaged(sites):
    sites.begin().opened()
    for n in NAMES:
        (sites.home / n / "run-1.json").write_text('{"evaluate": "2"}')
    assert "damaged" in refused(423, Sites(sites.home).begin, 1, Address("run-1", 9))
    # One that is damaged while a round is open signs nothing.
    sites.begin(1, Address("run-3", 1)).until(messages.COMMIT)
    (sites.home / "north" / "run-3.json").write_text("{")
    refused(423, sites.step, messages.COMMIT, "north")
    assert no_more(sites, "north")


def test_the_round_is_noted_before_its_survivors_are_signed(sites):
    sites.begin().until(messages.COMMIT)
    path = sites.home / "north" / "run-1.json"
    assert not path.exists()
    sites.step(messages.COMMIT, "north")
    assert path.read_text() == '{"evaluate": 2}'


def test_statistics_are_summed_once_a_run(tmp_path):
    sites = Sites(tmp_path, messages.STATISTICS)
    assert refused(414, sites.begin, 1, Address("run-1", 1)) == (
        "server-round: must be 0 for statistics, got 1"
    )
    assert sites.begin(1, Address("run-1", 0)).opened()["sites"] == 3
    refused(423, sites.begin, 2, Address("run-1", 0))


def test_a_site_that_cannot_contribute_keeps_its_open_attempt(sites):
    sites.begin()

    def fails():
        raise SiteError(401, "update: must be finite, got NaN or infinity")

    north = sites.answers["north"]
    refused(401, north.begin, protocol.EVALUATE, begins(2), ADDRESS, 7, fails)
    assert sites.opened()["sites"] == 3


# Bounds.

BOUNDS = {"clipping-bound": 10.0, "value-bound": 4.0, "state-bound": 100.0, "weight-cap": 1000}


def asking(**changes):
    values = BOUNDS | {name.replace("_", "-"): v for name, v in changes.items()}
    return RecordDict({messages.SECURE: ConfigRecord(values)})


def test_bounds_are_those_of_the_request():
    assert bounds_of(asking()) == Bounds(10.0, 4.0, 100.0, 1000)


@pytest.mark.parametrize(
    "changes",
    [
        {"clipping_bound": 0.0},
        {"clipping_bound": -1.0},
        {"clipping_bound": float("nan")},
        {"clipping_bound": float("inf")},
        {"clipping_bound": 2e6},
        {"clipping_bound": "10"},
        {"value_bound": 0.0},
        {"state_bound": 1e300},
        {"weight_cap": 0},
        {"weight_cap": 2**23 + 1},
        {"weight_cap": 10.0},
        {"weight_cap": True},
    ],
)
def test_bounds_out_of_range_are_refused(changes):
    (name,) = changes
    assert refused(414, bounds_of, asking(**changes)).startswith(f"{name.replace('_', '-')}: must")
