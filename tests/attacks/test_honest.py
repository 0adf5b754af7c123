"""Honest rounds of real workers whose data or networks are out of the ordinary: right, clipped, or refused at once."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

from fedge.shared import protocol
from fedge.shared.secagg import vector_layout

from .deviant import Refusal, Server
from .parties import BOUNDS, NAMES, VICTIM, make_sites, task, weights_of


def with_buffers():
    """A network with running statistics, and with a counter that is an integer."""
    return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def whole(sites):
    return Server(sites).begin().share().masked().commit().unmask()


def test_batch_norms_statistics_are_summed_and_its_counter_is_not(tmp_path):
    buffered = task(with_buffers)
    server = whole(make_sites(tmp_path, site_task=buffered))
    assert server.is_right()
    placed = {t.name for t in server.layout.tensors}
    assert placed == set(weights_of(buffered)) - {"1.num_batches_tracked"}
    assert [s.name for s in server.layout.segments] == ["update", "state"]
    # The statistics are in it: they moved from 0 and 1.
    values, _ = server.opened()
    found = server.layout.unflatten(values)
    assert (np.abs(found["1.running_mean"]) > 1e-3).any()
    assert (found["1.running_var"] != 0).all()


@pytest.mark.slow
def test_a_site_without_examples_takes_part_with_nothing(tmp_path):
    server = whole(make_sites(tmp_path, site_6=0))
    assert server.is_right()
    _, counted = server.opened()
    assert (counted["sites"], counted["examples"]) == (6, 40 + 70 + 130 + 90 + 25)
    assert not server.refusals


def test_a_site_beyond_the_cap_weighs_as_much_as_the_cap(tmp_path):
    server = whole(make_sites(tmp_path, site_6=BOUNDS.weight_cap + 500))
    _, counted = server.opened()
    assert counted["capped"] == 1
    assert counted["examples"] == 40 + 70 + 130 + 90 + 25 + BOUNDS.weight_cap


@pytest.mark.slow
def test_a_huge_update_is_clipped_and_counted(tmp_path):
    sites = make_sites(tmp_path)
    sites[VICTIM].learner.data.train_features[...] *= 300
    server = whole(sites)
    values, counted = server.opened()
    assert counted["clipped"] == 1
    others = sum(server.plain(n) for n in NAMES if n != VICTIM)
    size = server.layout.segments[0].size
    own = np.linalg.norm(values[:size] - others[:size])
    most = BOUNDS.clipping_bound * 130 / BOUNDS.weight_cap
    assert own <= most * 1.0001
    # Values of its own beyond the bound saturate; else the whole norm would be there.
    assert own > 0.3 * most
    assert np.linalg.norm(server.plain(VICTIM)) > 2 * most


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_site_whose_weights_are_not_finite_is_out_before_it_has_a_key(value, tmp_path):
    sites = make_sites(tmp_path)
    sites[VICTIM].learner.data.train_features[:, 1] = value
    server = whole(sites)
    assert server.refusals == [Refusal(VICTIM, protocol.TRAIN, 401)]
    assert VICTIM not in server.group.bundles
    assert server.is_right()


def test_a_retry_trains_nothing_anew_and_has_the_same_update(tmp_path):
    sites = make_sites(tmp_path)
    Server(sites).begin().share()
    calls = []
    for worker in sites.values():
        worker.learner._local_steps = lambda *_: calls.append(1)
    again = Server(sites, attempt=2).begin().share().masked().commit().unmask()
    assert calls == []
    for worker in sites.values():
        del worker.learner._local_steps
    assert again.is_right()


def test_the_sum_holds_no_more_than_the_layout_says(tmp_path):
    server = whole(make_sites(tmp_path))
    assert server.group.shape == server.layout.shape == (22, 6)
    assert (
        set(server.opened()[1])
        == {c.name for c in server.layout.counters}
        >= {vector_layout.SATURATED}
    )
