"""The server's noise: as much as is claimed, over a number that nobody's coming changes; a crash does not end it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import builders
import numpy as np
import pytest

from fedge.server.aggregation.central_noise import CentralNoise, Noised, for_run
from fedge.server.aggregation.privacy_cost import central_spent, is_secret_sample
from fedge.server.aggregation.updates import Update
from fedge.server.runs.checkpoints import checkpoints_to_keep
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.errors import RunError
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.mechanisms import toeplitz
from fedge.shared.privacy.mechanisms.csprng import Entropy

Arrays = dict[str, np.ndarray[Any, Any]]
KEY = bytes(range(32))
ZERO: Arrays = {"w": np.zeros(3)}


def section(mechanism: str = "central", **values: Any) -> PrivacySection:
    values = {"noise_multiplier": 1.0, **values}
    return builders.section(PrivacySection, mechanism=mechanism, **values)


def noise(
    privacy: PrivacySection, rounds: int = 10, model: Arrays = ZERO, key: bytes | None = KEY
) -> CentralNoise:
    return CentralNoise(privacy, rounds, model, entropy=Entropy(key=key))


class Seeded(random.SystemRandom):
    """The operating system's interface over a generator with a seed."""

    generator = random.Random(0)

    def getrandbits(self, k: int) -> int:
        return self.generator.getrandbits(k)


def update(site: str, *values: float, num_examples: int = 1) -> Update:
    return Update(site, {"w": np.array(values)}, num_examples, None)


def names(count: int) -> list[str]:
    return [f"site-{i:02d}" for i in range(count)]


def mean(noised: Noised) -> np.ndarray[Any, Any]:
    return noised.result.mean["w"]


def test_other_mechanisms_have_none() -> None:
    assert for_run(PrivacySection(), 5, ZERO) is None
    assert for_run(section("example"), 5, ZERO) is None
    assert isinstance(for_run(section(), 5, ZERO), CentralNoise)


def test_updates_are_clipped_and_added_with_weight_one() -> None:
    quiet = noise(section(**{"noise-multiplier": 1e-6, "clipping-bound": 2.0}))
    updates = [update("a", 1.0, 0, 0, num_examples=1000), update("b", 0, 30.0, 40.0)]
    found = quiet.release(1, updates, ZERO, 4)
    # Of a length of 50, scaled to 2; and over four sites, though two came.
    np.testing.assert_allclose(mean(found), np.array([1.0, 1.2, 1.6]) / 4, atol=1e-5)
    assert found.result.sites == ("a", "b")
    assert found.result.loss_total is None
    assert found.result.weight == 1


def test_the_bound_is_over_all_tensors_together_and_counters_stay() -> None:
    model: Arrays = {
        "a": np.zeros(1, np.float32), "n": np.asarray(7, np.int64), "b": np.zeros((2, 1), np.float32),
    }  # fmt: skip
    site = {
        "a": np.full(1, 3.0, np.float32),
        "n": np.asarray(9, np.int64),
        "b": np.full((2, 1), 2.0, np.float32),
    }
    quiet = noise(section(**{"noise-multiplier": 1e-6}), model=model)
    found = quiet.release(1, [Update("s", site, 5, None)], model, 1).result.mean
    length = math.sqrt(9 + 4 + 4)
    np.testing.assert_allclose(found["a"], 3 / length, atol=1e-5)
    np.testing.assert_allclose(found["b"], 2 / length, atol=1e-5)
    assert found["n"] == 7


@pytest.mark.parametrize("bound", [0.1, 3.0])
def test_the_noise_has_the_variance_that_is_claimed(bound: float) -> None:
    size, registered = 40_000, 8
    model: Arrays = {"w": np.zeros(size)}
    of = section(**{"noise-multiplier": 1.5, "clipping-bound": bound, "sampling-rate": 0.25})
    found = mean(noise(of, model=model).release(1, [], model, registered))
    claimed = 1.5 * bound / (0.25 * registered)
    off = 3 * math.sqrt(2 / size)
    assert abs(found.var() / claimed**2 - 1) < off
    assert abs(found.mean()) < 3 * claimed / math.sqrt(size)
    # The failing twin: noise for the mean over all sites and not over those that are drawn on average.
    assert abs(found.var() / (claimed * 0.25) ** 2 - 1) > off


