"""A site adds to one sum of a round, and to scores over the sites of the evaluation, whatever is asked in between."""

from __future__ import annotations

import pytest

from fedge.client.requests import Address
from fedge.shared import protocol
from fedge.shared.secagg import messages

from .test_participant import ADDRESS, NAMES, Sites, begins, made, no_more, refused, sites

__all__ = ["sites"]


@pytest.mark.parametrize("restarted", [False, True])
def test_who_has_signed_the_survivors_adds_to_no_other_sum_of_the_round(sites, restarted):
    """Were only some asked for their shares, the others would open a second sum, and the difference is one site's."""
    sites.begin().until(messages.UNMASK)
    again = Sites(sites.home) if restarted else sites
    for n in NAMES:
        content, changed = begins(2), Address("run-1", 2)
        told = refused(423, again.answers[n].begin, protocol.EVALUATE, content, changed, 7, made)
        assert told == "evaluate round 2: must be later than 2, which was answered"
    # The sum that they have signed is opened all the same, unless its secrets went with the workers.
    for n in NAMES if not restarted else ():
        assert len(sites.step(messages.UNMASK, n)[messages.SECURE][messages.SHARES]) == 33 * 3


@pytest.mark.parametrize("exact", [True, False])
def test_scores_over_others_than_the_evaluation_s_sites_are_not_signed(sites, exact):
    """With noise each sum is a release of its own, and a difference tells nothing more."""
    sites.begin(exact=exact).opened()
    known = sites.home / "north" / "run-1.evaluated"
    assert known.exists() == exact
    if exact:
        known.write_text('["north", "other", "south", "west"]')
    sites.kind = protocol.QUALIFY
    sites.begin(1, ADDRESS, exact=exact).until(messages.COMMIT)
    if exact:
        refused(424, sites.step, messages.COMMIT, "north")
        assert no_more(sites, "north")
        assert '"qualify"' not in (sites.home / "north" / "run-1.json").read_text()
    else:
        sites.step(messages.COMMIT, "north")


def test_where_the_request_to_sign_was_lost_no_share_is_given_and_nobody_is_accused(sites):
    """An honest server cannot know that it was, and asks all for their shares."""
    sites.begin().until(messages.COMMIT)
    text = refused(426, sites.step, messages.UNMASK, "north")
    assert text == "evaluate: must have been asked to sign the survivors, got no such request"
    assert no_more(sites, "north")
