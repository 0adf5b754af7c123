import math
import random
import subprocess
import sys
import time
import warnings

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from dp_accounting.privacy_accountant import NeighboringRelation
from dp_accounting.rdp import RdpAccountant

from fedge.shared.privacy.accounting import epsilon as accounting
from fedge.shared.privacy.accounting.epsilon import (
    MAX_NOISE,
    MIN_NOISE,
    Release,
    accountant,
    calibrate,
    epsilon,
    gaussian_epsilon,
    unamplified,
)

#: shared/design/privacy.md: noise multiplier, sampling rate, steps, delta, epsilon.
SAMPLED = [
    (1, 0.01, 1000, 1e-5, 1.8282),
    (1.1, 256 / 60000, 14063, 1e-5, 2.3818),
    (1, 0.1, 100, 1e-5, 7.0466),
    (4, 0.1, 100, 1e-5, 0.9829),
    (0.8, 0.05, 200, 1e-6, 8.8657),
    (1.3, 0.02, 2000, 1e-5, 3.5487),
    (2, 0.25, 100, 1e-5, 6.4492),
]
PLAIN = [(5, 100, 9.99726), (1, 1, 4.37718), (4, 1, 0.92634)]


def generated(count, seed=20261122):
    """Noise multiplier, sampling rate, steps, delta; even in logarithms."""
    chance = random.Random(seed)

    def between(low, high):
        return low * (high / low) ** chance.random()

    return [
        (between(0.6, 8), between(1e-3, 1), int(between(1, 5001)), between(1e-7, 1e-4))
        for _ in range(count)
    ]


CONFIGURATIONS = generated(100)
#: Those whose direct reckoning takes a moment.
QUICK = [case for case in CONFIGURATIONS if case[2] <= 60 and case[0] > 1.5][:6]


def direct(noise, rate, steps, delta, interval):
    """dp-accounting's own accountant, by its events."""
    event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
    actual = PLDAccountant(value_discretization_interval=interval).compose(event, steps)
    return actual.get_epsilon(delta)


def by_rdp(noise, rate, steps, delta):
    """dp-accounting's RDP of Poisson samples; at lower orders it may not converge."""
    event = dp_event.PoissonSampledDpEvent(rate, dp_event.GaussianDpEvent(noise))
    return (
        RdpAccountant([1 + tenth / 10 for tenth in range(6, 100)])
        .compose(event, steps)
        .get_epsilon(delta)
    )


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "rate", "steps", "delta", "expected"), SAMPLED)
def test_published_numbers_with_sampling(noise, rate, steps, delta, expected):
    releases = [Release(noise, rate, steps)]
    assert epsilon(releases, delta) == pytest.approx(expected, abs=1e-3)
    assert accountant(releases) == "PLD"


@pytest.mark.parametrize(("noise", "steps", "expected"), PLAIN)
def test_published_numbers_without_sampling(noise, steps, expected):
    releases = [Release(noise, 1.0, steps)]
    assert epsilon(releases, 1e-5) == pytest.approx(expected, abs=1e-5)
    assert accountant(releases) == "analytic"


@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), QUICK)
def test_agrees_with_dp_accounting(noise, rate, steps, delta):
    actual = epsilon([Release(noise, rate, steps)], delta)
    assert actual == pytest.approx(direct(noise, rate, steps, delta, 1e-4), abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [
        *CONFIGURATIONS[:20],
        *(pytest.param(*c, marks=pytest.mark.soak) for c in CONFIGURATIONS[20:]),
    ],
)
def test_agrees_with_dp_accounting_everywhere(noise, rate, steps, delta):
    actual = epsilon([Release(noise, rate, steps)], delta)
    # Its default grid, 1e-4, is itself too coarse for small losses, and takes gigabytes for large ones.
    spread = rate * math.sqrt(steps) / noise
    interval = 2e-5 if spread < 0.3 and noise > 1 else 1e-4 if actual < 20 else 5e-4
    expected = direct(noise, rate, steps, delta, interval)
    assert actual == pytest.approx(expected, abs=1e-3 * max(1, actual / 100))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "rate", "steps", "delta"),
    [*(case[:4] for case in SAMPLED if case[2] <= 2000), (3, 0.5, 10, 1e-6)],
)
def test_opacus_is_an_upper_bound_close_by(noise, rate, steps, delta):
    from opacus.accountants import PRVAccountant

    with warnings.catch_warnings():
        # It says of itself that it was not checked; here it is.
        warnings.simplefilter("ignore")
        prv = PRVAccountant()
        prv.history = [(noise, rate, steps)]
        upper = prv.get_epsilon(delta, eps_error=1e-3)
    assert -1e-3 <= upper - epsilon([Release(noise, rate, steps)], delta) <= 2e-3


