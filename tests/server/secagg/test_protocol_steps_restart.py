"""Groups, and a coordinator that starts anew: what was about to be opened is opened, and nothing twice."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.shared.errors import RunError

GROUPS = {
    "count": 9,
    "groups": 3,
    "sections": {"strategy": {"name": "FedMedian"}},
}


@pytest.mark.slow
def test_a_group_that_fails_is_tried_again_alone(rig):
    made = rig(**GROUPS)
    made.fault("site-5", "share", "error", times=1)
    found = made.train()
    assert found.reason is None
    sites = [list(group.sites) for group in found.result.groups]
    assert sorted(s for some in sites for s in some) == sorted(made.workers)
    assert sorted(len(some) for some in sites) == [3, 3, 3]
    assert found.facts["groups"] == sites
    assert found.facts["attempts"] == 2
    again = next(some for some in sites if "site-5" in some)
    assert len(made.asked("begin")) == 9 + 3
    for group in found.result.groups:
        made.check(group, list(group.sites))
    first, second = made.asked("begin", "site-5")
    assert (first["secagg"]["attempt"], second["secagg"]["attempt"]) == (1, 2)
    assert {c["secagg"]["attempt"] for s in again for c in made.asked("unmask", s)} == {2}


@pytest.mark.slow
def test_a_group_that_is_lost_at_the_end_opens_no_further_one(rig):
    made = rig(**GROUPS)
    made.fault("site-5", "share", "error", times=1)
    drawn = [[m.site for m in some] for some in made.sums._groups(1, made.members)]
    others = [some for some in drawn if "site-5" not in some]
    made.fault(others[0][0], "unmask", "error")
    found = made.train()
    # One group is void, so the round is: the third is not summed for nothing.
    assert found.result is None
    assert found.facts["attempts"] == 1
    assert len(made.asked("begin")) == 9
    assert "unmask: must be answered by 3 sites, got 2" in found.reason


def test_groups_are_drawn_anew_in_each_round_and_alike_in_a_redone_one(rig):
    made = rig(**GROUPS)
    drawn = [made.sums._groups(r, made.members) for r in range(1, 6)]
    names = [[[m.site for m in some] for some in one] for one in drawn]
    assert len({str(one) for one in names}) == 5
    shuffled = list(reversed(made.members))
    assert [[m.site for m in some] for some in made.sums._groups(3, shuffled)] == names[2]


@pytest.mark.slow
@pytest.mark.parametrize("settled", [False, True])
def test_a_kept_sum_is_opened_by_the_next_coordinator(rig, settled):
    made = rig()
    wanted = made.train().result
    if settled:
        made.sums.settled()
    made.grid.log.clear()
    made.trained.clear()
    found = made.train()
    assert made.trained == []
    if settled:
        # The round is done, and no site answers it a second time.
        assert found.result is None
        assert "begin: must be answered by 3 sites, got 0" in found.reason
        assert all("FE-423" in lost["reason"] for lost in found.facts["lost"])
        return
    # Asked for the very same, the sites answer as they did before.
    assert {kind for _, kind, _, _ in made.grid.log} == {"query.secagg_unmask"}
    assert found.facts["attempts"] == 1
    made.check(found.result, list(made.workers))
    for name, mean in wanted.mean.items():
        assert np.array_equal(mean, found.result.mean[name])


@pytest.mark.slow
def test_a_coordinator_that_ends_while_the_sites_answer_can_be_continued(rig):
    made = rig()

    def die(content):
        raise KeyboardInterrupt

    made.fault("site-4", "unmask", die, times=1)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert [len(made.asked("unmask", f"site-{i}")) for i in (1, 3, 6)] == [1, 1, 0]
    found = made.train()
    assert made.trained == list(made.workers)
    made.check(found.result, list(made.workers))
    assert found.facts["lost"] == []


@pytest.mark.slow
def test_who_was_lost_before_is_told_by_the_next_coordinator_too(rig):
    made = rig(count=10)
    for site, exchange in (("site-1", "begin"), ("site-2", "share"), ("site-3", "masked")):
        made.fault(site, exchange, "error")
    first = made.train()
    assert first.reason is None
    found = made.train()
    made.check(found.result, list(first.result.sites))
    lost = {(x["site"], x["exchange"], x["attempt"]) for x in found.facts["lost"]}
    assert lost == {("site-1", "begin", 1), ("site-2", "share", 1), ("site-3", "masked", 1)}
    (why,) = {r.reason.partition(": ")[2] for r in found.outcome.rejections(made.members)}
    assert why == "lost before the coordinator was restarted"


@pytest.mark.slow
def test_groups_are_continued_each_where_it_was(rig):
    made = rig(**GROUPS)
    made.fault("site-5", "share", "error", times=1)

    def die(content):
        raise KeyboardInterrupt

    made.fault("site-5", "masked", die, times=1)
    # Two groups are open by now, and the third is in its second attempt.
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.grid.log.clear()
    found = made.train()
    assert found.reason is None
    assert len(found.result.groups) == 3
    assert len(made.asked("begin")) == 3
    for group in found.result.groups:
        made.check(group, list(group.sites))


@pytest.mark.slow
def test_what_was_kept_is_of_its_own_round_alone(rig):
    made = rig()
    made.train(1)
    made.grid.log.clear()
    found = made.train(2)
    close_to = made.plain(list(made.workers), 2)[0]
    assert len(made.asked("begin")) == 6
    for name, expected in close_to.items():
        np.testing.assert_allclose(found.result.mean[name], expected, atol=2e-7)


def died_before_the_survivors_signed(made):
    def die(content):
        raise KeyboardInterrupt

    made.fault("site-1", "commit", die, times=1)
    with pytest.raises(KeyboardInterrupt):
        made.train()


@pytest.mark.slow
def test_with_other_workers_a_sum_that_nobody_signed_is_made_anew(rig):
    """As after a power cut: nobody can unmask what was kept, and nobody has answered the round for good."""
    made = rig()
    died_before_the_survivors_signed(made)
    made.restart()
    made.restart_server()
    found = made.train()
    # The one whose answer was not heard has signed all the same, and refuses.
    signed = [s for s in made.workers if any((made.workers[s].home / "secagg").glob("*.json"))]
    assert found.result is not None, found.reason
    assert found.facts["attempts"] == 2
    assert set(found.result.sites) >= set(made.workers) - set(signed)


@pytest.mark.slow
def test_statistics_that_nobody_signed_are_summed_when_the_run_is_resumed(rig):
    made = rig(attempts=1, sections={"data": {"standardise": "federated"}})
    for site in made.workers:
        made.fault(site, "commit", "silent", times=1)
    with pytest.raises(RunError, match="FE-510 statistics: must be summed"):
        made.sums.statistics(made.members)
    made.restart()
    made.restart_server()
    assert not list((made.folder / "run" / "secagg").glob("statistics-*"))
    assert made.sums.statistics(made.members).count > 0


@pytest.mark.slow
def test_the_same_workers_sign_what_was_kept(rig):
    made = rig()
    died_before_the_survivors_signed(made)
    made.restart_server()
    made.grid.log.clear()
    found = made.train()
    made.check(found.result, list(made.workers))
    assert found.facts["attempts"] == 1
    assert not made.asked("begin")


@pytest.mark.slow
def test_with_other_workers_a_kept_sum_cannot_be_opened(rig):
    made = rig()
    made.train()
    made.restart()
    found = made.train()
    assert found.result is None
    assert "unmask: must be answered by 5 sites, got 0" in found.reason
    assert len(made.asked("begin")) == 6