def test_the_noise_of_an_update_that_is_there_is_the_same() -> None:
    """What one site brings shifts the release by its clipped update over the expected number, and nothing else."""
    with_it = noise(section()).release(1, [update("a", 0.5, 0, 0)], ZERO, 4)
    without = noise(section()).release(1, [], ZERO, 4)
    np.testing.assert_allclose(mean(with_it) - mean(without), [0.125, 0, 0], atol=1e-3)


def test_a_site_changes_the_mean_by_the_bound_over_the_expected_number_whoever_else_came() -> None:
    others = [update(name, 1.0, 0, 0) for name in names(3)]
    one = update("z", -5.0, 0, 0)
    for beside in ([], others[:1], others):
        both = [
            mean(noise(section()).release(1, found, ZERO, 4)) for found in (beside, [*beside, one])
        ]
        assert np.linalg.norm(both[0] - both[1]) == pytest.approx(0.25, abs=1e-3)
    # The failing twin: by the number that came, one site moves the others' weight as well.
    means = [
        np.mean([u.arrays["w"].clip(-1, 1) for u in found], axis=0)
        for found in (others[:1], [others[0], one])
    ]
    assert np.linalg.norm(means[0] - means[1]) > 0.9


def test_the_order_of_the_sites_is_nothing() -> None:
    draw = np.random.default_rng(5)
    updates = [update(name, *draw.standard_normal(3)) for name in names(9)]
    forth = noise(section()).release(1, updates, ZERO, 9)
    back = noise(section()).release(1, updates[::-1], ZERO, 9)
    np.testing.assert_array_equal(mean(forth), mean(back))


def test_every_value_is_on_the_grid() -> None:
    """No float's low bits are given out: what is, is a whole number of steps."""
    updates = [update("a", 0.1, 0.2, 0.3)]
    of = noise(section())
    step = 1.0 / 4096
    found = mean(of.release(1, updates, ZERO, 1)) / step
    np.testing.assert_array_equal(found, np.rint(found))
    mf = noise(section("central-mf", **{"min-separation": 2, "bands": 4}), key=None)
    scale = toeplitz.sensitivity(toeplitz.coefficients(10, 4), 10, 5, 2)
    for server_round in range(1, 6):
        found = mean(mf.release(server_round, updates, ZERO, 2)) / (step * scale)
        np.testing.assert_allclose(found, np.rint(found), atol=1e-6)


def test_what_is_drawn_is_fresh() -> None:
    first, again = (mean(noise(section(), key=None).release(1, [], ZERO, 1)) for _ in range(2))
    assert (first != again).any()


def test_a_round_is_played_once() -> None:
    of = noise(section("central-mf"))
    of.release(1, [], ZERO, 1)
    for again in (1, 3):
        with pytest.raises(ValueError, match="server_round: must be 2"):
            of.release(again, [], ZERO, 1)
        with pytest.raises(ValueError, match="server_round: must be 2"):
            of.skip(again)


# Who is asked.


def test_a_sample_is_drawn_by_independent_coins_and_may_be_empty() -> None:
    of = CentralNoise(section(**{"sampling-rate": 0.3}), 10, ZERO, system=Seeded())
    every = names(5)
    drawn = [of.invite(1, reversed(every), every) for _ in range(4000)]
    sizes = np.array([len(found) for found in drawn])
    assert abs(sizes.mean() - 1.5) < 4 * math.sqrt(5 * 0.21 / 4000)
    # The failing twin, samples of a fixed size, has no variance, and none is empty.
    assert abs(sizes.var() - 5 * 0.21) < 0.12
    assert abs((sizes == 0).mean() - 0.7**5) < 0.03
    assert all(found == sorted(found) for found in drawn)


def test_at_rate_one_and_without_turns_everybody_present_is_asked() -> None:
    every = names(6)
    for of in (noise(section()), noise(section("central-mf"))):
        for server_round in range(1, 6):
            assert of.invite(server_round, every[2:], every) == every[2:]


def least_distance(order: Callable[[list[str]], list[str]]) -> int:
    """Between two turns of a site, where others join in rounds 3, 5 and 9."""
    rounds, apart = 23, 4
    of = noise(section("central-mf", **{"min-separation": apart}), rounds)
    registered = ["north", "d", "c", "b"]
    asked: dict[str, list[int]] = {}
    for server_round in range(1, rounds + 1):
        if server_round in (3, 5, 9):
            registered.append(f"a-{server_round}")
        found = of.invite(server_round, reversed(registered), order(registered))
        assert found == sorted(found)
        for name in found:
            asked.setdefault(name, []).append(server_round)
    assert set(asked) == set(registered)
    return min(b - a for turns in asked.values() for a, b in itertools.pairwise(turns))


