"""The five exchanges while sites are lost: the sum is the survivors' own, or there is none."""

from __future__ import annotations

import pytest


@pytest.mark.slow
def test_nobody_is_lost(rig):
    made = rig()
    found = made.train()
    made.check(found.result, list(made.workers))
    assert found.reason is None
    assert (found.outcome.attempts, found.outcome.lost) == (1, [])


@pytest.mark.slow
def test_several_sites_are_lost_one_after_the_other(rig):
    made = rig(count=10)
    # Seven of ten must stay to the end.
    made.fault("site-1", "share", "silent")
    made.fault("site-2", "masked", "garbage")
    made.fault("site-3", "commit", "error")
    made.fault("site-4", "unmask", "late")
    found = made.train()
    made.check(found.result, [s for s in made.workers if s not in ("site-1", "site-2")])
    told = {(lost["site"], lost["exchange"]) for lost in found.facts["lost"]}
    assert told == {
        ("site-1", "share"),
        ("site-2", "masked"),
        ("site-3", "commit"),
        ("site-4", "unmask"),
    }
    assert found.facts["threshold"] == 7
    assert [r.site for r in found.outcome.rejections(made.members)] == ["site-1", "site-2"]


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["share", "masked"])
def test_below_the_threshold_it_is_tried_again_with_new_keys(rig, exchange):
    made = rig()
    for site in ("site-1", "site-2"):
        made.fault(site, exchange, "error", times=1)
    found = made.train()
    made.check(found.result, list(made.workers))
    assert found.facts["attempts"] == 2
    told = [(lost["site"], lost["exchange"], lost["attempt"]) for lost in found.facts["lost"]]
    assert told == [("site-1", exchange, 1), ("site-2", exchange, 1)]
    assert found.outcome.rejections(made.members) == []
    # Nobody has trained twice in the secure rounds; then each once more in clear, for the comparison.
    assert sorted(made.trained) == sorted([*made.workers, *made.workers])
    first, second = (c["secagg"]["bundles"] for c in made.asked("share", "site-3"))
    assert first != second
    assert len(first) == len(second)
    keys = [bytes(first[i : i + 32]) for i in range(0, len(first) - 32, 8)]
    assert not any(key in second for key in keys if key[:5] != b"site-"), "no key is used twice"


def test_signatures_that_are_too_few_are_asked_for_again(rig):
    """There is no second attempt: those who have signed add to no other sum of the round."""
    made = rig()
    for i in range(1, 5):
        made.fault(f"site-{i}", "commit", "silent", times=1)
    found = made.train()
    made.check(found.result, list(made.workers))
    assert found.facts["attempts"] == 1
    assert {lost["exchange"] for lost in found.facts["lost"]} == {"commit"}
    assert [len(made.asked("commit", f"site-{i}")) for i in (1, 6)] == [2, 1]


def test_a_round_whose_survivors_too_few_sign_is_lost(rig):
    made = rig(attempts=2)
    for i in (1, 2, 3):
        made.fault(f"site-{i}", "commit", "silent")
    found = made.train()
    assert found.result is None
    assert "commit: must be answered by" in found.reason
    # Who has signed refuses the second attempt, which begins with those who have not.
    assert found.facts["attempts"] == 2
    refused = {x["site"] for x in found.facts["lost"] if "FE-423" in x["reason"]}
    assert refused == {"site-4", "site-5", "site-6"}
    assert not made.asked("unmask")
    assert not list((made.folder / "secagg").glob("train-*"))


def test_who_was_silent_at_first_trains_in_the_second_attempt(rig):
    made = rig(min_sites=6)
    made.fault("site-6", "begin", "silent", times=1)
    found = made.train()
    assert made.trained == [f"site-{i}" for i in range(1, 7)]
    made.check(found.result, list(made.workers))
    assert found.facts["attempts"] == 2
    assert found.facts["lost"][0]["reason"] == "connected, but no reply within 20 s"


@pytest.mark.slow
def test_where_nothing_helps_there_is_no_sum_and_the_reason_is_told(rig):
    made = rig(attempts=2)
    for site in ("site-1", "site-2"):
        made.fault(site, "masked", "silent")
    found = made.train()
    assert found.result is None
    assert found.reason == (
        "FE-510 secure sums: must be 1, got 0 (masked: must be answered by 5 sites, got 4)"
    )
    assert found.facts["attempts"] == 2
    assert found.facts["threshold"] is None
    assert len(made.trained) == 6
    assert not made.asked("commit")


def test_fewer_than_the_smallest_cohort_are_not_asked_for_what_they_would_refuse(rig):
    made = rig(count=5, min_sites=5, attempts=1)
    # Four of five would be the threshold, but no site masks for fewer than five.
    made.fault("site-1", "share", "error")
    found = made.train()
    assert "share: must be answered by 5 sites, got 4" in found.reason
    assert not made.asked("masked")


def test_after_the_last_exchange_has_begun_there_is_no_second_attempt(rig):
    made = rig()
    for site in ("site-1", "site-2"):
        made.fault(site, "unmask", "silent")
    found = made.train()
    assert found.result is None
    assert found.reason == (
        "FE-510 secure sums: must be 1, got 0 (unmask: must be answered by 5 sites, got 4)"
    )
    assert found.facts["attempts"] == 1
    assert len(made.asked("begin")) == 6


def test_sites_whose_own_policy_asks_for_more_give_nothing(rig, caplog):
    made = rig(own_min_sites=7, attempts=1)
    found = made.train()
    assert found.result is None
    assert all("FE-424" in lost["reason"] for lost in found.facts["lost"])
    assert len(found.facts["lost"]) == 6
    assert "sites: must be 7 or more, got 6" in caplog.text
    assert not made.asked("masked")
