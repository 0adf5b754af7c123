"""What a site adds: clipped as a whole, weighted, counted; refused at once where it is no number or no such tensor."""

import numpy as np
import pytest
from builders import refused

from fedge.client.secagg import input_vector
from fedge.client.secagg.input_vector import InputVector, SiteNoise, rounding_key
from fedge.shared.preprocessing.steps import Statistics
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.secagg import exact_counters, fixed_point, masking, vector_layout
from fedge.shared.secagg.vector_layout import Bounds
from fedge.shared.tasks.standardised_columns import Bound

BOUNDS = Bounds(clipping_bound=5.0, value_bound=5.0, state_bound=50.0, weight_cap=200)
SHAPES = {"w": (2, 3), "mean": (3,), "b": (1,)}
LAYOUT = vector_layout.of_training(SHAPES, ["w", "b"], BOUNDS, control=False)
KEY = bytes(range(32))


def tensors(value=0.0, dtype=np.float32, **others):
    found = {name: np.full(shape, value, dtype) for name, shape in SHAPES.items()}
    return found | {"steps": np.array(7)} | others


def trained(*args, received=None, examples=100, loss=0.5, layout=LAYOUT):
    return input_vector.training(layout, BOUNDS, received or tensors(), *args, examples, loss)


def decoded(made: InputVector, sites=3):
    """The values and counters of one site's vector, as a server reads a sum of one."""
    layout, vector = made.layout, made.encode(sites, KEY)
    counted = exact_counters.decode_counters(
        masking.counters_in(vector, len(layout.counters)), layout.counters, 1
    )
    if not layout.segments:
        return None, counted
    return layout.unflatten(
        fixed_point.decode(vector[: layout.values], layout.segments, sites)
    ), counted


def close(found, wanted, bound=5.0, sites=3):
    return np.abs(found - wanted).max() <= 1.001 / fixed_point.scale(bound, sites) + 1e-7


def test_the_change_is_weighted_by_the_share_of_the_cap():
    made = trained(tensors(1.25), received=tensors(1.0))
    values, counted = decoded(made)
    assert made.weight == 0.5
    assert close(values["w"], 0.125)
    assert close(values["b"], 0.125)
    assert close(values["mean"], 0.125, bound=50.0)
    assert counted == {
        "sites": 1, "examples": 100, "loss": 50.0, "saturated": 0, "clipped": 0, "capped": 0
    }  # fmt: skip


def test_what_was_received_is_left_as_it_was():
    received, mine = tensors(1.0), tensors(400.0)
    trained(mine, received=received)
    assert all((a == 1.0).all() for n, a in received.items() if n != "steps")
    assert all((a == 400.0).all() for n, a in mine.items() if n != "steps")


def test_integer_buffers_are_no_part_of_it():
    assert {t.name for t in LAYOUT.tensors} == {"w", "b", "mean"}
    values, _ = decoded(trained(tensors(1.0)))
    assert set(values) == {"w", "b", "mean"}


def test_a_long_update_is_scaled_down_as_a_whole_and_state_is_not():
    # sqrt(7) * 10 is the norm of the parameters' update; the bound is 5.
    values, counted = decoded(trained(tensors(10.0), examples=200))
    assert counted["clipped"] == 1
    assert counted["saturated"] == 0
    norm = np.linalg.norm([*values["w"].ravel(), *values["b"].ravel()])
    assert norm == pytest.approx(5.0, rel=1e-5)
    assert close(values["mean"], 10.0, bound=50.0)


def test_the_bound_itself_is_not_clipped():
    mine = tensors()
    mine["b"][:] = 5.0
    assert decoded(trained(mine))[1]["clipped"] == 0
    mine["b"][:] = np.nextafter(np.float32(5.0), np.float32(6.0))
    assert decoded(trained(mine))[1]["clipped"] == 1


