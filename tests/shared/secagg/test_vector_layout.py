"""Where everything lies in a masked vector: parameters, then what travels with them, then counters."""

import numpy as np
import pytest

from fedge.shared.errors import SiteError
from fedge.shared.secagg import exact_counters, masking, vector_layout
from fedge.shared.secagg.vector_layout import Bounds, Placed

BOUNDS = Bounds(10.0, 4.0, 100.0, 1000)
SHAPES = {"w": (2, 3), "mean": (3,), "b": (), "var": (3,)}


def tensors(layout):
    draw = np.random.default_rng(5)
    return {t.name: draw.normal(size=t.shape).astype(np.float32) for t in layout.tensors}


def test_parameters_come_first_whatever_their_place_in_the_network():
    layout = vector_layout.of_training(SHAPES, ["b", "w"], BOUNDS, control=False)
    assert layout.tensors == (
        Placed("w", (2, 3), 0, 6),
        Placed("b", (), 6, 1),
        Placed("mean", (3,), 7, 3),
        Placed("var", (3,), 10, 3),
    )
    assert [(s.name, s.size, s.bound) for s in layout.segments] == [
        ("update", 7, 4.0),
        ("state", 6, 100.0),
    ]
    assert layout.values == 13
    assert layout.shape == (13, 6)
    assert layout.shape.length == 13 + 4 * 6


def test_without_state_there_is_one_segment():
    layout = vector_layout.of_training({"w": (2,)}, ["w"], BOUNDS, control=False)
    assert [s.name for s in layout.segments] == ["update"]


def test_control_variates_follow_one_a_tensor():
    layout = vector_layout.of_training(SHAPES, ["w", "b"], BOUNDS, control=True)
    assert [t.name for t in layout.tensors[4:]] == [f"control/{n}" for n in SHAPES]
    assert layout.values == 26
    assert sum(s.size for s in layout.segments) == 26


@pytest.mark.parametrize("control", [False, True])
def test_tensors_come_back_as_they_were(control):
    layout = vector_layout.of_training(SHAPES, ["w", "b"], BOUNDS, control=control)
    given = tensors(layout)
    flat = layout.flatten(given | {"steps": np.array(3)})
    assert flat.shape == (layout.values,)
    assert flat.dtype == np.float32
    found = layout.unflatten(flat)
    assert list(found) == [t.name for t in layout.tensors]
    assert all(
        np.array_equal(found[n], given[n]) and found[n].shape == given[n].shape for n in given
    )


def test_the_widest_type_is_kept():
    layout = vector_layout.of_training({"w": (1,), "v": (1,)}, ["w", "v"], BOUNDS, control=False)
    given = {"w": np.array([1 + 1e-12]), "v": np.ones(1, np.float32)}
    assert layout.flatten(given).tolist() == [1 + 1e-12, 1.0]
    halves = {"w": np.ones(1, np.float16), "v": np.ones(1, np.float16)}
    assert layout.flatten(halves).dtype == np.float32


def test_counters_of_a_training_sum_have_room_for_every_site():
    layout = vector_layout.of_training(SHAPES, ["w"], BOUNDS, control=False)
    found = {c.name: (c.low, c.high, c.fraction_bits) for c in layout.counters}
    assert found == {
        "sites": (0, 1, 0),
        "examples": (0, 1000, 0),
        "loss": (0, 2**39, 20),
        "saturated": (0, 2**39, 0),
        "clipped": (0, 1, 0),
        "capped": (0, 1, 0),
    }


def test_an_evaluation_is_counters_alone_and_none_of_them_is_the_layouts_own():
    layout = vector_layout.of_evaluation(["examples", "sites"])
    assert (layout.values, layout.segments, layout.tensors) == (0, (), ())
    assert [c.name for c in layout.counters] == ["sites", "task/examples", "task/sites"]
    given = vector_layout.task_counters({"examples": 3.0, "sites": 9.0}) | {"sites": 1}
    total = exact_counters.encode_counters(given, layout.counters)
    found = exact_counters.decode_counters(total, layout.counters, 1)
    assert vector_layout.from_task_counters(found, ["examples", "sites"]) == {
        "examples": 3,
        "sites": 9,
    }


def test_noised_counters_may_be_negative_and_add_up_exactly():
    layout = vector_layout.of_evaluation(["correct", "examples"], noised=True)
    sites = [
        {"correct": -12.5, "examples": 3.0},
        {"correct": 2.0**-20, "examples": -4.25},
        {"correct": 5.0, "examples": -(2.0**38)},
    ]
    vectors = [
        exact_counters.encode_counters(
            vector_layout.task_counters(one) | {"sites": 1}, layout.counters
        )
        for one in sites
    ]
    total = np.zeros_like(vectors[0])
    for vector in vectors:
        masking.add_counters(total, vector)
    found = vector_layout.from_task_counters(
        exact_counters.decode_counters(total, layout.counters, 3), ["correct", "examples"]
    )
    assert found == {"correct": -7.5 + 2.0**-20, "examples": -1.25 - 2.0**38}
    # The failing twin: counters without noise have no room below 0.
    plain = vector_layout.of_evaluation(["correct", "examples"])
    with pytest.raises(SiteError, match="task/correct: must be 0 to"):
        exact_counters.encode_counters(
            vector_layout.task_counters(sites[0]) | {"sites": 1}, plain.counters
        )


def test_statistics_have_two_sums_a_column_with_either_sign():
    layout = vector_layout.of_statistics(2)
    assert [c.name for c in layout.counters] == [
        "sites",
        "examples",
        "feature-total-0",
        "feature-total-1",
        "feature-total-of-squares-0",
        "feature-total-of-squares-1",
    ]
    assert {(c.low, c.high, c.fraction_bits) for c in layout.counters[2:]} == {
        (-(2**23), 2**23, 36)
    }
    assert vector_layout.of_statistics(0).shape == (0, 2)