def test_turns_are_apart_also_of_sites_that_come_later() -> None:
    assert least_distance(lambda registered: registered) == 4
    # The failing twin: places in name order move as others come, and turns come too close.
    assert least_distance(sorted) < 4


def test_whom_a_sum_is_divided_by_depends_on_who_is_registered_alone() -> None:
    assert noise(section(**{"sampling-rate": 0.25})).expected(10) == 2.5
    turns = noise(section("central-mf", **{"min-separation": 4}))
    assert turns.expected(10) == 2.5
    for came in ([], [update("a", 1, 0, 0)], [update(n, 1, 0, 0) for n in names(7)]):
        told = noise(section(**{"sampling-rate": 0.25})).release(1, came, ZERO, 10).facts
        assert told["expected_sites"] == 2.5


# Correlated noise.


def played(
    central: CentralNoise, model: Arrays, rounds: Sequence[int]
) -> list[np.ndarray[Any, Any]]:
    return [mean(central.release(r, [], model, 1)) for r in rounds]


def test_correlated_noise_adds_up_to_less_than_independent_noise() -> None:
    rounds, size = 16, 4000
    model: Arrays = {"w": np.zeros(size)}
    of = section("central-mf", **{"min-separation": 4})
    steps = np.array(played(noise(of, rounds, model), model, range(1, rounds + 1)))
    # Each round's sum is over a quarter of a site here, as there is one in four rounds.
    measured = math.sqrt(float((np.cumsum(steps, axis=0) ** 2).mean())) / 4
    bands = toeplitz.best_bands(rounds, 4, 4)
    share = toeplitz.error(toeplitz.coefficients(rounds, bands), rounds, 4, 4)
    independent = math.sqrt(4) * math.sqrt((rounds + 1) / 2)
    assert measured == pytest.approx(share * independent, rel=0.05)
    assert share < 0.8


def test_the_first_rounds_noise_is_scaled_by_what_all_rounds_of_a_site_change() -> None:
    rounds, size = 12, 40_000
    model: Arrays = {"w": np.zeros(size)}
    of = section("central-mf", **{"min-separation": 3, "bands": 5, "noise-multiplier": 0.7})
    found = mean(noise(of, rounds, model).release(1, [], model, 3))
    wide = 0.7 * toeplitz.sensitivity(toeplitz.coefficients(rounds, 5), rounds, 4, 3)
    assert abs(found.var() / wide**2 - 1) < 3 * math.sqrt(2 / size)
    # The failing twin: noise for one round alone.
    assert found.var() > 2 * 0.7**2


@pytest.mark.parametrize("skipped", [0, 3])
def test_a_run_that_goes_on_has_the_noise_that_it_would_have_had(skipped: int) -> None:
    """From a checkpoint of each round, with the same random bits; those of the rounds before are in the past noise."""
    rounds, size = 8, 50
    model: Arrays = {"w": np.zeros(size)}
    of = section("central-mf", **{"min-separation": 2, "bands": 4})

    def step(central: CentralNoise, server_round: int) -> np.ndarray[Any, Any] | None:
        if server_round == skipped:
            central.skip(server_round)
            return None
        return mean(central.release(server_round, [], model, 2))

    for done in range(1, rounds):
        whole = noise(of, rounds, model)
        for server_round in range(1, done + 1):
            step(whole, server_round)
        memory = {k: a.copy() for k, a in whole.state().items()}
        resumed, forgetful = noise(of, rounds, model), noise(of, rounds, model)
        resumed.restore({**memory, "m_t/w": np.zeros(1)}, done)
        forgetful.done = done
        # From here on all three draw the same bits.
        for central in (whole, resumed, forgetful):
            central._entropy = Entropy(key=bytes(32))
        for server_round in range(done + 1, rounds + 1):
            goes_on, again, anew = (step(c, server_round) for c in (whole, resumed, forgetful))
            if goes_on is None or again is None or anew is None:
                continue
            np.testing.assert_array_equal(goes_on, again)
            if server_round == done + 1 and done != skipped:
                assert (goes_on != anew).any(), "the failing twin began its noise anew"


