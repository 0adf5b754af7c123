"""The sum is exact whoever is lost, at whichever exchange, down to the threshold, and nothing is opened below it."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.server.secagg.group import LostError
from fedge.shared.secagg import exact_counters, fixed_point, masking, neighbour_graph, transcript

from .test_session import LAYOUT, Round, lost_of, named, refused


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
    assert sorted(one.noted) == sorted(one.group.signatures)


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
    counted = exact_counters.decode_counters(
        masking.counters_in(total, len(LAYOUT.counters)), LAYOUT.counters, 10
    )
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
    assert committed.noted == []
    unmasked = Round(names).share().masked().commit()
    refused(422, unmasked.sessions[few[0]].unmask, unmasked.signatures()[:6])
