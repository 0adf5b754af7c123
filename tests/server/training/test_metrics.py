"""Three views of an evaluation: each site's, the mean over sites, the pooled ratio."""

from __future__ import annotations

import numpy as np
import pytest

from fedge.server.training.metrics import ratios, secure_summary, summary
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.privacy.mechanisms import noised_counts
from fedge.shared.privacy.mechanisms.noised_counts import NoisedCounts
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.task import Metric

METRICS = (
    Metric("accuracy", "correct", "examples"),
    Metric("sensitivity", "true-positive", "positive"),
)


def counters(examples: float, correct: float, positive: float = 0.0, hit: float = 0.0):
    return {"examples": examples, "correct": correct, "positive": positive, "true-positive": hit}


def test_mean_counts_sites_and_pooled_counts_examples():
    result = summary(METRICS, {"a": counters(10, 9, 4, 4), "b": counters(90, 45, 16, 4)})
    assert result["per_site"]["a"] == {"accuracy": 0.9, "sensitivity": 1.0}
    assert result["per_site"]["b"] == {"accuracy": 0.5, "sensitivity": 0.25}
    assert result["site_mean"] == pytest.approx({"accuracy": 0.7, "sensitivity": 0.625})
    assert result["pooled"] == pytest.approx({"accuracy": 0.54, "sensitivity": 0.4})


def test_a_site_without_positives_has_no_sensitivity_and_lowers_no_other_site_s():
    result = summary(METRICS, {"a": counters(10, 9, 4, 2), "b": counters(10, 5)})
    assert result["per_site"]["b"] == {"accuracy": 0.5}
    assert result["site_mean"]["sensitivity"] == 0.5
    assert result["pooled"]["sensitivity"] == 0.5


def test_a_dropped_counter_takes_only_its_metrics_along():
    partial = {"examples": 10.0, "positive": 5.0, "true-positive": 5.0}
    result = summary(METRICS, {"a": counters(10, 9, 4, 2), "b": partial})
    assert result["per_site"]["b"] == {"sensitivity": 1.0}
    assert result["site_mean"] == {"accuracy": 0.9, "sensitivity": 0.75}
    assert result["pooled"] == {"accuracy": 0.9, "sensitivity": pytest.approx(7 / 9)}


def test_without_counters_there_are_no_metrics():
    assert summary(METRICS, {}) == {"per_site": {}, "site_mean": {}, "pooled": {}}
    assert summary(METRICS, {"a": {}}) == {"per_site": {"a": {}}, "site_mean": {}, "pooled": {}}
    assert summary(METRICS, {"a": counters(0, 0)})["pooled"] == {}


def test_ratios_leave_zero_denominators_out():
    assert ratios(METRICS, counters(4, 1)) == {"accuracy": 0.25}


def test_pooled_is_what_one_place_would_have_measured():
    """Split one set of predictions over sites of unlike size; pooling gives the whole's metrics."""
    import torch

    task = get_task("breast-cancer")
    rng = np.random.default_rng(1)
    logits = torch.from_numpy(rng.normal(size=(60, 1)).astype(np.float32))
    labels = torch.from_numpy(rng.integers(0, 2, 60))
    parts = {
        f"site-{i}": task.counters(logits[a:b], labels[a:b])
        for i, (a, b) in enumerate([(0, 5), (5, 25), (25, 60)])
    }
    whole = task.values(task.counters(logits, labels))
    assert summary(task.metrics, parts)["pooled"] == pytest.approx(whole, rel=1e-12)


NOISED = {"a": counters(12.5, 14.0, 3.0, -0.5), "b": counters(-0.5, 3.0, -1.0, 2.0)}


def test_noised_metrics_are_shares_of_the_sums_and_nothing_is_cut_off_before():
    result = summary(METRICS, NOISED, "example")
    # b's own share means nothing, but its counters are in the sums: leaving them out would shift those.
    assert result["per_site"] == {"a": {"accuracy": 1.0, "sensitivity": 0.0}, "b": {}}
    assert result["pooled"] == pytest.approx({"accuracy": 1.0, "sensitivity": 0.75})
    assert result["site_mean"] == {"accuracy": 1.0, "sensitivity": 0.0}
    low = summary(METRICS, {"a": counters(10, -3)}, "example")
    assert low["pooled"] == {"accuracy": 0.0}


def test_where_the_unit_is_a_site_only_metrics_over_all_sites_are_reported():
    sites = {f"s{i}": {"examples": 1.0, "correct": v} for i, v in enumerate((-1.5, 3.0, 0.9))}
    result = summary(METRICS[:1], sites, "site")
    assert result["per_site"] == {}
    assert result["site_mean"] == result["pooled"] == pytest.approx({"accuracy": 0.8})
    # The failing twin: cut to [0, 1] at each site, the same mean comes out as another.
    cut = [min(max(c["correct"], 0.0), 1.0) for c in sites.values()]
    assert abs(sum(cut) / 3 - 0.8) > 0.1


def noise(mechanism: str, names=("examples", "correct")) -> NoisedCounts:
    section = PrivacySection.model_validate(
        {
            "mechanism": mechanism,
            "noise-multiplier": 1.0,
            "metrics": "noised",
            "metrics-noise-multiplier": 2.0,
        }
    )
    found = noised_counts.plan(section, names)
    assert found is not None
    return found


@pytest.mark.parametrize("mechanism", ["local", "example"])
def test_the_reported_standard_deviation_is_that_of_the_metrics(mechanism):
    noise_plan, rng, sites = noise(mechanism), np.random.default_rng(1), 9
    share, size = 0.6, 400.0
    found = []
    for _ in range(400):
        counted = {}
        for i in range(sites):
            sums = {"examples": size, "correct": share * size}
            if noise_plan.unit == "site":
                sums = {"examples": 1.0, "correct": share}
            counted[f"s{i}"] = sums | {
                n: sums[n] + rng.normal(0, noise_plan.stddev) for n in noise_plan.noised
            }
        found.append(summary(METRICS[:1], counted, noise=noise_plan))
    stddevs = found[0]["noise"]
    assert stddevs["unit"] == noise_plan.unit
    values = [row["pooled"]["accuracy"] for row in found]
    if mechanism == "example":
        assert stddevs["pooled"]["accuracy"] == pytest.approx(np.std(values), rel=0.15)
        own = [row["per_site"]["s0"]["accuracy"] for row in found]
        assert stddevs["per_site"]["s0"]["accuracy"] == pytest.approx(np.std(own), rel=0.15)
        assert stddevs["site_mean"]["accuracy"] >= np.std(
            [row["site_mean"]["accuracy"] for row in found]
        )
    else:
        # One counter with noise: its deviation is the multiplier, by the root of the sites.
        assert (
            stddevs["pooled"]["accuracy"]
            == stddevs["site_mean"]["accuracy"]
            == pytest.approx(2 / 3)
        )
        assert stddevs["per_site"] == {}


def test_under_secure_aggregation_the_noise_of_all_sites_adds_up():
    noise_plan = noise("local")
    result = secure_summary(METRICS[:1], {"examples": 16.0, "correct": 8.0}, noise_plan, 16)
    assert result["pooled"] == {"accuracy": 0.5}
    assert result["noise"]["pooled"] == pytest.approx({"accuracy": 2 / 4})
    assert "noise" not in secure_summary(METRICS[:1], {"examples": 16.0, "correct": 8.0})
    assert secure_summary(METRICS[:1], {}, noise_plan)["noise"]["pooled"] == {}
