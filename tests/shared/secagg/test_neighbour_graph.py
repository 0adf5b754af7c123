"""The graph: symmetric, the same everywhere, and dense enough for the figures that its docstring gives."""

from __future__ import annotations

import hashlib
from collections import Counter
from math import ceil, comb, inf, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedge.shared.secagg import neighbour_graph

T = hashlib.sha256(b"T").digest()


def tail(population: int, bad: int, drawn: int, least: int) -> float:
    """The probability of ``least`` or more bad ones among those drawn (hypergeometric)."""
    return sum(
        comb(bad, i) * comb(population - bad, drawn - i) for i in range(least, min(bad, drawn) + 1)
    ) / comb(population, drawn)


def bits(probability: float) -> float:
    return log2(probability) if probability else -inf


def risks(count: int, degree: int) -> dict[str, float]:
    """Log2 of the probability that any of ``count`` sites is struck, with a tenth corrupt and a tenth lost."""
    bad, t = ceil(count / 10), neighbour_graph.threshold(degree + 1)
    spare = degree + 1 - t
    struck = {
        "opened": tail(count - 1, bad, degree, t),
        "both": tail(count - 1, bad, degree, 2 * t - (degree + 1)),
        # A site that stays loses neighbours only; one that is lost has spent one loss itself.
        "void": max(
            tail(count - 1, bad, degree, spare + 1), tail(count - 1, bad - 1, degree, spare)
        ),
        "cut": comb(2 * bad, degree // 2) / comb(count, degree // 2),
    }
    return {name: bits(count * probability) for name, probability in struck.items()}


@pytest.mark.parametrize(
    ("holders", "needed"), [(3, 3), (4, 3), (5, 4), (6, 5), (7, 5), (10, 7), (61, 41), (128, 86)]
)
def test_the_threshold_is_more_than_two_thirds(holders: int, needed: int) -> None:
    assert neighbour_graph.threshold(holders) == needed


def test_no_server_with_less_than_a_third_gets_both_secrets() -> None:
    for holders in range(3, 400):
        t = neighbour_graph.threshold(holders)
        colluding = ceil(holders / 3) - 1
        assert t <= holders
        # Honest holders answer for one secret; each colluding one may give both kinds.
        assert 2 * t > holders + colluding
        assert holders - t == ceil(holders / 3) - 1


@pytest.mark.parametrize(
    ("count", "degree"),
    [
        (3, 2),
        (10, 9),
        (128, 127),
        (129, 60),
        (200, 60),
        (201, 76),
        (300, 76),
        (301, 78),
        (1000, 114),
        (1001, 120),
        (2000, 138),
        (10_000, 192),
    ],
)
def test_the_degrees_are_the_design_s(count: int, degree: int) -> None:
    assert neighbour_graph.degree_of(count) == degree


def test_the_degree_is_even_and_never_falls() -> None:
    found = [neighbour_graph.degree_of(count) for count in range(129, 3000)]
    assert all(degree % 2 == 0 for degree in found)
    assert found == sorted(found)


def test_the_figures_of_the_docstring() -> None:
    assert risks(200, 60)["opened"] == risks(200, 60)["both"] == risks(200, 60)["void"] == -inf
    assert risks(300, 76)["opened"] == -inf
    assert risks(1000, 114)["opened"] < -203
    assert risks(300, 76)["both"] < -39
    assert risks(1000, 114)["both"] < -36
    assert risks(300, 76)["void"] < -32
    assert risks(1000, 114)["void"] < -33
    for count, degree, figure in ((200, 60, -80), (300, 76, -96), (1000, 114, -132)):
        assert risks(count, degree)["cut"] < figure
    # The failing twin: half the neighbours are far too few.
    assert risks(1000, 56)["void"] > -20


def test_every_number_of_sites_has_such_figures() -> None:
    counts = [*range(129, 1001), *range(1001, 4000, 97), 10_000]
    assert (
        max(
            max(found.values())
            for found in (risks(n, neighbour_graph.degree_of(n)) for n in counts)
        )
        < -31
    )


@pytest.mark.parametrize("count", [3, 5, 128])
def test_small_graphs_are_complete(count: int) -> None:
    found = neighbour_graph.neighbours(T, count)
    assert found == [tuple(j for j in range(count) if j != i) for i in range(count)]
    assert neighbour_graph.holders(found, 1) == tuple(range(count))


@given(st.binary(min_size=32, max_size=32), st.integers(3, 250), st.integers(1, 40))
@settings(max_examples=60)
def test_every_graph_is_symmetric_and_regular(transcript: bytes, count: int, half: int) -> None:
    degree = 2 * half
    found = neighbour_graph.neighbours(transcript, count, degree)
    assert len(found) == count
    expected = min(degree, count - 1)
    for i, near in enumerate(found):
        assert len(near) == expected
        assert list(near) == sorted(set(near))
        assert i not in near
        assert all(i in found[j] for j in near)
        assert neighbour_graph.holders(found, i) == tuple(sorted({*near, i}))
    assert found == neighbour_graph.neighbours(transcript, count, degree)


def test_a_ring_is_a_ring() -> None:
    """Degree 2 is one cycle through all sites, in the order of the permutation."""
    found = neighbour_graph.neighbours(T, 150, 2)
    seen, previous, here = [0], 0, found[0][0]
    while here != 0:
        seen.append(here)
        previous, here = here, next(j for j in found[here] if j != previous)
    assert sorted(seen) == list(range(150))
    assert seen != sorted(seen)
    wide = neighbour_graph.neighbours(T, 150, 6)
    for place, site in enumerate(seen):
        near = {seen[(place + d) % 150] for d in (-3, -2, -1, 1, 2, 3)}
        assert set(wide[site]) == near


def test_the_transcript_alone_permutes() -> None:
    found = neighbour_graph.neighbours(T, 200)
    digest = hashlib.sha256(repr(found).encode()).hexdigest()
    assert digest == "02beb75b6b3d5081ab3395ca6c3c7613ea179c817cb6ebe5dcda3d5b38ae2bd5"
    assert found != neighbour_graph.neighbours(bytes(32), 200)
    assert neighbour_graph.neighbours(T, 9, 4)[0] == (1, 4, 6, 7)


def test_every_permutation_comes_as_often() -> None:
    """Chi-squared over the 24 orders of four sites, of fixed transcripts: 23 degrees of freedom."""
    draws = 4800
    counts = Counter(
        tuple(neighbour_graph._permutation(hashlib.sha256(i.to_bytes(2, "big")).digest(), 4))
        for i in range(draws)
    )
    assert len(counts) == 24
    chi = sum((n - draws / 24) ** 2 / (draws / 24) for n in counts.values())
    assert 5 < chi < 59


@pytest.mark.parametrize(
    ("count", "degree", "message"),
    [
        (2, None, "sites: must be at least 3, got 2"),
        (2, 2, "3 sites and degree 2 or more"),
        (10, 0, "3 sites and degree 2 or more"),
        (10, 5, "degree: must be even in a ring, got 5"),
    ],
)
def test_impossible_graphs_are_refused(count: int, degree: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighbour_graph.neighbours(T, count, degree)


def test_other_defects_are_refused() -> None:
    with pytest.raises(ValueError, match="transcript: must be 32 bytes, got 31"):
        neighbour_graph.neighbours(T[1:], 10)
    with pytest.raises(ValueError, match="holders: must be at least 3, got 2"):
        neighbour_graph.threshold(2)
    assert neighbour_graph.neighbours(T, 10, 99) == neighbour_graph.neighbours(T, 10)
