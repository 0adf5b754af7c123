"""What a run sums under masks: statistics, updates, counters."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.shared.errors import RunError
from fedge.shared.preprocessing import steps


def evaluated(made, server_round=1, members=None):
    from fedge.server.participants import request_content

    def compose(some, secure):
        common = request_content.settings(made.config, "r-1", server_round, (), len(some))
        return request_content.evaluate(made.arrays, common, some, made.config, secure)

    return made.sums.evaluate(server_round, members or made.members, compose)


def counted(made, sites):
    """The task's counters in clear, added up."""
    from fedge.server.participants import request_content

    found = []
    for member in made.members:
        if member.site in sites:
            common = request_content.settings(made.config, "r-1", 1, (), 6)
            (asked,) = request_content.evaluate(made.arrays, common, [member], made.config)
            found.append(
                dict(made.workers[member.site].answer("evaluate", asked.content)["metrics"])
            )
    return {k: sum(f[k] for f in found) for k in made.task.counter_names}


def test_an_evaluation_is_the_sum_of_the_sites_counters(rig):
    made = rig()
    found, outcome = evaluated(made)
    assert outcome.sites == list(made.workers)
    wanted = counted(made, list(made.workers))
    assert found["examples"] == wanted["examples"]
    assert found == pytest.approx(wanted, abs=1e-4)


def test_it_is_over_those_who_are_left(rig):
    made = rig()
    made.fault("site-1", "evaluate", "silent")
    made.fault("site-2", "masked", "garbage")
    found, outcome = evaluated(made)
    assert outcome.attempts == 1
    assert found == pytest.approx(counted(made, outcome.sites), abs=1e-4)
    assert outcome.sites == [f"site-{i}" for i in range(3, 7)]


def test_without_a_sum_there_is_no_evaluation(rig):
    made = rig(attempts=1)
    for i in range(1, 5):
        made.fault(f"site-{i}", "evaluate", "error")
    found, outcome = evaluated(made)
    assert found is None
    assert outcome.failed == ["begin: must be answered by 3 sites, got 2"]
    assert outcome.unmasked_sums == []


def test_too_few_are_not_asked_at_all(rig):
    made = rig()
    found, outcome = evaluated(made, members=made.members[:2])
    assert found is None
    assert (outcome.failed, outcome.attempts) == (["sites: must be at least 3, got 2"], 0)
    assert not made.asked("evaluate")


def standardised(made, sites):
    parts = [
        steps.statistics(made.task.preprocessing, made.workers[s].learner.data.train_features)
        for s in sites
    ]
    return steps.pooled(parts)


def test_statistics_are_those_of_all_sites_together(rig):
    made = rig()
    found = made.sums.statistics(made.members)
    wanted = standardised(made, list(made.workers))
    assert found.count == wanted.count
    assert found.total == pytest.approx(wanted.total, rel=1e-9)
    assert found.total_of_squares == pytest.approx(wanted.total_of_squares, rel=1e-9)
    assert found.standardise().mean == pytest.approx(wanted.standardise().mean, rel=1e-9)


@pytest.mark.slow
def test_statistics_are_tried_again_and_then_stop_the_run(rig):
    made = rig()
    for site in ("site-1", "site-2"):
        made.fault(site, "share", "error", times=1)
    assert made.sums.statistics(made.members).count == standardised(made, list(made.workers)).count
    made.sums.settled()
    made = rig(attempts=1)
    for site in ("site-1", "site-2"):
        made.fault(site, "unmask", "error")
    with pytest.raises(RunError) as caught:
        made.sums.statistics(made.members)
    assert caught.value.code == 510
    assert caught.value.message == (
        "statistics: must be summed, got unmask: must be answered by 5 sites, got 4"
    )


@pytest.mark.slow
def test_the_facts_of_a_round_count_what_was_cut(rig):
    made = rig(clipping_bound=0.001, weight_cap=20)
    found = made.train()
    assert found.facts["clipped"] == 6
    sizes = [len(w.learner.data.train_labels) for w in made.workers.values()]
    assert found.facts["capped"] == sum(n > 20 for n in sizes) > 0
    assert found.facts["saturated"] == 0
    assert found.result.weight == sum(min(n, 20) for n in sizes)
    narrow = rig(value_bound=1e-4).train(2)
    assert narrow.facts["saturated"] > 0


@pytest.mark.slow
def test_what_is_shown_is_one_masked_vector_and_the_mean_update(rig):
    made = rig()
    found = made.train()
    masked, update = found.seen["masked"], found.seen["opened"]
    assert len(masked) == len(update) == 22
    wanted = np.concatenate([(found.result.mean[n] - a).ravel() for n, a in made.arrays.items()])
    assert update == pytest.approx(wanted.tolist())
    assert max(masked) > 2**31
    assert all(v == int(v) and 0 <= v < 2**32 for v in masked)


def test_a_site_without_examples_takes_part_with_nothing(rig):
    made = rig()
    data = made.workers["site-2"].learner.data
    empty = type(data)(
        data.train_features[:0], data.train_labels[:0], data.test_features[:0], data.test_labels[:0]
    )
    made.workers["site-2"].learner.data = empty
    found = made.train()
    assert list(found.result.sites) == list(made.workers)
    mean, weight, _ = made.plain([s for s in made.workers if s != "site-2"])
    assert found.result.weight == weight
    for name, expected in mean.items():
        np.testing.assert_allclose(found.result.mean[name], expected, atol=2e-7)
