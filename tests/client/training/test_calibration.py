"""A worker that is asked about the final model: ranges and scores of graphs that it made itself, and of no other."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord

from fedge.client import requests
from fedge.client.requests import section_of
from fedge.client.settings import policy
from fedge.client.settings.policy import Policy
from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.client.training import calibration_ranges, onnx_runs
from fedge.client.training.calibration import SiteCalibration
from fedge.client.training.calibration_request import CalibrationRequest
from fedge.client.training.learner import Learner
from fedge.client.training.onnx_runs import Terms
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.bundle.manifest_artefacts import ONNX_FP32, ONNX_INT8, ONNX_KINDS
from fedge.shared.compile import candidates, ranges
from fedge.shared.compile.activation_observer import observed
from fedge.shared.errors import SiteError
from fedge.shared.privacy.accounting.epsilon import Release, epsilon
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.secagg import messages

CALIBRATE, QUALIFY = protocol.CALIBRATE, protocol.QUALIFY
PRIVACY = json.dumps(
    {
        "mechanism": "example",
        "noise-multiplier": 1.0,
        "statistics": "unprotected",
        "metrics": "noised",
        "metrics-noise-multiplier": 2.0,
    }
)


@pytest.fixture
def many(data):
    """More training examples than a site may be asked to look at."""
    draw = np.random.default_rng(5)
    features = draw.normal(1.5, 2.0, size=(150, 2)).astype(np.float32)
    return replace(data, train_features=features, train_labels=np.arange(150) % 2)


def metrics(reply):
    assert not isinstance(reply, SiteError), reply
    return dict(reply[protocol.METRICS])


def refused(reply, code, words=""):
    assert isinstance(reply, SiteError)
    assert (reply.code, words in reply.message) == (code, True), reply


def by_kind(reply, kinds=ONNX_KINDS):
    names = ("ran", "correct", "examples", "loss-sum")
    values = np.reshape(metrics(reply)["counts"], (len(kinds), len(names)))
    return {
        kind: dict(zip(names, row.tolist(), strict=True))
        for kind, row in zip(kinds, values, strict=True)
    }


# Calibrating


@pytest.mark.slow
def test_ranges_are_the_smallest_and_largest_activations_of_the_training_examples(
    tell, worker, about, graph, task, data
):
    reply = tell(worker, about(CALIBRATE))
    told = metrics(reply)
    names = candidates.tensors(graph)
    x = (data.train_features - np.float32([1.5, 1.5])) / np.float32([1.5, 2.0])
    seen = onnx_runs.extremes(observed(graph, names), x, len(names), Terms(60.0, 1))
    assert told["num-examples"] == 37
    at = names.index("input")
    assert told["range-low"][at] == pytest.approx(x.min(), rel=1e-6)
    assert told["range-high"] == pytest.approx(seen[:, :, 1].max(axis=0).tolist(), rel=1e-6)
    assert reply[protocol.CONFIG][protocol.GRAPH] == hashlib.sha256(graph).hexdigest()
    # The held-out examples are not in it.
    assert len(told["range-low"]) == len(names)
    assert metrics(tell(worker, about(CALIBRATE))) == told


@pytest.mark.slow
def test_a_site_looks_at_as_many_examples_as_are_asked_for_and_clips(
    tell, task, many, about, tmp_path
):
    worker = SiteWorker("site-1", task, many, tmp_path / "many")
    few = metrics(tell(worker, about(CALIBRATE, section={"examples": 64})))
    all_ = metrics(tell(worker, about(CALIBRATE, run_id="r-2")))
    assert (few["num-examples"], all_["num-examples"]) == (64, 150)
    assert max(few["range-high"]) <= max(all_["range-high"])
    assert few["range-high"] != all_["range-high"]
    tight = metrics(tell(worker, about(CALIBRATE, run_id="r-3", section={"bound": 0.25})))
    assert min(tight["range-low"]) == -0.25
    assert max(tight["range-high"]) == 0.25


def test_one_example_more_is_another_sample_and_not_the_same_with_one_more():
    few, more = (
        set(calibration_ranges.rows(500, n, 42, "a", every=False).tolist()) for n in (64, 65)
    )
    assert (len(few), len(more)) == (64, 65)
    assert len(few - more) > 32
    again = calibration_ranges.rows(500, 64, 42, "a", every=False)
    assert set(again.tolist()) == few
    assert len(calibration_ranges.rows(500, 64, 42, "a", every=True)) == 500


@pytest.mark.slow
def test_examples_are_looked_at_in_parts_with_the_same_result(
    tell, worker, about, monkeypatch, task, data, tmp_path
):
    whole = metrics(tell(worker, about(CALIBRATE)))
    monkeypatch.setattr(calibration_ranges, "PART_BYTES", 3000)
    again = SiteWorker("site-1", task, data, tmp_path / "again")
    assert metrics(tell(again, about(CALIBRATE))) == whole


@pytest.mark.slow
def test_a_run_gets_its_ranges_once_and_the_same_again_after_a_restart(
    tell, worker, task, data, about, weights
):
    told = metrics(tell(worker, about(CALIBRATE)))
    again = SiteWorker("site-1", task, data, worker.home)
    assert metrics(tell(again, about(CALIBRATE, cohort=7))) == told
    for changes in (
        {"section": {"examples": 65}},
        {"section": {"bound": 5.0}},
        {"seed": 43},
        {"server_round": 2},
        {"feature_mean": [0.0, 1.5]},
        {"privacy": PRIVACY},
    ):
        refused(tell(again, about(CALIBRATE, **changes)), 414, "ranges: must be asked for with")
    # Other weights give another graph.
    name, first = next((n, a) for n, a in weights.items() if a.ndim)
    weights[name] = first + np.float32(1.0)
    graph = hashlib.sha256(candidates.fp32(task, weights, (2,))).hexdigest()
    refused(tell(again, about(CALIBRATE, graph_sha256=graph)), 414, "of run r-1's first request")
    (worker.home / "data" / "r-1.calibrated").write_bytes(b"")
    refused(tell(again, about(CALIBRATE, graph_sha256=graph)), 414, "ranges")
    assert metrics(tell(again, about(CALIBRATE, run_id="r-2", graph_sha256=graph))) != told


@pytest.mark.slow
def test_a_graph_gets_five_minutes_at_most_whatever_is_asked(about, task, weights):
    for deadline, granted in ((3600, 300.0), (7, 7.0)):
        content = about(CALIBRATE, section={"deadline": deadline}).content
        terms = requests.terms(content[protocol.CONFIG], 2)
        asked = CalibrationRequest.parse(content, task.name, terms, weights)
        assert asked.running == Terms(granted, 1)


def test_examples_that_are_not_finite_are_refused(tell, task, data, about, tmp_path):
    features = data.train_features.copy()
    features[3, 1] = np.nan
    bad = SiteWorker("a", task, replace(data, train_features=features), tmp_path / "a")
    refused(tell(bad, about(CALIBRATE, standardise="federated")), 401, "must be finite")


def test_another_graph_than_the_site_s_own_is_refused(tell, worker, about):
    refused(
        tell(worker, about(CALIBRATE, graph_sha256="0" * 64)), 429, "graph-sha256: must be 0000"
    )
    refused(tell(worker, about(CALIBRATE, graph_sha256="latest")), 414)
    refused(tell(worker, about(CALIBRATE, graph_sha256=None)), 414)


def test_a_graph_that_a_server_sends_is_refused_unread(tell, worker, about, graph):
    asked = about(CALIBRATE)
    asked.content["graph"] = ConfigRecord({"onnx": graph})
    refused(tell(worker, asked), 414, "records: must be of arrays, config, secagg")
    asked = about(CALIBRATE)
    asked.content["more"] = ArrayRecord({})
    refused(tell(worker, asked), 414)


@pytest.mark.parametrize(
    "section",
    [
        None,
        "[]",
        "{",
        '{"enabled": true, "examples": 63}',
        '{"enabled": true, "bound": 1e9}',
        '{"enabled": true, "graph": "x"}',
        " " * 2000,
        7,
    ],
)
def test_terms_beyond_their_range_are_refused(tell, worker, about, section):
    refused(tell(worker, about(CALIBRATE, calibration=section)), 414, "calibration")


# Qualifying


def test_candidates_are_scored_as_an_evaluation_scores(tell, worker, ask, weights, scores):
    exact = metrics(tell(worker, ask(protocol.EVALUATE, weights)))
    reply = tell(worker, scores())
    found = by_kind(reply)
    assert metrics(reply)["num-examples"] == 13
    for kind, counted in found.items():
        assert (counted["ran"], counted["examples"]) == (1, 13)
        assert abs(counted["correct"] - exact["correct"]) <= (0 if kind == ONNX_FP32 else 1)
        assert counted["loss-sum"] == pytest.approx(exact["loss-sum"], rel=0.05)
    assert found[ONNX_FP32]["loss-sum"] == pytest.approx(exact["loss-sum"], rel=1e-5)
    assert found[ONNX_INT8]["loss-sum"] != found[ONNX_FP32]["loss-sum"]


def test_a_candidate_of_other_bytes_is_not_run_and_the_others_are(tell, worker, scores):
    asked = scores((ONNX_FP32, ONNX_INT8))
    own = list(asked.content[protocol.CONFIG][protocol.CANDIDATE_DIGESTS])
    asked.content[protocol.CONFIG][protocol.CANDIDATE_DIGESTS] = [own[0], "0" * 64]
    reply = tell(worker, asked)
    found = by_kind(reply, (ONNX_FP32, ONNX_INT8))
    assert found[ONNX_FP32]["ran"] == 1
    assert set(found[ONNX_INT8].values()) == {0}
    assert reply[protocol.CONFIG][protocol.CANDIDATE_DIGESTS] == own


def test_a_candidate_that_crashes_counts_nothing_and_the_reply_goes_on(
    tell, worker, scores, monkeypatch, caplog
):
    monkeypatch.setenv("FEDGE_FAIL_POINT", "graph-run:2")
    kinds = (ONNX_FP32, ONNX_INT8)
    found = by_kind(tell(worker, scores(kinds)), kinds)
    assert found[ONNX_FP32]["ran"] == 1
    assert set(found[ONNX_INT8].values()) == {0}
    assert "onnx-int8: crashed (SIGKILL)" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"candidates": ["tensorrt-int8"]},
        {"candidates": [ONNX_FP32, ONNX_FP32]},
        {"candidates": []},
        {"candidates": [ONNX_FP32] * 5},
        {"candidates": ONNX_FP32},
        {"candidate_sha256": []},
        {"candidate_sha256": ["x"]},
        {"range_low": None},
        {"range_low": [0.0]},
        {"range_low": [float("nan")] * 9},
        {"range_high": [-9.0] * 9},
        {"range_high": [1e6] * 9},
        {"range_low": None, "range_high": None},
    ],
)
def test_an_unknown_candidate_or_too_many_or_ranges_that_are_none_are_refused(
    tell, worker, scores, graph, changes
):
    count = len(candidates.tensors(graph))
    changes = {
        k: v[:count] if isinstance(v, list) and len(v) == 9 else v for k, v in changes.items()
    }
    refused(tell(worker, scores((ONNX_INT8,), **changes)), 414)


# Under differential privacy


@pytest.mark.slow
def test_noised_histograms_are_charged_with_the_noise_of_2t_changes(tell, worker, about, graph):
    reply = tell(worker, about(CALIBRATE, privacy=PRIVACY))
    told = metrics(reply)
    count = len(candidates.tensors(graph))
    values = np.array(told["counts"])
    assert values.size == count * 2 * ranges.BINS
    assert told["num-examples"] == 1
    assert "range-low" not in told
    # Nearly all bins are empty: what is in them is the noise.
    deviation = 2.0 * np.sqrt(2 * count)
    empty = np.sort(values)[: values.size * 9 // 10]
    assert np.median(np.abs(empty)) / 0.6745 == pytest.approx(deviation, rel=0.25)
    assert values.std() < 1.5 * deviation
    (charge,) = (e.charge for e in Ledger(worker.home / FILE).entries())
    assert (charge.purpose, charge.unit, charge.release) == ("calibrate", "example", Release(2.0))
    assert told["epsilon-server"] == pytest.approx(epsilon([Release(2.0)], 1e-5))
    # Asked again, it answers as before and nothing is charged.
    assert metrics(tell(worker, about(CALIBRATE, privacy=PRIVACY))) == told
    assert len(Ledger(worker.home / FILE).entries()) == 1


def counts(task, data, home, about, privacy):
    """The histograms that a site would add noise to, without it, of at most 64 examples where it draws."""
    learner = Learner("site-1", task, data, home, torch.device("cpu"))
    content = about(CALIBRATE, section={"examples": 64}, privacy=privacy).content
    terms = requests.terms(content[protocol.CONFIG], learner.columns)
    received, section = requests.arrays(content, learner.specs), section_of(content["config"])
    asked = SiteCalibration(learner).figures(
        CALIBRATE, content, terms, received, learner.prepare(terms), section
    )
    found = asked.count()
    return np.array([found[name] for name in asked.noised or asked.names]), asked


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 149])
def test_one_example_less_changes_the_histograms_by_the_root_of_2t_at_most(
    task, many, about, tmp_path, gone, graph
):
    keep = np.arange(150) != gone
    less = replace(
        many, train_features=many.train_features[keep], train_labels=many.train_labels[keep]
    )
    most = np.sqrt(2 * len(candidates.tensors(graph)))
    whole, asked = counts(task, many, tmp_path / "whole", about, PRIVACY)
    without, _ = counts(task, less, tmp_path / "less", about, PRIVACY)
    assert (asked.num_examples, asked.sensitivity) == (150, most)
    assert np.linalg.norm(whole - without) == pytest.approx(most)
    # A draw of so many is another one without it, and changes more: noise for one example would not hide it.
    drawn, asked = counts(task, many, tmp_path / "drawn", about, None)
    other, _ = counts(task, less, tmp_path / "other", about, None)
    assert asked.num_examples == 64
    assert np.linalg.norm(drawn - other) > 1.5 * most


@pytest.mark.slow
def test_noised_scores_are_charged_on_their_own(tell, worker, about, scores):
    kinds = (ONNX_FP32, ONNX_INT8)
    told = metrics(tell(worker, scores(kinds, privacy=PRIVACY)))
    # Correct and examples of each; the loss has no bound, and whether it ran is not told.
    assert len(told["counts"]) == 4
    assert all(abs(value) < 13 + 8 * 2.0 * 2 for value in told["counts"])
    (entry,) = Ledger(worker.home / FILE).entries()
    assert entry.charge.purpose == "qualify"


def test_ranges_and_scores_are_reckoned_with_where_a_run_has_an_epsilon_in_place_of_noise(ask):
    asked = {"rounds": 10, "evaluate_every": 3}
    plain = ask(protocol.TRAIN, **asked).content[protocol.CONFIG]
    more = ask(protocol.TRAIN, calibration="{}", **asked).content[protocol.CONFIG]
    assert (requests.evaluations(plain), requests.evaluations(more)) == (4, 6)


def test_where_nobody_may_evaluate_nobody_calibrates(tell, worker, about):
    off = json.dumps({"mechanism": "local", "noise-multiplier": 1.0, "statistics": "unprotected"})
    refused(tell(worker, about(CALIBRATE, privacy=off)), 414, "privacy.metrics")


def test_under_local_noise_the_number_of_examples_is_not_told(tell, worker, about):
    open_ = {"mechanism": "local", "noise-multiplier": 1.0, "metrics": "unprotected"}
    open_ |= {"statistics": "unprotected"}
    assert metrics(tell(worker, about(CALIBRATE, privacy=json.dumps(open_))))["num-examples"] == 1


# The owner's policy


@pytest.fixture
def permit(about):
    """Hold a request against a policy with some keys; ``required`` are those of its [privacy]."""

    def check(kind, privacy=None, required=None, masked=False, **keys):
        section = {"tasks": ("blobs",), "bundles": ("0" * 64,), "versions": ("1",), **keys}
        if required is not None:
            section["privacy"] = PrivacyPolicy(required=True, **required)
        made = Policy.model_validate({k.replace("_", "-"): v for k, v in section.items()})
        asked = about(kind, fedge_version="1", cohort=5, privacy=privacy)
        if masked:
            asked.content[messages.SECURE] = ConfigRecord({})
        policy.allow(made, kind, asked.content, "0" * 64)

    return check


def test_a_policy_without_ranges_refuses_them_in_clear(permit):
    permit(CALIBRATE)
    for keys in (
        {"share_ranges": False},
        {"share_statistics": False},
        {"share_statistics": True, "share_ranges": False},
    ):
        with pytest.raises(SiteError, match="share-ranges is false") as caught:
            permit(CALIBRATE, **keys)
        assert caught.value.code == 418
        permit(CALIBRATE, masked=True, **keys)
        permit(CALIBRATE, PRIVACY, **keys)
        permit(QUALIFY, **keys)
    permit(CALIBRATE, share_statistics=False, share_ranges=True)


def test_where_privacy_is_required_figures_without_noise_need_the_owner_s_word(permit):
    bare = json.dumps({"mechanism": "example", "noise-multiplier": 1.0, "metrics": "unprotected"})
    with pytest.raises(SiteError, match="share-metrics") as caught:
        permit(QUALIFY, bare, {})
    assert caught.value.code == 418
    permit(QUALIFY, bare, {"share-metrics": True})
    # Neither the sums of columns nor masks stand for ranges here.
    for masked in (False, True):
        with pytest.raises(SiteError, match="privacy.required is true and share-ranges is not"):
            permit(
                CALIBRATE, bare, {"share-statistics": True}, masked=masked, share_statistics=True
            )
        permit(CALIBRATE, bare, {}, masked=masked, share_ranges=True)
        permit(CALIBRATE, PRIVACY, {"share-statistics": True}, masked=masked)
    for kind in (CALIBRATE, QUALIFY):
        with pytest.raises(SiteError, match="under differential privacy"):
            permit(kind, None, {}, share_ranges=True)


def test_few_sites_and_clear_figures_are_refused_as_for_an_evaluation(permit):
    for kind in (CALIBRATE, QUALIFY):
        with pytest.raises(SiteError, match="cohort"):
            permit(kind, min_cohort=6)
        with pytest.raises(SiteError, match="under secure aggregation"):
            permit(kind, secure_aggregation=policy.SecurePolicy(required=True))
