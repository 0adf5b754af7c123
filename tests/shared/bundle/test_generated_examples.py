from __future__ import annotations

import numpy as np
import pytest

from fedge.shared.bundle import generated_examples
from fedge.shared.errors import InputError
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.schema import Feature, InputSchema
from fedge.shared.preprocessing.steps import OneHot, Reshape, Scale, Standardise

TABLE = InputSchema(
    shape=(3,),
    features=(
        Feature("age", low=20, high=100),
        Feature("pain", low=1, high=3, categories=(1.0, 2.0, 3.0)),
        Feature("pulse", low=30, high=220),
    ),
)


def test_examples_follow_the_schema() -> None:
    found = generated_examples.example(TABLE, 200, (Scale(0.5),))
    assert found.shape == (200, 3)
    assert 20 <= found[:, 0].min() < 30 and 90 < found[:, 0].max() <= 100
    assert set(found[:, 1].tolist()) == {1.0, 2.0, 3.0}
    with pytest.raises(InputError) as error:
        generated_examples.example(InputSchema(shape=(2**20,)), 65)
    assert error.value.code == 805


def test_an_images_raw_values_fill_the_networks_range() -> None:
    image = InputSchema(shape=(8, 8))
    steps = (Scale(1 / 255), Reshape((1, 8, 8)))
    raw = generated_examples.example(image, 4, steps)
    assert 240 < raw.max() < 255.001
    ready = preprocessing.apply(steps, raw)
    assert ready.min() >= 0 and 0.95 < ready.max() <= 1 + 1e-6
    for factor in (0.0, 1e-44):  # nothing to undo, or not in float32
        found = generated_examples.example(image, 4, (Scale(factor),))
        assert np.isfinite(found).all()


def test_a_stand_in_shows_the_network_standardised_values() -> None:
    own = (OneHot(((1, (1.0, 2.0, 3.0)),)), Standardise())
    steps = generated_examples.stand_in(TABLE, own)
    ready = preprocessing.apply(steps, generated_examples.example(TABLE, 32, steps, seed=1))
    np.testing.assert_allclose(ready.mean(axis=0), 0, atol=0.5)
    np.testing.assert_allclose(ready.std(axis=0), 1, atol=0.5)
    assert steps[0] == own[0]
    assert isinstance(steps[1], Standardise) and len(steps[1].mean) == 4
    fitted = Standardise((0.0,) * 4, (2.0,) * 4)
    assert generated_examples.stand_in(TABLE, (own[0], fitted))[1] == fitted
