"""Flower 1.41 and 1.42's own SecAgg+ against a server that deviates: what was measured, pinned."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from flwr.common.secure_aggregation.secaggplus_constants import Stage

from . import flower_secagg as flower
from .flower_faults import workflow_round

SUCCEEDS = {
    "active-and-dead": ["all 6 clients answered", "raised nothing"],
    "swapped-key": ["no client raised", "the sum was right"],
    "two-survivor-lists": [
        "threshold 4: all answered, 3 and 3 shares, one of each too few",
        "threshold 3: all answered, 3 and 3 shares, enough",
    ],
    "replayed-round-or-attempt": [
        "expect unmask stage, but receive collect_masked_vectors stage",
        "Own public keys are displayed in dict incorrectly",
        "old boxes: InvalidToken without a text",
        "asked again without the victim, was answered by all",
    ],
    "edited-roster": ["nobody raised", "had all six updates before", "the sum was right"],
    "lowered-threshold": ["a threshold of 1 (and of 0 and -5) for 6 sites"],
    "nan-update": ["no client raised", "invalid value encountered in cast", "became 8184.000"],
    "dropout-before-upload": [
        "1 at setup: the round ended without a sum (5 clients raised KeyError: 3)",
        "1 at share_keys: the round ended without a sum (5 clients raised KeyError: 3)",
        "1 at collect_masked_vectors: the mean of the 5 uploads was right",
        "2 at collect_masked_vectors: the mean of the 4 uploads was right",
        "1 at unmask: the mean of the 6 uploads was right",
    ],
}
REFUSED = {
    "flipped-box-bit": ["InvalidToken without a text, which does not name", "the other 5 went on"],
    "second-unmask": [
        "0 shares of the victim's mask key",
        "expect setup stage, but receive unmask stage",
        "expect share_keys stage, but receive unmask stage",
    ],
}
#: Those that end with the victim's update in the server's hands.
RECOVERED = list(SUCCEEDS)[:6]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, flower.Outcome]:
    return {outcome.name: outcome for outcome in flower.run_all(seed=7)}


def test_the_version_that_this_was_measured_on() -> None:
    minor = version("flwr").rpartition(".")[0]
    assert minor in flower.MEASURED, "measure again: python -m attacks.flower_secagg"


@pytest.mark.slow
def test_an_honest_round_finds_the_sum() -> None:
    error, examples, true = flower.honest_round(seed=7)
    assert error <= 6  # each of the six rounds at random, by less than one step
    assert examples == pytest.approx(true, abs=0.01)


def test_a_client_without_the_whole_secret_stays_masked() -> None:
    """The twin of every recovery: with a wrong self-mask seed the same steps find nothing."""
    server = flower.Server(flower.make_sites(7))
    keys, masked = flower.until_masked(server)
    pool = server.unmask(server.sites, dead=[flower.VICTIM])
    _, secret = flower.own_secrets(pool)
    vector = flower.recover(masked[flower.VICTIM], flower.VICTIM, bytes(32), secret, keys)
    outcome = flower._recovered("x", server.sites[flower.VICTIM], vector, "")
    assert outcome.verdict == "refused"


@pytest.mark.slow
def test_every_attack_of_the_design_was_run(outcomes: dict[str, flower.Outcome]) -> None:
    assert set(outcomes) == set(SUCCEEDS) | set(REFUSED)


@pytest.mark.parametrize("name", SUCCEEDS)
def test_succeeds(outcomes: dict[str, flower.Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.verdict == "succeeds", outcome
    assert [part for part in SUCCEEDS[name] if part not in outcome.what_happened] == []


@pytest.mark.parametrize("name", REFUSED)
def test_refused(outcomes: dict[str, flower.Outcome], name: str) -> None:
    outcome = outcomes[name]
    assert outcome.verdict == "refused", outcome
    assert [part for part in REFUSED[name] if part not in outcome.what_happened] == []


@pytest.mark.parametrize("name", RECOVERED)
def test_the_victims_update_and_its_examples_were_recovered(
    outcomes: dict[str, flower.Outcome], name: str
) -> None:
    assert "update was recovered to" in outcomes[name].what_happened
    assert outcomes[name].what_happened.endswith("and its 130 examples")


def test_a_client_that_raises_is_a_refusal_and_a_mistake_of_ours_is_not() -> None:
    def unmask_first(seed: int) -> flower.Outcome:
        flower.Server(flower.make_sites(seed)).ask(1, Stage.UNMASK)
        raise AssertionError("the client answered")

    def mistaken(seed: int) -> flower.Outcome:
        return flower.Server(flower.make_sites(seed)).ask(99, Stage.SETUP)

    refused = flower.run(unmask_first, 7)
    assert (refused.name, refused.verdict) == ("unmask-first", "refused")
    assert "expect setup stage, but receive unmask stage" in refused.what_happened
    with pytest.raises(KeyError):
        flower.run(mistaken, 7)


def test_flowers_own_workflow_aggregates_when_nobody_drops() -> None:
    assert workflow_round(7, []) == (True, "the mean of the 6 uploads was right")


def test_flowers_own_workflow_ends_below_its_threshold() -> None:
    lost = [(node, Stage.COLLECT_MASKED_VECTORS) for node in (3, 4, 5)]
    assert workflow_round(7, lost) == (False, "the round ended without a sum")


def test_the_table_has_a_row_for_each(outcomes: dict[str, flower.Outcome]) -> None:
    lines = flower.table(outcomes.values()).splitlines()
    assert lines[0] == f"| attack | Flower {version('flwr')} | what happened |"
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in outcomes]
