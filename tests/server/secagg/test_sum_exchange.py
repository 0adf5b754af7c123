"""Who is lost at an exchange, however, is named with why, and its vector is in the sum if it had come."""

from __future__ import annotations

import pytest

EXCHANGES = ["begin", "share", "masked", "commit", "unmask"]
HOW = ["silent", "late", "garbage", "error"]


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_one_site_is_lost_and_the_sum_is_that_of_the_others(rig, exchange, how):
    made = rig()
    made.fault("site-2", exchange, how)
    found = made.train()
    # Whose vector has come is in the sum, whatever becomes of the site then.
    within = exchange in ("commit", "unmask")
    left = [site for site in made.workers if within or site != "site-2"]
    made.check(found.result, left)
    assert found.reason is None
    assert found.facts["attempts"] == 1
    lost, *more = found.facts["lost"]
    assert (lost["site"], lost["exchange"], lost["attempt"]) == ("site-2", exchange, 1)
    # A site that was not asked to sign the survivors does not open them either.
    assert [x["exchange"] for x in more] == ["unmask"] * ((exchange, how) == ("commit", "silent"))
    rejected = found.outcome.rejections(made.members)
    assert [r.site for r in rejected] == ([] if within else ["site-2"])
    code, outcome = {
        "silent": (409, "absent"),
        "late": (408, "late"),
        "garbage": (411, "rejected"),
        "error": (410, "error"),
    }[how]
    assert all((r.code, r.outcome) == (code, outcome) for r in rejected)
    assert all(r.reason == f"{exchange}: {lost['reason']}" for r in rejected)
    assert "4711" not in str(found.facts), "what a site says of an error stays out of the line"
