"""When a group is given up, and whose word counts against whom."""

from __future__ import annotations

import pytest

from fedge.server.secagg.attempt import GroupAttempt
from fedge.server.secagg.group import Group
from fedge.shared.secagg import masking, messages
from fedge.shared.secagg.transcript import Attempt, KeyAdvertisement


@pytest.fixture
def attempt():
    """300 sites, each with 76 neighbours, of which all answer."""
    names = [f"site-{i:03}" for i in range(300)]
    bundles = {n: KeyAdvertisement(n, bytes(32), bytes(32), bytes(64)) for n in names}
    attempt = Attempt(bytes(32), "run-1", "train", 1, 1)
    group = Group(attempt, masking.Shape(1, 0), bundles)
    group.survivors = names
    return GroupAttempt([], group)


@pytest.mark.parametrize(("accusers", "given_up"), [(25, False), (26, True)])
def test_a_dealer_is_found_out_by_more_than_a_third_of_its_holders(attempt, accusers, given_up):
    """26 of 77; that too few holders are left is seen before anybody signs, though enough sites are."""
    near = attempt.group.neighbours["site-007"]
    attempt.blames["site-007"] = dict.fromkeys(near[:accusers], 425)
    assert attempt.check(messages.MASKED, 5) == (["site-007"] if given_up else [])
    assert (attempt.group is None) == given_up
    assert attempt.excluded == attempt.found_out == ({"site-007"} if given_up else set())


@pytest.mark.parametrize("code", [422, 425])
def test_a_third_of_all_sites_find_out_nobody(attempt, code):
    """Who holds no share of a dealer cannot tell whether it decrypts; keys and signatures are seen by all."""
    group = attempt.group
    strangers = [n for n in group.sites if n not in (*group.neighbours["site-007"], "site-007")]
    attempt.blames["site-007"] = dict.fromkeys(strangers[:100], code)
    assert attempt.check(messages.MASKED, 5) == []