@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), QUICK)
def test_lies_between_what_is_exact_for_one_step_and_rdp(noise, rate, steps, delta):
    actual = epsilon([Release(noise, rate, steps)], delta)
    assert epsilon([Release(noise, rate)], delta) <= actual <= by_rdp(noise, rate, steps, delta)


def test_parts_of_a_kind_are_one():
    whole = epsilon([Release(1.0, 0.1, 30), Release(2.0, 0.2, 10), Release(4.0)], 1e-5)
    parts = [Release(2, 0.2, 4), Release(1.0, 0.1, 1), Release(4, 1, 1), Release(2.0, 0.2, 6)]
    parts += [Release(1, 0.1)] * 29
    assert epsilon(parts, 1e-5) == whole
    assert epsilon(parts[::-1], 1e-5) == whole


@pytest.mark.slow
def test_different_kinds_together_agree_with_dp_accounting():
    releases = [Release(1.0, 0.05, 20), Release(2.0, 0.2, 10), Release(3.0, 1.0, 2)]
    together = PLDAccountant(value_discretization_interval=2e-4)
    for release in releases:
        event = dp_event.GaussianDpEvent(release.noise_multiplier)
        together.compose(
            dp_event.PoissonSampledDpEvent(release.sampling_rate, event), release.steps
        )
    assert epsilon(releases, 1e-5) == pytest.approx(together.get_epsilon(1e-5), abs=1e-3)


def test_gaussians_together_are_one_gaussian():
    several = [Release(3.0, 1.0, 9), Release(2.0), Release(0.5, fixed_size=True)]
    one = (9 / 9 + 1 / 4 + 4) ** -0.5
    assert epsilon(several, 1e-5) == pytest.approx(gaussian_epsilon(one, 1e-5), abs=1e-9)
    assert accountant(several) == "analytic"


def test_the_order_does_not_matter():
    chance = random.Random(5)
    releases = [Release(1 + n / 7, 0.3 / (n + 1), n + 1) for n in range(6)] + [Release(2.5)]
    actual = epsilon(releases, 1e-6)
    for _ in range(5):
        chance.shuffle(releases)
        assert epsilon(releases, 1e-6) == actual


@pytest.mark.slow
@pytest.mark.parametrize(
    "better",
    [
        {"noise_multiplier": 1.3},
        {"sampling_rate": 0.04},
        {"steps": 40},
        {"delta": 2e-5},
    ],
    ids=lambda better: next(iter(better)),
)
@pytest.mark.parametrize("fixed_size", [False, True])
def test_monotone_in_each_argument(better, fixed_size):
    def spent(noise_multiplier=1.2, sampling_rate=0.05, steps=50, delta=1e-5):
        return epsilon([Release(noise_multiplier, sampling_rate, steps, fixed_size)], delta)

    assert spent(**better) < spent()


def test_one_more_release_never_costs_less():
    before = 0.0
    for steps in (1, 2, 3, 10, 20, 21, 22, 80, 320):
        now = epsilon([Release(1.5, 0.1, steps)], 1e-5)
        assert now > before
        before = now
        assert epsilon([Release(1.5, 0.1, steps), Release(8.0, 0.5)], 1e-5) > now


@pytest.mark.parametrize("rate", [0.003, 0.5, 0.9999, 1.0])
@pytest.mark.parametrize("fixed_size", [False, True])
@pytest.mark.parametrize("noise", [0.7, 4.0])
def test_who_sees_the_sample_is_told_no_less(noise, rate, fixed_size):
    releases = [Release(noise, rate, 20, fixed_size), Release(5.0, 0.5)]
    seen = unamplified(releases)
    assert [(r.noise_multiplier, r.sampling_rate, r.steps) for r in seen] == [
        (noise, 1.0, 20),
        (5.0, 1.0, 1),
    ]
    assert epsilon(seen, 1e-5) >= epsilon(releases, 1e-5)


