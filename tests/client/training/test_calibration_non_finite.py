"""One example whose values are not finite, under noise: it counts by itself, as any other, and no error tells of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial

import builders
import numpy as np
import pytest
import torch

from fedge.client import requests
from fedge.client.data.dataset import SiteData
from fedge.client.training.calibration import RAN, SiteCalibration
from fedge.client.training.learner import Learner
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.bundle.manifest_artefacts import ONNX_FP16, ONNX_FP32
from fedge.shared.compile import candidates, ranges
from fedge.shared.errors import SiteError
from fedge.shared.models.fnn import FNN
from fedge.shared.preprocessing.schema import OutputSchema
from fedge.shared.tasks.classification import (
    ACCURACY,
    SENSITIVITY,
    SPECIFICITY,
    sigmoid_counters,
    sigmoid_loss,
)

CALIBRATE, QUALIFY = protocol.CALIBRATE, protocol.QUALIFY
noised = partial(builders.privacy_asked, metrics="noised", metrics_noise_multiplier=1.0)
OPEN = builders.privacy_asked(metrics="unprotected")
#: Finite, and an example; with the weights of ``overflowing`` its logits are not.
RECORD = (1e6, 1e6)


@pytest.fixture
def task(task, request):
    """Two blobs, with one logit where a test asks for ``sigmoid``."""
    if getattr(request, "param", "") != "sigmoid":
        return task
    return replace(
        task,
        network=lambda: FNN((2, 4, 1)),
        output=OutputSchema(("left", "right"), "sigmoid"),
        loss=sigmoid_loss,
        counters=sigmoid_counters(1),
        metrics=(ACCURACY, SENSITIVITY, SPECIFICITY),
    )


@pytest.fixture
def overflowing(weights):
    """Weights of a server's choice: the first layer's output is finite for all examples but one."""
    chosen = {name: np.zeros_like(a) for name, a in weights.items()}
    first, *_, last = [name for name in chosen if name.endswith("weight")]
    chosen[first][...] = 1e33
    chosen[last][0] = 1e-33
    return chosen


@pytest.fixture
def asked(ask, task, overflowing):
    """A request about the graph of those weights."""

    def build(kind, privacy, kinds=(ONNX_FP32,), **changes):
        graph = candidates.fp32(task, overflowing, (2,))
        changes |= {"privacy": privacy, "calibration": json.dumps({"enabled": True})}
        if kind == QUALIFY:
            made = [candidates.derived(k, graph, None) for k in kinds]
            changes |= {
                "candidates": list(kinds),
                "candidate_sha256": [hashlib.sha256(graph).hexdigest() for graph in made],
            }
        return ask(kind, overflowing, graph_sha256=hashlib.sha256(graph).hexdigest(), **changes)

    return build


@pytest.fixture
def held(task, tmp_path, asked):
    """The counts of a site, before the noise, with or without that record in its train and held-out examples."""

    def count(kind, privacy, record, **changes):
        home = tmp_path / str(record)
        learner = Learner("site-1", task, examples(record), home, torch.device("cpu"))
        content = asked(kind, privacy, **changes).content
        config = content[protocol.CONFIG]
        terms = requests.terms(config, learner.columns)
        received = requests.arrays(content, learner.specs)
        found = SiteCalibration(learner).figures(
            kind, content, terms, received, learner.prepare(terms), requests.section_of(config)
        )
        return found.count(), found

    return count


def examples(record):
    draw = np.random.default_rng(0)
    labels = np.arange(80) % 2
    features = (draw.normal(size=(80, 2)) + 3.0 * labels[:, None]).astype(np.float32)
    if record is not None:
        # One of training, and one of each label that is held out.
        features[[0, 40, 41]] = record
    return SiteData(features[:40], labels[:40], features[40:], labels[40:])


def values(counted, found):
    return np.array([counted[name] for name in found.noised or found.names])


# Qualifying


@pytest.mark.parametrize("mechanism", ["example", "local"])
def test_a_logit_that_is_not_finite_costs_its_own_example_alone(held, mechanism):
    with_it, found = held(QUALIFY, noised(mechanism), RECORD)
    without, _ = held(QUALIFY, noised(mechanism), None)
    assert (without["onnx-fp32/correct"], without["onnx-fp32/examples"]) == (20, 40)
    assert (with_it[f"onnx-fp32/{RAN}"], with_it["onnx-fp32/examples"]) == (1, 40)
    # All are said to be of label 0; of the two without logits, that one is wrong now.
    assert with_it["onnx-fp32/correct"] == 19
    change = values(with_it, found) - values(without, found)
    assert np.linalg.norm(change) <= np.sqrt(2)


@pytest.mark.parametrize("task", ["sigmoid"], indirect=True)
def test_where_there_is_one_logit_it_is_of_the_other_label(held):
    with_it, found = held(QUALIFY, noised(), RECORD)
    without, _ = held(QUALIFY, noised(), None)
    changed = dict(zip(found.noised, values(with_it, found) - values(without, found), strict=True))
    # All are said to be of label 1.
    assert {name.split("/")[1]: change for name, change in changed.items() if change} == {
        "correct": -1,
        "true-positive": -1,
    }


@pytest.mark.parametrize("record", [(np.nan, 0.0), (np.inf, -np.inf)])
def test_an_example_that_is_not_finite_itself_counts_by_itself(held, record):
    with_it, _ = held(QUALIFY, noised(), record)
    assert with_it["onnx-fp32/examples"] == 40
    assert 18 <= with_it["onnx-fp32/correct"] <= 22


@pytest.mark.parametrize("privacy", [None, OPEN])
def test_in_clear_such_a_candidate_fails(tell, task, asked, tmp_path, privacy):
    worker = SiteWorker("site-1", task, examples(RECORD), tmp_path / "clear")
    reply = tell(worker, asked(QUALIFY, privacy))
    assert set(reply[protocol.METRICS]["counts"]) == {0}


def test_a_graph_that_crashes_fails_under_noise_too(held, monkeypatch):
    monkeypatch.setenv("FEDGE_FAIL_POINT", "graph-run:2")
    counted, _ = held(QUALIFY, noised(), None, kinds=(ONNX_FP32, ONNX_FP16))
    assert (counted["onnx-fp32/examples"], counted["onnx-fp16/examples"]) == (40, 0)


# Calibrating


@pytest.mark.parametrize("mechanism", ["example", "local"])
@pytest.mark.parametrize("record", [RECORD, (np.nan, 0.0), (np.inf, 0.0)])
def test_an_example_that_overflows_is_in_the_outermost_bins_of_the_ranges(held, mechanism, record):
    with_it, found = held(CALIBRATE, noised(mechanism), record)
    without, _ = held(CALIBRATE, noised(mechanism), None)
    shape = (-1, ranges.SIDES, ranges.BINS)
    before, after = (values(counted, found).reshape(shape) for counted in (without, with_it))
    assert (after.sum(axis=2) == 40).all()
    # One example in place of another: of each histogram one bin less, one more.
    assert abs(after - before).sum(axis=2).max() == 2
    outermost = np.searchsorted(ranges.EDGES, 10_000.0)
    assert after[..., outermost + 1 :].sum() == 0
    if not np.isfinite(record).all():
        assert (after[..., outermost] >= 1).all()


@pytest.mark.parametrize("mechanism", ["example", "local"])
def test_a_worker_answers_as_if_that_example_were_any_other(tell, task, asked, tmp_path, mechanism):
    worker = SiteWorker("site-1", task, examples(RECORD), tmp_path / "noised")
    reply = tell(worker, asked(CALIBRATE, noised(mechanism)))
    assert not isinstance(reply, SiteError), reply
    assert reply[protocol.METRICS][protocol.NUM_EXAMPLES] == 1


@pytest.mark.parametrize("privacy", [None, OPEN])
@pytest.mark.parametrize(("record", "code"), [(RECORD, 413), ((np.nan, 0.0), 401)])
def test_in_clear_it_is_an_error(tell, task, asked, tmp_path, privacy, record, code):
    worker = SiteWorker("site-1", task, examples(record), tmp_path / "clear")
    found = tell(worker, asked(CALIBRATE, privacy))
    assert isinstance(found, SiteError)
    assert found.code == code
