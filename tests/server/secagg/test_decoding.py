"""What an opened sum says: the mean of the sites' weights in the model's types, or that it cannot be one."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.client.secagg.input_vector import InputVector, SiteNoise, noised
from fedge.server.secagg import decoding
from fedge.server.secagg.outcome import UnmaskedSum
from fedge.shared.config.sections import AdmissionSection
from fedge.shared.errors import RunError
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.secagg import fixed_point, masking, vector_layout
from fedge.shared.secagg.vector_layout import Bounds

BOUNDS = Bounds(clipping_bound=2000.0, value_bound=4.0, state_bound=100.0, weight_cap=100)
GATE = AdmissionSection(**{"max-update-norm": 1e4})
SHAPES = {
    "wide": (300, 401),
    "state": (5,),
    "half": (7,),
    "double": (2, 3),
    "one": (),
    "none": (0, 4),
}
PARAMETERS = ["wide", "half", "double", "one", "none"]
TYPES = {"half": np.float16, "double": np.float64}


def current():
    rng = np.random.default_rng(1)
    made = {k: rng.normal(size=s).astype(TYPES.get(k, np.float32)) for k, s in SHAPES.items()}
    # Rows and columns are stored the other way round; a counter of batches is not aggregated.
    made["wide"] = np.asfortranarray(made["wide"])
    return made | {"batches": np.asarray(7)}


def of_training(bounds=BOUNDS, *, control=False):
    return vector_layout.of_training(SHAPES, PARAMETERS, bounds, control=control)


def contribution(layout, update, **counters):
    flat = np.full(layout.values, update, np.float32)
    values = {"sites": 1, "examples": 50, "loss": 25.0, "clipped": 0, "capped": 0, **counters}
    return InputVector(layout, flat, min(values["examples"], 100) / 100, values)


def opened(some, sharers=None):
    """A sum as it comes out of the exchanges."""
    count = sharers or len(some)
    vectors = [c.encode(count, bytes([i]) * 32) for i, c in enumerate(some)]
    sites = tuple(f"site-{i}" for i in range(1, len(some) + 1))
    total = np.zeros_like(vectors[0])
    masking.add_vectors(total, vectors, counters=some[0].layout.shape.counters)
    return UnmaskedSum(sites, count, 3, total)


def test_a_sum_is_scaled_by_who_shared_and_counted_by_who_is_in_it():
    layout, before = of_training(), current()
    some = [
        contribution(layout, 0.5),
        contribution(layout, -0.25),
        contribution(layout, 0.5, examples=25),
    ]
    # Six had shared, three are left.
    summed, counters = decoding.mean_weights(layout, opened(some, 6), BOUNDS, before, GATE)
    assert summed.weight == counters["examples"] == 125
    assert summed.loss_total == pytest.approx(75.0)
    change = (50 * 0.5 - 50 * 0.25 + 25 * 0.5) / 125
    assert list(summed.mean) == list(before)
    for name, a in before.items():
        found, moved = summed.mean[name], 0.0 if name == "batches" else change
        bound = 100.0 if name == "state" else 4.0
        step = 2 * 3 / fixed_point.scale(bound, 6) / 1.25
        assert found.dtype == a.dtype
        assert found.shape == a.shape
        np.testing.assert_allclose(
            found, a + moved, atol=step, rtol=1e-3 if name == "half" else 2e-7
        )


def test_control_variates_change_by_themselves():
    layout, before = of_training(control=True), current()
    some = [contribution(layout, 0.5) for _ in range(3)]
    summed, _ = decoding.mean_weights(layout, opened(some), BOUNDS, before, GATE)
    added = [name for name in summed.mean if name not in before]
    assert len(added) == len(SHAPES)
    for name in added:
        np.testing.assert_allclose(summed.mean[name], 0.5, atol=1e-6)


@pytest.mark.parametrize(
    ("counters", "code"),
    [({"examples": 0}, 510), ({"sites": 0}, 511)],
)
def test_counters_that_cannot_be_are_refused(counters, code):
    layout = of_training()
    some = [contribution(layout, 0.0, **counters) for _ in range(3)]
    with pytest.raises(RunError) as caught:
        decoding.mean_weights(layout, opened(some), BOUNDS, current(), GATE)
    assert caught.value.code == code


def test_an_update_beyond_what_clipping_allows_is_refused():
    bounds = Bounds(2.0, 4.0, 100.0, 100)
    layout = of_training(bounds)
    longest = 2.0 / np.sqrt(layout.segments[0].size)
    for factor, fits in ((1.0, True), (1.01, False)):
        # What is no parameter is bounded by itself alone.
        some = [contribution(layout, factor * longest) for _ in range(3)]
        for one in some:
            one.values[layout.segments[0].size :] = 50.0
        if fits:
            decoding.mean_weights(layout, opened(some), bounds, current(), GATE)
            continue
        with pytest.raises(RunError) as caught:
            decoding.mean_weights(layout, opened(some), bounds, current(), GATE)
        assert caught.value.code == 511
        assert "update must be in the range" in caught.value.message


def test_the_sample_is_of_the_update_s_first_values():
    layout, before = of_training(), current()
    summed, _ = decoding.mean_weights(
        layout, opened([contribution(layout, 0.25)] * 3), BOUNDS, before, GATE
    )
    found = decoding.sample(layout, summed, before)
    assert len(found) == decoding.SAMPLE
    assert found == pytest.approx([0.25] * decoding.SAMPLE, abs=1e-6)


@pytest.mark.parametrize(
    ("gate", "says"),
    [
        (
            {"max-update-norm": 80.0},
            "mean update must be at most admission.max-update-norm, 80, got",
        ),
        ({"max-update-norm": 1e4, "max-loss": 0.4}, "mean loss must be at most admission.max-loss"),
    ],
)
def test_the_gate_s_bounds_are_held_against_the_mean(gate, says):
    layout = of_training()
    ready = opened([contribution(layout, 0.25)] * 3)
    with pytest.raises(RunError, match=says) as caught:
        decoding.mean_weights(layout, ready, BOUNDS, current(), AdmissionSection(**gate))
    assert caught.value.code == 511


def test_a_noised_sum_is_on_the_grid_of_its_noise():
    shapes = {"wide": (300, 401), "bias": (401,)}
    layout = vector_layout.of_noised(shapes, shapes, 2.0)
    rng = np.random.default_rng(3)
    before = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    noise = SiteNoise(2.0, 0.05, 5, Entropy(key=bytes(32)))
    change = {k: np.full(s, 0.004, np.float32) for k, s in shapes.items()}
    after = {k: before[k] + change[k] for k in shapes}
    ready = opened([noised(layout, noise, before, after)] * 5)
    found = decoding.noised_mean(layout, ready, before)
    assert (found.weight, found.loss_total) == (5, None)
    moved = np.concatenate([(found.mean[k] - before[k]).reshape(-1) for k in shapes])
    norm = 0.004 * np.sqrt(moved.size)
    expected = 0.004 * min(1.0, 2.0 / norm)
    # The noise of the mean: .05 times the bound, over five sites.
    deviation = 0.05 * 2.0 / 5
    assert abs(moved.mean() - expected) < 5 * deviation / np.sqrt(moved.size)
    assert abs(moved.std() / deviation - 1) < 0.02
