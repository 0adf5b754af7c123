"""Ranges of activations: exact merges, histograms that are never tighter, and what noise leaves of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedge.shared.compile import ranges
from fedge.shared.compile.ranges import BINS, EDGES, HiddenError

VALUE = st.floats(-(2**14), 2**14, width=32)


def extremes(*rows):
    """(n, 1, 2) of one tensor."""
    return np.array(rows, np.float64).reshape(-1, 1, 2)


def test_the_grid_is_half_octaves_from_2_to_the_minus_14_to_2_to_the_14():
    assert (EDGES[0], EDGES[1], EDGES[-1], BINS) == (0.0, 2.0**-14, 2.0**14, 58)
    assert np.allclose(np.diff(np.log2(EDGES[1:])), 0.5, atol=1e-12)
    assert EDGES[3] == 2.0**-13


@given(st.lists(st.tuples(VALUE, VALUE), min_size=1, max_size=20))
def test_a_histogram_s_range_is_never_tighter_and_at_most_a_bin_wider(pairs):
    found = extremes(*(sorted(pair) for pair in pairs))
    ((low, high),) = ranges.from_histograms(ranges.histogram(found).astype(float), 2.0**14)
    for true_end, end in ((-found[..., 0].min(), -low), (found[..., 1].max(), high)):
        assert end >= true_end
        within = max(true_end, 0.0)
        assert end <= max(within * math.sqrt(2) * (1 + 1e-12), EDGES[1])
        assert within or end == 0


@given(st.lists(st.lists(st.tuples(VALUE, VALUE), min_size=1, max_size=5), min_size=1, max_size=5))
def test_sites_merge_to_what_all_examples_together_give(sites):
    parts = [extremes(*(sorted(p) for p in pairs)) for pairs in sites]
    pooled = np.concatenate(parts)
    merged = ranges.merged([ranges.merged(list(part)) for part in parts])
    assert merged.tolist() == [[pooled[..., 0].min(), pooled[..., 1].max()]]
    counts = sum(ranges.histogram(part) for part in parts)
    assert (counts == ranges.histogram(pooled)).all()


def test_each_example_is_in_one_bin_of_each_histogram_so_that_the_sensitivity_is_the_root_of_2t():
    one = np.array([[[-1.0, 3.0], [0.0, 0.0], [-2e-5, 100.0]]])
    counts = ranges.histogram(one)
    assert counts.shape == (3, 2, BINS)
    assert (counts.sum(axis=2) == 1).all()
    assert np.sqrt((counts.astype(float) ** 2).sum()) == ranges.sensitivity(3) == math.sqrt(6)
    assert len(ranges.names(3)) == counts.size == len(set(ranges.names(3)))


def test_clipping_is_reported_and_values_that_are_not_finite_are_refused():
    kept, beyond = ranges.clipped(np.array([[[-5.0, 2e6]]], np.float32), 100.0)
    assert kept.tolist() == [[[-5.0, 100.0]]]
    assert beyond
    assert not ranges.clipped(np.array([[[-5.0, 100.0]]]), 100.0)[1]
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(ValueError, match="must be finite"):
            ranges.clipped(np.array([[[bad, 0.0]]]), 100.0)
        both, beyond = ranges.clipped(np.array([[[bad, bad]]]), 100.0, finite=False)
        assert both.tolist() == [[[-100.0, 100.0]]]
        assert beyond
    with pytest.raises(ValueError, match="at most 16384"):
        ranges.histogram(extremes((0, 2.0**14 + 1)))


def test_a_range_does_not_go_beyond_the_bound():
    counts = ranges.histogram(extremes((-100.0, 100.0))).astype(float)
    assert ranges.from_histograms(counts, 100.0).tolist() == [[-100.0, 100.0]]
    # A bin's edge lies where it is without a bound.
    assert ranges.from_histograms(counts, 2.0**14).tolist() == [[-128.0, 128.0]]


@given(st.lists(VALUE, min_size=1, max_size=60), st.sampled_from([0.9, 0.95, 0.99, 1.0]))
def test_a_quantile_holds_its_share_of_the_examples_and_no_bin_more(values, quantile):
    counts = ranges.histogram(extremes(*((-abs(v), abs(v)) for v in values))).astype(float)
    ((low, high),) = ranges.from_histograms(counts, 2.0**14, quantile=quantile)
    assert low == -high or low == high == 0
    needed = math.ceil(round(quantile * len(values), 9))
    assert sum(abs(v) <= high for v in values) >= needed
    below = max((edge for edge in EDGES if edge < high), default=-1.0)
    assert sum(abs(v) <= below for v in values) < needed


def test_noise_alone_moves_hardly_any_range():
    draw, tensors, stddev = np.random.default_rng(0), 20, 3.0
    threshold = ranges.above_noise(stddev, tensors)
    noise = draw.normal(0, stddev, (400, tensors * 2 * BINS))
    # One calibration in a thousand; of 400 none or one.
    assert (noise > threshold).any(axis=1).sum() <= 2
    assert (noise > threshold / 2).any(axis=1).sum() > 100


def test_a_tensor_of_which_noise_leaves_nothing_is_named():
    counts = np.zeros((2, 2, BINS))
    counts[0, :, 5] = 50.0
    counts[1, 0, 5] = 50.0
    counts[1, 1, 5] = 9.0
    with pytest.raises(HiddenError) as caught:
        ranges.from_histograms(counts, 1.0, threshold=10.0)
    assert caught.value.tensor == 1
    assert (
        ranges.from_histograms(counts, 1.0, threshold=8.0).tolist() == [[-EDGES[5], EDGES[5]]] * 2
    )