def test_a_skipped_round_uses_its_noise_up() -> None:
    """The next round takes back a part of what nobody saw: one noise for each round's number."""
    rounds, model = 6, {"w": np.zeros(20_000)}
    of = section("central-mf", **{"min-separation": 3})
    ended = []
    for skip in (False, True):
        central = noise(of, rounds, model)
        if skip:
            central.skip(1)
        else:
            central.release(1, [], model, 1)
        ended.append(mean(central.release(2, [], model, 1)))
    np.testing.assert_array_equal(*ended)


def test_the_last_checkpoint_holds_no_past_noise() -> None:
    of = section("central-mf", bands=2)
    central = noise(of, 3)
    for server_round in (1, 2):
        central.release(server_round, [], ZERO, 1)
        assert central.state()["central/past-noise"].shape == (1, 3)
    central.release(3, [], ZERO, 1)
    assert set(central.state()) == {"central/round", "central/clipping-bound"}
    noise(of, 3).restore(central.state(), 3)
    assert [checkpoints_to_keep(of, 3, done) for done in (1, 2, 3)] == [2, 2, 1]
    assert checkpoints_to_keep(PrivacySection(), 3, 3) == 2


@pytest.mark.parametrize(
    "damage",
    [
        {"central/round": np.asarray(1)},
        {"central/round": None},
        {"central/clipping-bound": np.asarray(0.0)},
        {"central/clipping-bound": np.asarray(math.nan)},
        {"central/clipping-bound": None},
        {"central/past-noise": None},
        {"central/past-noise": np.zeros((1, 4))},
        {"central/past-noise": np.zeros((1, 3), np.float32)},
        {"central/past-noise": np.full((1, 3), math.inf)},
    ],
)
def test_noise_is_never_begun_anew_within_a_run(damage: dict[str, Any]) -> None:
    of = section("central-mf", bands=2)
    central = noise(of)
    for server_round in (1, 2):
        central.release(server_round, [], ZERO, 1)
    memory = {k: a for k, a in (central.state() | damage).items() if a is not None}
    with pytest.raises(RunError, match="noise's state after round 2") as caught:
        noise(of).restore(memory, 2)
    assert caught.value.code == 504
    noise(of).restore({}, 0)


# The bound that follows a quantile.


class Inverted(CentralNoise):
    """Flower 1.41's and 1.42's rule, of which the sign is wrong."""

    def _follow(self, *arguments: Any) -> float:
        before = self.clipping_bound
        fraction = super()._follow(*arguments)
        self.clipping_bound = before**2 / self.clipping_bound
        return fraction


def follow(kind: type[CentralNoise], start: float, rounds: int = 120, **values: Any) -> float:
    """Rounds of 200 sites whose norms are lognormal with a median of 1."""
    sites = 200
    norms = np.exp(np.random.default_rng(11).standard_normal(sites))
    norms /= np.median(norms)
    updates = [update(n, norm, 0, 0) for n, norm in zip(names(sites), norms, strict=True)]
    of = section(
        **{
            "clipping-bound": start,
            "clipping-quantile": 0.5,
            "count-noise-multiplier": 1.0,
            "noise-multiplier": 0.1,
        },
        **values,
    )
    central = kind(of, rounds, ZERO, entropy=Entropy(key=KEY))
    for server_round in range(1, rounds + 1):
        central.release(server_round, updates, ZERO, sites)
    return central.clipping_bound


@pytest.mark.slow
@pytest.mark.parametrize("start", [0.1, 5.0])
def test_the_bound_comes_within_five_percent_of_the_median(start: float) -> None:
    assert follow(CentralNoise, start) == pytest.approx(1.0, rel=0.05)


@pytest.mark.slow
def test_with_the_sign_inverted_it_does_not() -> None:
    assert follow(Inverted, 0.1) < 1e-4
    assert follow(Inverted, 5.0) > 1e3


def test_the_round_as_a_whole_is_worth_the_noise_multiplier() -> None:
    for registered, wanted in ((10, 1.0), (1000, 50.0)):
        of = noise(section(**{"clipping-quantile": 0.5}))
        told = of.release(1, [], ZERO, registered).facts
        updates = told["noise_multiplier"]
        assert updates**-2 + (2 * wanted) ** -2 == pytest.approx(1.0)
        assert updates > 1
    fixed = noise(section()).release(1, [], ZERO, 10).facts
    assert fixed["noise_multiplier"] == 1
    assert fixed["fraction_within"] is None


