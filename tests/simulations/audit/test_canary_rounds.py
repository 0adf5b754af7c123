"""Canaries under noise of the server's and of single sites: the noise is the claimed one, and less is caught."""

import builders
import numpy as np
import pytest

from fedge.shared.errors import ConfigError
from fedge.shared.privacy.accounting import epsilon
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.tasks.registry import get_task
from fedge.simulations.audit.canaries import Sizes, audit
from fedge.simulations.audit.canary_rounds import parameters

SMALL = Sizes(canaries=400, guesses=160, parameters=5_000)
FEW = Sizes(canaries=200, guesses=80, parameters=2_000)
NAMES = ("central", "central-mf", "local")


def config(mechanism, noise=2.0, rounds=6, **privacy):
    apart = 3 if mechanism == "central-mf" else None
    own = {"mechanism": mechanism, "noise-multiplier": noise, "min-separation": apart}
    return builders.config(run={"rounds": rounds}, privacy=own | privacy)


def audited(config, *, sizes=SMALL, factor=1.0, key=bytes(range(32)), listener=lambda *_: None):
    return audit(config, get_task("digits"), sizes, Entropy(key=key), listener, noise_factor=factor)


def spread(found):
    """Deviation of the scores about the mean of those in and out."""
    inside, scores = found.inside, found.scores
    means = np.where(inside, scores[inside].mean(), scores[~inside].mean())
    return float((scores - means).std())


@pytest.mark.parametrize("mechanism", NAMES)
def test_an_honest_mechanism_is_not_contradicted(mechanism):
    found = audited(config(mechanism))
    assert found.claim == pytest.approx(epsilon.epsilon([Release(2.0)], 1e-5))
    assert found.bound <= found.claim < found.most
    assert found.verdict == "not contradicted"
    assert found.rounds == (6 if mechanism == "central-mf" else 1)


@pytest.mark.parametrize("mechanism", NAMES)
def test_noise_cut_to_a_quarter_is_caught(mechanism):
    found = audited(config(mechanism), factor=0.25)
    assert found.claim == pytest.approx(epsilon.epsilon([Release(2.0)], 1e-5))
    assert found.bound > found.claim
    assert found.verdict == "caught"


@pytest.mark.parametrize("mechanism", NAMES)
@pytest.mark.parametrize("bound", [0.01, 30.0])
def test_canaries_are_clipped_and_a_score_is_in_units_of_the_bound(mechanism, bound):
    found = audited(config(mechanism, 0.1, **{"clipping-bound": bound}), sizes=FEW)
    scores, inside = found.scores, found.inside
    assert scores[inside].mean() == pytest.approx(1.0, abs=0.1)
    assert scores[~inside].mean() == pytest.approx(0.0, abs=0.1)


def test_local_scores_have_the_noise_multiplier_for_deviation_and_nothing_in_common():
    assert spread(audited(config("local", 0.5), sizes=FEW)) == pytest.approx(0.5, rel=0.12)


@pytest.mark.parametrize("quantile", [{}, {"clipping-quantile": 0.5}])
def test_central_noise_is_that_of_one_round_in_which_all_are_drawn(quantile):
    found = audited(config("central", **{"sampling-rate": 0.1, **quantile}))
    assert spread(found) == pytest.approx((2.0**2 + 200 / 5000) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    ("rounds", "apart", "bands"),
    [(1, 1, None), (6, 1, None), (6, 6, None), (7, 3, None), (7, 3, 5), (8, 2, 8)],
)
def test_no_weighing_of_a_runs_rounds_leaves_less_than_the_noise_multiplier(rounds, apart, bands):
    # The canary with most turns; with the run's own sensitivity its noise is the claim's, no more and no less.
    more = {"min-separation": apart} | ({"bands": bands} if bands else {})
    found = audited(config("central-mf", 1.0, rounds, **more), sizes=FEW)
    assert spread(found) == pytest.approx((1 + 100 / 2000) ** 0.5, rel=0.12)
    scores, inside = found.scores, found.inside
    assert scores[inside].mean() - scores[~inside].mean() == pytest.approx(1.0, abs=0.5)


def test_noise_for_one_turn_of_several_is_caught(monkeypatch):
    # The mistake that this audit is there for: a sensitivity that counts one turn of each site alone.
    from fedge.shared.privacy.mechanisms import toeplitz

    right = toeplitz.sensitivity
    monkeypatch.setattr(
        toeplitz,
        "sensitivity",
        lambda coefficients, rounds, _, apart: right(coefficients, rounds, 1, apart),
    )
    found = audited(config("central-mf", 3.0, 32, **{"min-separation": 1, "bands": 1}))
    assert found.verdict == "caught"


def test_a_long_run_has_shorter_canaries():
    def of(rounds, wanted=100_000, mechanism="central-mf"):
        return parameters(config(mechanism, rounds=rounds).privacy, rounds, wanted)

    assert of(6) == of(9) == 100_000
    assert of(18) == 50_000
    assert of(5000) == 20_000
    assert of(5000, 5_000) == 5_000
    assert of(5000, mechanism="central") == 100_000


def test_progress_is_told():
    told = []
    audited(config("central-mf"), sizes=FEW, listener=lambda *step: told.append(step))
    assert told[:6] == [("rounds", i, 6) for i in range(6)]
    assert told[-1] == ("scores", 199, 200)
    told = []
    audited(config("local"), sizes=FEW, listener=lambda *step: told.append(step))
    assert told[-1] == ("sites", 199, 200)


def test_local_noise_that_fits_no_grid_is_refused():
    with pytest.raises(ConfigError, match="privacy: noise: must be") as caught:
        audited(config("local", 1e4), sizes=Sizes(10, 4, 100_000))
    assert caught.value.code == 201


#: Canaries and guesses of a real audit, on a quarter of its coordinates, for time. With the key fixed, as a rare draw
#: of noise cut to a quarter is not caught.
REAL = Sizes(parameters=25_000)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("mechanism", NAMES)
def test_at_the_real_sizes(mechanism):
    honest = audited(config(mechanism, 1.0, 12), sizes=REAL)
    assert honest.claim == pytest.approx(4.37718, abs=1e-5)
    assert 0.3 < honest.bound < honest.claim
    cut = audited(config(mechanism, 1.0, 12), sizes=REAL, factor=0.25)
    assert cut.bound > cut.claim