def test_a_fixed_size_is_not_sold_as_poisson():
    """Flower 1.41 and 1.42 sample a fixed number; RDP says 7.90 of Poisson, as declared, 14.05 of what is drawn."""
    fixed = [Release(1.0, 0.1, 100, fixed_size=True)]
    assert by_rdp(1.0, 0.1, 100, 1e-5) == pytest.approx(7.90, abs=5e-3)
    assert epsilon(fixed, 1e-5) == pytest.approx(14.0538, abs=1e-3)
    assert accountant(fixed) == "RDP"


@pytest.mark.parametrize("rate", [0.003, 0.1, 0.9])
@pytest.mark.parametrize("noise", [0.7, 4.0])
@pytest.mark.parametrize("steps", [1, 100])
def test_a_fixed_size_never_claims_the_poisson_figure(noise, rate, steps):
    fixed = epsilon([Release(noise, rate, steps, fixed_size=True)], 1e-5)
    assert fixed > epsilon([Release(noise, rate, steps)], 1e-5)


def test_one_fixed_size_takes_the_others_to_rdp_without_sampling():
    fixed, poisson = Release(4.0, 0.1, 10, fixed_size=True), Release(20.0, 0.1, 10)
    accounted = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    accounted.compose(
        dp_event.SampledWithoutReplacementDpEvent(10, 1, dp_event.GaussianDpEvent(4.0)), 10
    )
    accounted.compose(dp_event.GaussianDpEvent(20.0), 10)
    actual = epsilon([poisson, fixed], 1e-5)
    assert actual == pytest.approx(accounted.get_epsilon(1e-5), rel=1e-9)
    assert accountant([poisson, fixed]) == "RDP"
    assert actual > epsilon([fixed], 1e-5)


def test_nothing_and_no_noise():
    assert epsilon([], 1e-5) == 0
    for rate, fixed in ((1.0, False), (0.01, False), (0.01, True)):
        assert epsilon([Release(1.0), Release(0.0, rate, 1, fixed)], 1e-5) == math.inf
    assert gaussian_epsilon(0, 1e-5) == math.inf


@pytest.mark.parametrize(
    ("release", "delta"),
    [
        ((1, 1e-12, 10), 1e-5),
        ((1, 1 - 1e-16, 3), 1e-5),
        ((0.01, 0.5, 10), 1e-5),
        ((1e-200, 0.5, 10), 1e-5),
        ((1e300, 0.5, 1), 1e-5),
        ((0.1, 0.9, 5000), 1e-10),
        ((1, 0.001, 10**9), 1e-5),
        ((1, 0.001, 10**15), 1e-10),
        ((8, 0.001, 1), 0.9),
    ],
)
def test_extremes_stay_within_what_holds_without_sampling(release, delta):
    releases = [Release(*release)]
    assert 0 <= epsilon(releases, delta) <= epsilon(unamplified(releases), delta)


@pytest.mark.parametrize(
    ("noise", "delta"),
    [(1e-4, 1e-5), (0.01, 1e-9), (0.3, 1e-300), (1.0, 0.3), (9.0, 1e-6), (1e3, 1e-7)],
)
def test_gaussian_epsilon_solves_its_equation(noise, delta):
    """With fifty digits, where floats cannot follow."""
    import mpmath

    actual = gaussian_epsilon(noise, delta)
    with mpmath.workdps(60):
        mu, bound = 1 / mpmath.mpf(noise), mpmath.mpf(actual)

        def left(spent):
            # ncdf loses its digits far out in the tail.
            low, high = (
                mpmath.erfc((spent / mu + s * mu / 2) / mpmath.sqrt(2)) / 2 for s in (-1, 1)
            )
            return low - mpmath.exp(spent) * high

        assert left(bound * (1 + mpmath.mpf("1e-9"))) <= delta
        assert actual == 0 or left(bound * (1 - mpmath.mpf("1e-9"))) >= delta