def test_the_bound_is_this_rounds_until_it_is_over_and_survives_a_crash() -> None:
    of = section(**{"clipping-quantile": 0.9, "clipping-bound": 0.5})
    central = noise(of)
    told = central.release(1, [update("a", 9, 0, 0)], ZERO, 1).facts
    assert told["clipping_bound"] == 0.5
    moved = 0.5 * math.exp(-0.2 * (told["fraction_within"] - 0.9))
    assert central.clipping_bound == pytest.approx(moved, rel=1e-12)
    resumed = noise(of)
    resumed.restore(central.state(), 1)
    assert resumed.clipping_bound == central.clipping_bound
    assert resumed.release(2, [], ZERO, 1).facts["clipping_bound"] == central.clipping_bound


def test_an_empty_sample_moves_the_bound_by_noise_alone() -> None:
    of = section(**{"clipping-quantile": 0.5, "sampling-rate": 0.1})
    found = []
    for key in range(200):
        central = CentralNoise(of, 1, ZERO, entropy=Entropy(key=bytes([key]) * 32))
        found.append(central.release(1, [], ZERO, 100).facts["fraction_within"])
    # No bit: half of none. Noise of 1 on their sum, over ten sites.
    assert abs(np.mean(found) - 0.5) < 4 * 0.1 / math.sqrt(200)
    assert np.std(found) == pytest.approx(0.1, rel=0.2)


@pytest.mark.slow
def test_the_bound_stays_within_what_can_be_computed() -> None:
    of = section(
        **{
            "clipping-quantile": 0.5, "clipping-learning-rate": 10.0, "sampling-rate": 0.001,
            "noise-multiplier": 100.0,
        }
    )  # fmt: skip
    central = noise(of, 50)
    for server_round in range(1, 51):
        central.release(server_round, [], ZERO, 10)
        assert 1e-9 <= central.clipping_bound <= 1e9


# What it costs.


def test_epsilon_by_round() -> None:
    of = section(**{"sampling-rate": 0.1})
    after = central_spent(of, 100)
    # The accounting table's.
    assert after["consumers"] == pytest.approx(7.0466, abs=1e-3)
    assert after["sample_known"] == pytest.approx(epsilon([Release(1.0, 1.0, 100)], 1e-5))
    assert after["delta"] == 1e-5
    assert central_spent(of, 1)["consumers"] < after["consumers"]
    plain = central_spent(section(), 3)
    assert plain["consumers"] == plain["sample_known"] == epsilon([Release(1.0, 1.0, 3)], 1e-5)
    # What evaluations with noise tell is told too.
    noised = section(**{"metrics": "noised", "metrics-noise-multiplier": 3.0})
    releases = [Release(1.0, 1.0, 3), Release(3.0, 1.0, 2)]
    assert central_spent(noised, 3, 2)["consumers"] == epsilon(releases, 1e-5) > plain["consumers"]
    assert central_spent(noised, 3, 0) == central_spent(section(), 3, 2) == plain
    # Correlated noise is one release, whichever round it has come to.
    assert central_spent(section("central-mf"), 1) == central_spent(section("central-mf"), 9)
    assert central_spent(section("central-mf"), 9)["consumers"] == pytest.approx(4.37718, abs=1e-5)
    assert central_spent(section(**{"noise-multiplier": 1e-200}), 1)["consumers"] is None


def test_a_round_counts_the_evaluations_up_to_its_own() -> None:
    noised = section(**{"metrics": "noised", "metrics-noise-multiplier": 3.0})
    central = for_run(noised, 5, ZERO, 2)
    assert central is not None
    found = [central.skip(number)["epsilon"] for number in range(1, 6)]
    # After 2, after 4, and after the last one.
    assert found == [central_spent(noised, n, e) for n, e in enumerate((0, 1, 1, 2, 3), start=1)]


def test_only_a_sample_that_is_drawn_is_secret() -> None:
    assert is_secret_sample(section(**{"sampling-rate": 0.5}))
    assert not is_secret_sample(section())
    assert not is_secret_sample(section("central-mf", **{"min-separation": 2}))
    assert not is_secret_sample(PrivacySection())
