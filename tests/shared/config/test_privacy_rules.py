"""Which configurations cannot keep the promise of their mechanism, and why."""

from __future__ import annotations

import re

import builders
import pytest
from builders import refused

MASKED = {"secure-aggregation": {"enabled": True}}
ALL = ("example", "distributed", "central", "central-mf", "local")


def config(mechanism, privacy=(), **sections):
    own = {"mechanism": mechanism, "noise-multiplier": 1.0, **dict(privacy)}
    sections |= MASKED if mechanism == "distributed" else {}
    return builders.config(run={"rounds": 10}, privacy=own, **sections)


@pytest.mark.parametrize("mechanism", ALL)
def test_every_mechanism_goes_with_a_weighted_mean(mechanism):
    found = config(mechanism)
    assert found.privacy.unit == ("example" if mechanism == "example" else "site")
    config(mechanism, strategy={"name": "FedAdam"})


@pytest.mark.parametrize(
    ("mechanism", "privacy", "sections", "says"),
    [
        *((m, {}, {"strategy": {"name": "QFedAvg"}}, "exact loss") for m in ALL),
        *((m, {}, {"strategy": {"name": "Scaffold"}}, "control variates") for m in ALL),
        ("central", {}, {"strategy": {"name": "FedMedian"}}, "must add replies with central"),
        ("central-mf", {}, {"strategy": {"name": "FedMedian"}}, "must add replies with central-mf"),
        ("central", {}, MASKED, "of which it then sees none"),
        ("central-mf", {}, MASKED, "of which it then sees none"),
        ("local", {}, MASKED, "far more than it needs"),
        ("central", {}, {"round": {"fraction-train": 0.5}}, "set privacy.sampling-rate"),
        (
            "central",
            {"sampling-rate": 0.5},
            {"round": {"require-sites": ["site-1"]}},
            "require-sites: must be empty",
        ),
        ("central-mf", {"min-separation": 11}, {}, "min-separation: must be at most run.rounds"),
        ("central-mf", {"bands": 11}, {}, "bands: must be at most run.rounds"),
        ("local", {"sampling-rate": 0.5}, {}, "mechanism must be central where sampling-rate"),
        ("central", {"bands": 3}, {}, "mechanism must be central-mf where bands"),
        ("central", {"count-noise-multiplier": 3}, {}, "clipping-quantile must be set"),
        (
            "central",
            {"clipping-quantile": 0.5, "count-noise-multiplier": 0.5},
            {},
            "above half of noise-multiplier",
        ),
        ("example", {"metrics": "noised"}, {}, "must hold metrics-noise-multiplier"),
        ("example", {"metrics-noise-multiplier": 2}, {}, "metrics must be noised"),
        ("example", {}, {"train": {"mixed-precision": "bfloat16"}}, "mixed-precision: must be off"),
        ("example", {"epsilon": 1}, {}, "noise-multiplier or epsilon, got both"),
        ("local", {"epsilon": 1}, {}, "noise-multiplier or epsilon, got both"),
        ("example", {"delta": 1e-3}, {}, "must hold epsilon where delta"),
        ("off", {}, {}, "mechanism must be named where noise-multiplier"),
    ],
)
def test_what_would_break_the_promise_is_refused_with_the_reason(
    mechanism, privacy, sections, says
):
    said = refused(201, config, mechanism, privacy, **sections)
    assert re.search(r"privacy|strategy|round|train", said)
    assert says in said


def test_an_epsilon_stands_for_the_noise_of_examples_only():
    only = {"mechanism": "example", "epsilon": 1.0, "delta": 1e-3}
    assert builders.config(privacy=only).privacy.epsilon == 1.0
    said = refused(201, builders.config, privacy={**only, "mechanism": "local"})
    assert "mechanism must be example where epsilon" in said