@pytest.mark.parametrize("value", [1e9, -1e9, 3e38])
def test_huge_values_are_clipped_and_saturate(value):
    """Not wrapped, and not infinite: 3e38 squared is beyond float32."""
    values, counted = decoded(trained(tensors(value), examples=200))
    assert (counted["clipped"], counted["saturated"]) == (1, 3)
    assert np.linalg.norm([*values["w"].ravel(), *values["b"].ravel()]) == pytest.approx(
        5, rel=1e-5
    )
    assert close(values["mean"], np.copysign(50.0, value), bound=50.0)


@pytest.mark.parametrize("name", ["w", "mean", "b"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_update_that_is_not_finite_is_refused(name, value):
    mine = tensors(1.0)
    mine[name].ravel()[-1] = value
    assert refused(401, trained, mine) == "update: must be finite, got NaN or infinity"


def test_a_difference_that_overflows_is_refused():
    with np.errstate(over="ignore"):
        refused(401, trained, tensors(3e38), received=tensors(-3e38))


def test_where_the_weights_are_noised_already_such_a_difference_is_none():
    state = {"mean": tensors(-3e38)["mean"]}
    with np.errstate(over="ignore"):
        made = input_vector.training(
            LAYOUT, BOUNDS, tensors(-3e38), tensors(3e38) | state, 100, 0.5, private=True
        )
    values, counted = decoded(made)
    assert all((a == 0).all() for a in values.values())
    assert (counted["examples"], counted["clipped"]) == (200, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_an_update_that_is_not_finite_gets_its_noise_as_one_of_zeros(value):
    layout = vector_layout.of_noised({"w": (300,)}, ["w"], 1.0)

    def encoded(update):
        noise = SiteNoise(1.0, 1.0, 3, Entropy(key=bytes(32)))
        return input_vector.noised(layout, noise, received, {"w": update}).encode(3, KEY)

    received = {"w": np.ones(300)}
    zero, bad = encoded(np.ones(300)), np.ones(300)
    # 1e200 is finite, and the norm is not.
    bad[7] = value
    assert (encoded(bad) == zero).all()
    assert (encoded(np.full(300, 1.01)) != zero).any()


@pytest.mark.parametrize("loss", [np.nan, np.inf, -1.0, 1e12])
def test_a_loss_that_is_no_loss_is_refused_before_any_key_is_made(loss):
    refused(401, trained, tensors(1.0), loss=loss)


@pytest.mark.parametrize(
    "other",
    [
        {"w": np.zeros((3, 2), np.float32)},
        {"w": np.zeros(6, np.float32)},
        {"mean": np.zeros((1,), np.float32)},
        {"w": np.zeros((2, 3), np.int64)},
        {"w": np.zeros((2, 3), np.complex64)},
        {"b": np.zeros((), np.float32)},
    ],
    ids=["transposed", "flat", "broadcast", "integer", "complex", "scalar"],
)
def test_a_tensor_of_another_shape_or_type_is_refused(other):
    text = refused(404, trained, tensors(1.0) | other)
    assert text.startswith(f"{next(iter(other))}: must be floating point of shape ")


def test_a_missing_tensor_is_refused():
    mine = tensors(1.0)
    del mine["mean"]
    assert refused(404, trained, mine) == ("mean: must be floating point of shape (3,), got none")


def test_float64_keeps_its_precision():
    values, _ = decoded(trained(tensors(1 + 1e-6, np.float64), received=tensors(1.0, np.float64)))
    assert close(values["w"], 5e-7)


def test_a_site_beyond_the_cap_weighs_as_much_as_one_at_it():
    made = trained(tensors(1.0), examples=100_000)
    _, counted = decoded(made)
    assert made.weight == 1.0
    assert (counted["examples"], counted["capped"], counted["loss"]) == (200, 1, 100.0)


def test_a_site_without_examples_adds_nothing_but_itself():
    made = trained(None, examples=0, loss=0.0)
    values, counted = decoded(made)
    assert all((a == 0).all() for a in values.values())
    assert counted == {
        "sites": 1, "examples": 0, "loss": 0.0, "saturated": 0, "clipped": 0, "capped": 0
    }  # fmt: skip


def test_scaffolds_changes_are_no_difference_to_what_was_received():
    layout = vector_layout.of_training(SHAPES, ["w", "b"], BOUNDS, control=True)
    control = {f"control/{n}": np.full(s, 2.0, np.float32) for n, s in SHAPES.items()}
    mine = tensors(1.0) | control
    values, _ = decoded(trained(mine, received=tensors() | control, examples=200, layout=layout))
    assert close(values["control/w"], 2.0, bound=50.0)
    assert close(values["w"], 1.0)


def test_the_rounding_is_right_on_average_and_the_same_again():
    layout = vector_layout.of_training({"w": (20_000,)}, ["w"], BOUNDS, control=False)
    step = 1 / fixed_point.scale(5.0, 3)
    made = InputVector(
        layout,
        np.full(20_000, 10.3 * step, np.float64),
        1.0,
        {"sites": 1, "examples": 1, "loss": 0, "clipped": 0, "capped": 0},
    )
    first = made.encode(3, KEY)
    assert (first == made.encode(3, KEY)).all()
    # 0.3 of 20000 go up: the mean's standard deviation is 0.0032.
    assert first[:20_000].mean() == pytest.approx(10.3, abs=0.02)
    assert (first != made.encode(3, bytes(32))).any()


def test_rounding_keys_are_those_of_one_sum_and_site():
    keys = {
        rounding_key(seed, purpose, number, site)
        for seed in (1, 11)
        for purpose in ("train", "evaluate")
        for number in (1, 11)
        for site in ("a", "1 a")
    }
    assert len(keys) == 16
    assert rounding_key(1, "train", 1, "a") in keys


def test_an_evaluation_counts_what_the_task_counts():
    layout = vector_layout.of_evaluation(["correct", "examples", "loss-sum"])
    _, counted = decoded(
        input_vector.evaluation(layout, {"correct": 3.0, "examples": 5.0, "loss-sum": 0.25})
    )
    assert vector_layout.from_task_counters(counted, ["correct", "examples", "loss-sum"]) == {
        "correct": 3.0, "examples": 5.0, "loss-sum": 0.25
    }  # fmt: skip
    assert counted["sites"] == 1
    refused(401, input_vector.evaluation, layout, {"correct": 3, "examples": 5, "loss-sum": np.nan})


def test_statistics_are_in_units_of_their_columns():
    bounds = (Bound("age", 0.0, 100.0), Bound("zero", 0.0, 0.0))
    layout = vector_layout.of_statistics(2)
    found = Statistics(4, (160.0, 0.5), (6500.0, 0.125))
    _, counted = decoded(input_vector.statistics(layout, found, bounds))
    assert counted["examples"] == 4
    assert counted["feature-total-0"] * 100 == pytest.approx(160, abs=1e-8)
    assert counted["feature-total-of-squares-0"] * 1e4 == pytest.approx(6500, abs=1e-5)
    assert counted["feature-total-1"] == 0.5
    # Where whole sites are hidden it counts as one example, of its means.
    _, hidden = decoded(input_vector.statistics(layout, found, bounds, hides_site=True))
    assert hidden["examples"] == 1
    assert hidden["feature-total-0"] * 100 == pytest.approx(40, abs=1e-8)
    assert hidden["feature-total-of-squares-0"] * 1e4 == pytest.approx(1625, abs=1e-5)
    empty = Statistics(0, (0.0, 0.0), (0.0, 0.0))
    _, none = decoded(input_vector.statistics(layout, empty, bounds, hides_site=True))
    assert none == dict.fromkeys(none, 0) | {"sites": 1}
    _, nothing = decoded(input_vector.statistics(layout, None, bounds))
    assert nothing == dict.fromkeys(nothing, 0) | {"sites": 1}
    beyond = Statistics(4, (1e12, 0.0), (0.0, 0.0))
    refused(401, input_vector.statistics, layout, beyond, bounds)
