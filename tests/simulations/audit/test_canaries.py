"""The canary audit: an honest mechanism is not contradicted, less noise than claimed is caught."""

import builders
import numpy as np
import pytest

from fedge.shared.errors import ConfigError
from fedge.shared.privacy.accounting import epsilon
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.tasks.registry import get_task
from fedge.simulations.audit.canaries import Sizes, audit, guessed_right

SMALL = Sizes(canaries=200, guesses=80, parameters=5_000)
KEY = bytes(range(32))
NAMES = ("distributed", "example")


def config(mechanism="off", noise=2.0, least=5, **privacy):
    own = {"mechanism": mechanism, "noise-multiplier": None if mechanism == "off" else noise}
    masks = {"enabled": mechanism == "distributed", "min-sites": least}
    sites = {"count": max(8, least)}
    return builders.config(sites=sites, privacy=own | privacy, secure_aggregation=masks)


def audited(config, *, sizes=SMALL, factor=1.0, key=KEY, listener=lambda *_: None):
    task = get_task("digits")
    return audit(config, task, sizes, Entropy(key=key), listener, noise_factor=factor)


@pytest.mark.parametrize("mechanism", NAMES)
def test_an_honest_mechanism_is_not_contradicted(mechanism):
    found = audited(config(mechanism))
    assert found.claim == pytest.approx(epsilon.epsilon([Release(2.0)], 1e-5))
    assert found.bound <= found.claim < found.most
    assert found.verdict == "not contradicted"
    assert found.could_contradict


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", NAMES)
def test_noise_cut_to_a_quarter_is_caught(mechanism):
    found = audited(config(mechanism), factor=0.25)
    assert found.claim == pytest.approx(epsilon.epsilon([Release(2.0)], 1e-5))
    assert found.bound > found.claim
    assert found.verdict == "caught"


@pytest.mark.parametrize("least", [5, 200, 230])
def test_distributed_noise_is_that_of_the_least_honest_sites(least):
    found = audited(config("distributed", 2.0, least))
    assert found.honest == least
    moved = spread(found)
    # Of scores in clipping bounds: the noise, and what the other canaries have in common with one.
    assert moved == pytest.approx((2.0**2 + 100 / 5000) ** 0.5, rel=0.2)


def test_corrupt_sites_leave_the_noise_to_the_others():
    found = audited(config("distributed", 2.0, 20, **{"corrupt-sites": 15}))
    assert found.honest == 5
    assert spread(found) == pytest.approx(2.0, rel=0.2)


@pytest.mark.parametrize("mechanism", NAMES)
@pytest.mark.parametrize("bound", [0.01, 30.0])
def test_canaries_are_clipped_and_a_score_is_in_units_of_the_bound(mechanism, bound):
    found = audited(config(mechanism, 0.1, **{"clipping-bound": bound}))
    scores, inside = found.scores, found.inside
    assert scores[inside].mean() == pytest.approx(1.0, abs=0.1)
    assert scores[~inside].mean() == pytest.approx(0.0, abs=0.1)


def test_plain_training_hides_nobody():
    found = audited(config())
    assert found.claim is None
    assert found.verdict == "unprotected"
    assert found.correct == SMALL.guesses
    assert found.bound == found.most > 3
    assert not found.could_contradict


def test_a_claim_beyond_what_guesses_can_prove_is_told_so():
    found = audited(config("example", 0.5))
    assert found.claim > found.most
    assert (found.verdict, found.could_contradict) == ("not contradicted", False)


def test_coins_are_the_systems_and_each_audit_has_its_own():
    a, b = (audited(config(), key=None) for _ in range(2))
    assert (a.inside != b.inside).any()
    assert 60 <= a.inside.sum() <= 140


def test_progress_is_told():
    told = []
    audited(config("distributed"), listener=lambda *step: told.append(step))
    assert ("sites add up", 0, 200) in told
    assert told[-1] == ("scores", 199, 200)


def test_guesses_name_both_ends_and_leave_the_middle():
    scores = np.array([0.1, 0.9, 0.5, 0.8, 0.2, 0.6])
    inside = np.array([False, True, False, False, True, True])
    assert guessed_right(scores, inside, 2) == 2
    assert guessed_right(scores, inside, 4) == 2


def test_what_is_refused():
    with pytest.raises(ConfigError, match="privacy: noise of one site: must be") as caught:
        audited(config("distributed", 0.01))
    assert caught.value.code == 201
    with pytest.raises(ValueError, match="noise_factor: must be 0.01 to 1, got 2"):
        audited(config("example"), factor=2.0)
    for wrong in ({"guesses": 3}, {"guesses": 0}, {"canaries": 100}):
        with pytest.raises(ValueError, match="guesses: must be even and 2 to"):
            Sizes(**wrong)
    with pytest.raises(ValueError, match="parameters: must be 1 or more, got 0"):
        Sizes(parameters=0)


#: Canaries and guesses of a real audit, on a quarter of its coordinates, for time. With the key fixed, as a rare draw
#: of noise cut to a quarter is not caught.
REAL = Sizes(parameters=25_000)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mechanism", NAMES)
def test_at_the_real_sizes(mechanism):
    honest = audited(config(mechanism, 1.0), sizes=REAL)
    assert honest.claim == pytest.approx(4.37718, abs=1e-5)
    assert 0.3 < honest.bound < honest.claim
    cut = audited(config(mechanism, 1.0), sizes=REAL, factor=0.25)
    assert cut.bound > cut.claim


def spread(found):
    """Deviation of the scores about the mean of those in and out."""
    means = np.where(
        found.inside, found.scores[found.inside].mean(), found.scores[~found.inside].mean()
    )
    return float((found.scores - means).std())