def test_gaussian_epsilon_is_nothing_where_delta_covers_all():
    assert gaussian_epsilon(1e6, 1e-5) == 0
    assert gaussian_epsilon(1e300, 1e-5) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps"),
    [(1, 1e-5, 1.0, 1), (0.1, 1e-6, 1.0, 500), (1, 1e-5, 0.1, 100), (2, 1e-5, 0.05, 40)],
)
def test_calibrate_keeps_the_promise_with_no_more_noise_than_needed(target, delta, rate, steps):
    noise = calibrate(target, delta, rate, steps)
    assert epsilon([Release(noise, rate, steps)], delta) <= target
    assert epsilon([Release(noise / 1.0011, rate, steps)], delta) > target


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_calibrate_leaves_room_for_what_is_beside(rate):
    beside = [Release(5.0, steps=10)]
    noise = calibrate(4.0, 1e-5, rate, 50, beside)
    assert noise > calibrate(4.0, 1e-5, rate, 50)
    assert epsilon([Release(noise, rate, 50), *beside], 1e-5) <= 4
    assert epsilon([Release(noise / 1.0011, rate, 50), *beside], 1e-5) > 4
    with pytest.raises(ValueError, match="must be reachable"):
        calibrate(2.0, 1e-5, rate, 50, beside)


def test_calibrate_at_its_ends():
    assert calibrate(1e7, 1e-5, 0.5, 1) == MIN_NOISE
    assert calibrate(1e7, 1e-5, 1.0, 1) == MIN_NOISE
    with pytest.raises(ValueError, match="noise multiplier up to 10000, got 1e-06"):
        calibrate(1e-6, 1e-5, 1.0, 100)
    assert calibrate(0.01, 1e-5, 1.0, 1000) < MAX_NOISE


@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ({"noise_multiplier": -1e-9}, "noise_multiplier"),
        ({"noise_multiplier": math.nan}, "noise_multiplier"),
        ({"noise_multiplier": math.inf}, "noise_multiplier"),
        ({"sampling_rate": 0}, "sampling_rate"),
        ({"sampling_rate": 1.01}, "sampling_rate"),
        ({"sampling_rate": math.nan}, "sampling_rate"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.0}, "steps"),
        ({"steps": True}, "steps"),
    ],
)
def test_a_release_out_of_range_is_refused(attributes, name):
    with pytest.raises(ValueError, match=f"{name}: must be .*, got"):
        Release(**{"noise_multiplier": 1.0, **attributes})


@pytest.mark.parametrize("delta", [0, 9e-11, 1, -1e-5, math.nan])
def test_a_delta_out_of_range_is_refused(delta):
    for spent in (lambda: epsilon([], delta), lambda: calibrate(1, delta, 0.5, 1)):
        with pytest.raises(ValueError, match="delta: must be 1e-10 to below 1, got"):
            spent()


@pytest.mark.parametrize("target", [0, -1, math.nan, math.inf])
def test_a_target_out_of_range_is_refused(target):
    with pytest.raises(ValueError, match="epsilon: must be above 0 and finite, got"):
        calibrate(target, 1e-5, 0.5, 1)


@pytest.mark.slow
def test_a_ledger_of_many_kinds_is_quick_to_extend():
    releases = [Release(1 + n / 10, 0.02 + n / 100, 50 + n) for n in range(12)]
    for part in vars(accounting).values():
        if hasattr(part, "cache_clear"):
            part.cache_clear()
    begun = time.process_time()
    before = epsilon(releases, 1e-5)
    recomputed = time.process_time() - begun
    accounting._epsilon.cache_clear()
    begun = time.process_time()
    after = epsilon([*releases, Release(1.5, 0.07)], 1e-5)
    assert time.process_time() - begun < recomputed / 3
    assert before < after < before + 0.1


def test_the_module_loads_without_numpy():
    code = (
        "import sys; import fedge.shared.privacy.accounting.epsilon as a; a.epsilon([a.Release(1.0)], 1e-5); "
        "sys.exit(bool({'numpy', 'scipy', 'dp_accounting'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0
