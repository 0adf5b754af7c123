"""The sites of a round: a function of seed and round."""

from __future__ import annotations

import random
from typing import Any

import builders
import pytest

from fedge.server.participants.members import Member
from fedge.server.participants.selection import cohort
from fedge.shared.config.federation import Config

MEMBERS = {f"site-{i}": Member(f"site-{i}", 100 + i, 10 * i, i) for i in range(1, 10)}


def config(seed: int = 42, **round_options: Any) -> Config:
    sections = {"run": {"seed": seed}, "sites": {"count": 9}}
    return builders.config("breast-cancer", round=round_options, **sections)


def test_the_cohort_is_a_function_of_seed_and_round():
    half = config(**{"fraction-train": 0.5})
    sampled = [cohort(MEMBERS, half, r, 1) for r in range(1, 9)]
    random.seed(5)
    backwards = dict(reversed(MEMBERS.items()))
    again = [cohort(backwards, half, r, 1) for r in range(8, 0, -1)]
    assert sampled == list(reversed(again))
    assert len({tuple(c) for c in sampled}) > 1, "rounds differ"
    other = config(seed=43, **{"fraction-train": 0.5})
    assert sampled != [cohort(MEMBERS, other, r, 1) for r in range(1, 9)]
    assert set().union(*sampled) == set(MEMBERS), "every site is sampled some time"
    assert all(c == sorted(c) for c in sampled)


def test_node_ids_do_not_matter():
    """They are Flower's and change with every Flower run; a resumed round must ask the same sites."""
    half = config(**{"fraction-train": 0.5})
    renumbered = {s: Member(s, 900 - i, 1, 1) for i, s in enumerate(MEMBERS)}
    for server_round in range(1, 6):
        assert cohort(MEMBERS, half, server_round, 1) == cohort(renumbered, half, server_round, 1)


@pytest.mark.parametrize(
    ("round_options", "min_sites", "size"),
    [
        ({}, 1, 9),
        ({"fraction-train": 0.5}, 1, 4),
        ({"fraction-train": 0.01}, 1, 2),
        ({"fraction-train": 0.01, "min-sites": 6}, 1, 6),
        ({"fraction-train": 0.01}, 7, 7),
        ({"fraction-train": 0.01}, 50, 9),
    ],
)
def test_sizes(round_options: dict[str, Any], min_sites: int, size: int):
    sampled = cohort(MEMBERS, config(**round_options), 3, min_sites)
    assert len(sampled) == len(set(sampled)) == size


def test_required_sites_are_always_asked():
    wanted = ["site-2", "site-9"]
    few = config(**{"fraction-train": 0.01, "require-sites": wanted})
    without = config(**{"fraction-train": 0.01})
    for server_round in range(1, 20):
        sampled = cohort(MEMBERS, few, server_round, 1)
        assert set(wanted) <= set(sampled)
        assert set(sampled) == set(wanted) | set(cohort(MEMBERS, without, server_round, 1))
    elsewhere = config(**{"require-sites": ["site-2", "elsewhere"]})
    assert "elsewhere" not in cohort(MEMBERS, elsewhere, 1, 1)
