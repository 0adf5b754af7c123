"""fedge's own sites against a server that deviates: each attack raises at the site, is logged, and ends the session."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fedge.shared import protocol
from fedge.shared.secagg import messages, transcript

from . import flower_secagg as flower
from .deviant import Server
from .ours import ATTACKS, FAULTS, Attack, honest_round, two_survivor_lists
from .ours_more import MORE, another_run
from .parties import NAMES, VICTIM
from .table import PAGE, page

#: The numbers that sites raise, and how often, without those that only say that the session is over.
CODES = {
    "active-and-dead": {422: 18},
    "swapped-key": {422: 6},
    "two-survivor-lists": {422: 6},
    "replayed-round-or-attempt": {422: 12, 425: 5, 423: 5},
    "edited-roster": {421: 6},
    "lowered-threshold": {424: 2, 422: 4},
    "flipped-box-bit": {425: 1},
    "second-unmask": {422: 18, 423: 6},
    "nan-update": {401: 1},
    "dropout-before-upload": {},
    "own-bundle-altered": {422: 1},
    "unknown-site": {421: 6},
    "revoked-site": {421: 6},
    "expired-site": {421: 6},
    "two-bundles-of-one-site": {422: 6},
    "unsorted-bundles": {422: 6},
    "small-cohort": {424: 4},
    "small-order-keys": {422: 30},
    "split-sharers": {422: 5},
    "split-model": {422: 6},
    "split-clip": {422: 6},
    "split-cap": {422: 6},
    "survivor-lists": {422: 4, 424: 1},
    "steps-out-of-order": {422: 18},
    "garbage": {422: 24},
    "second-sum-after-signing": {423: 5},
}
REFUSED = [a for a in (*ATTACKS, *FAULTS, *MORE) if a is not another_run]


def name_of(attack: Callable[[Path], Attack]) -> str:
    return attack.__name__.replace("_", "-")


@pytest.mark.slow
@pytest.mark.parametrize("attack", REFUSED, ids=name_of)
def test_refused(attack, tmp_path, caplog):
    with caplog.at_level(logging.ERROR, logger="fedge"):
        done = attack(tmp_path)
    assert done.outcome.name == name_of(attack)
    assert done.outcome.verdict == "refused", done.outcome
    assert Counter(r.code for r in done.refusals) == CODES[done.outcome.name]
    # Each is in the log of its site, by its number.
    logged = Counter(int(n) for n in re.findall(r"FE-(\d+)", caplog.text))
    assert logged == CODES[done.outcome.name]
    # And each such session is over.
    for server in done.servers:
        for site in {r.site for r in server.refusals if r.kind in messages.STEPS}:
            assert nothing_more(server, site), (server, site)


def nothing_more(server: Server, site: str) -> bool:
    """Whether every step is refused, though what it says is in order."""
    told = {
        messages.SHARE: server.group.share_values(),
        messages.MASKED: server.group.masked_values(site),
        messages.COMMIT: server.group.commit_values(),
        messages.UNMASK: server.group.unmask_values(),
    }
    return all(server.tell(site, kind, values) is None for kind, values in told.items())


def test_the_honest_twin_opens_the_right_sum(tmp_path):
    server = honest_round(tmp_path)
    assert not server.refusals
    assert server.is_right()
    _, counted = server.opened()
    assert counted["examples"] == 40 + 70 + 130 + 90 + 25 + 60
    assert server.shares_given(VICTIM) == len(NAMES)


@pytest.mark.slow
def test_the_honest_twin_is_asked_again_and_answers_the_same_bytes(tmp_path):
    server = Server(honest_round(tmp_path).sites, server_round=2).begin()
    for kind, values, take in (
        (messages.SHARE, lambda _: server.group.share_values(), server.share),
        (messages.MASKED, server.group.masked_values, server.masked),
        (messages.COMMIT, lambda _: server.group.commit_values(), server.commit),
        (messages.UNMASK, lambda _: server.group.unmask_values(), server.unmask),
    ):
        told = {site: values(site) for site in NAMES}
        first = {site: server.tell(site, kind, told[site]) for site in NAMES}
        again = {site: server.tell(site, kind, told[site]) for site in NAMES}
        assert {s: bytes_of(r) for s, r in first.items()} == {
            s: bytes_of(r) for s, r in again.items()
        }
        take()
    assert not server.refusals
    assert server.is_right()


def bytes_of(reply) -> tuple[dict[str, object], dict[str, bytes]]:
    arrays = reply.get(protocol.ARRAYS, {})
    return dict(reply[messages.SECURE]), {n: a.data for n, a in arrays.items()}


def test_two_sums_over_almost_the_same_sites_tell_one_update(tmp_path):
    """What the page says is not refused; a protocol for one sum cannot."""
    done = another_run(tmp_path)
    assert done.outcome.verdict == "succeeds"
    assert not done.refusals


def test_the_names_are_those_of_flowers_column():
    ours = [name_of(attack) for attack in (*ATTACKS, *FAULTS)]
    assert ours == [name_of(attack) for attack in flower.ATTACKS]


def test_a_site_that_checks_no_signature_would_be_told_apart(tmp_path, monkeypatch):
    """The twin of every "refused": the same attack on sites that believe what they are told."""
    monkeypatch.setattr(transcript, "is_signed", lambda *_: True)
    done = two_survivor_lists(tmp_path)
    assert done.outcome.verdict == "succeeds"
    assert not done.refusals
    assert done.servers[0].shares_given(VICTIM) == len(NAMES)


@pytest.mark.soak
def test_the_page_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), (
        "run: cd tests; ../.venv/bin/python -m attacks.table"
    )
