"""The gate where sites add noise of their own: as wide as the noise may be, and no wider."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from fedge.server.admission.validation import admit_evaluate, admit_train
from fedge.server.admission.validation_result import Expected
from fedge.server.aggregation.updates import record
from fedge.shared.config.privacy import PrivacySection
from fedge.shared.config.sections import AdmissionSection
from fedge.shared.privacy.mechanisms import local, noised_counts
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.simulations import flower_patches

RUN, SITE, REGISTERED = "r-1", "site-1", 100
NAMES = ("correct", "examples", "loss-sum")
LEDGER = "ab" * 32


@pytest.fixture(autouse=True, scope="module")
def _identity() -> None:
    flower_patches.identify(1, 0)


def reply(metrics: dict[str, Any], **records: Any) -> Message:
    config = {"run-id": RUN, "server-round": 3, "site": SITE, "privacy-ledger": LEDGER}
    content = {"config": ConfigRecord(config), "metrics": MetricRecord(metrics), **records}
    request = Message(RecordDict(), dst_node_id=1, message_type="train")
    return Message(RecordDict(content), reply_to=request)


def counts(mechanism: str, noise: float = 2.0) -> noised_counts.NoisedCounts:
    section = PrivacySection.model_validate(
        {
            "mechanism": mechanism,
            "noise-multiplier": 1.0,
            "metrics": "noised",
            "metrics-noise-multiplier": noise,
        }
    )
    found = noised_counts.plan(section, NAMES)
    assert found is not None
    return found


def expected(noised: noised_counts.NoisedCounts | None) -> Expected:
    names = NAMES if noised is None else noised.reported
    return Expected(RUN, 3, {}, AdmissionSection(), counters=names, noised=noised)


def evaluated(mechanism: str, num_examples: int, **counters: float) -> Any:
    spent = {"epsilon-consumers": 1.5, "epsilon-server": 2.5, "epsilon-delta": 1e-5}
    metrics = {"num-examples": num_examples, **spent, **counters}
    return admit_evaluate(reply(metrics), SITE, REGISTERED, expected(counts(mechanism)))


def test_counters_with_noise_and_what_was_spent_are_admitted() -> None:
    verdict = evaluated("example", 1, correct=-3.25, examples=104.5)
    assert verdict.rejection is None
    assert verdict.drops == []
    assert verdict.evaluation.counters == {"correct": -3.25, "examples": 104.5}
    assert verdict.evaluation.epsilon == (1.5, 2.5, 1e-5)
    assert verdict.evaluation.ledger == LEDGER


def test_whole_sites_weigh_one_whatever_they_say() -> None:
    verdict = evaluated("local", 1, correct=-3.25, examples=1.0)
    assert verdict.evaluation.counters == {"correct": -3.25, "examples": 1.0}
    assert verdict.drops == []
    heavier = evaluated("local", 2, correct=1.0, examples=2.0)
    assert heavier.rejection.code == 403
    longer = evaluated("local", 1, correct=1.0, examples=1.5)
    assert [d.metric for d in longer.drops] == ["examples"]


@pytest.mark.parametrize(
    ("mechanism", "most"), [("example", AdmissionSection().max_examples), ("local", 1)]
)
def test_what_no_noise_makes_is_dropped(mechanism: str, most: int) -> None:
    """How many examples counters are over is not told, so that the bound is the largest number of any site."""
    max_noise = counts(mechanism).max_noise
    for far in (most + 1.01 * max_noise, -1.01 * max_noise, math.nan, math.inf):
        verdict = evaluated(mechanism, 1, correct=far, examples=1.0)
        assert [d.metric for d in verdict.drops] == ["correct"]
        assert verdict.evaluation.counters == {"examples": 1.0}
    near = evaluated(mechanism, 1, correct=most + 0.99 * max_noise, examples=1.0)
    assert near.drops == []


def test_a_loss_beside_noised_counters_is_none_of_them() -> None:
    verdict = evaluated("example", 1, correct=3.0, examples=100.0, **{"loss-sum": 1.0})
    assert [d.metric for d in verdict.drops] == ["loss-sum"]
    assert "loss-sum" not in verdict.evaluation.counters


def test_honest_noise_is_never_dropped() -> None:
    source, noised = Entropy(key=bytes(32)), counts("example", 30.0)
    for _ in range(500):
        made = noised.make({"correct": 0.0, "examples": 100.0, "loss-sum": 1.0}, source)
        message = reply(
            {
                "num-examples": 1,
                "epsilon-consumers": 1.0,
                "epsilon-server": 1.0,
                "epsilon-delta": 1e-5,
                **made,
            }
        )
        assert admit_evaluate(message, SITE, REGISTERED, expected(noised)).drops == []


def test_without_noise_the_gate_is_as_narrow_as_before() -> None:
    exact = {"num-examples": 10, "correct": 10.5, "examples": 10.0, "loss-sum": 1.0}
    verdict = admit_evaluate(reply(exact), SITE, REGISTERED, expected(None))
    assert [d.metric for d in verdict.drops] == ["correct"]
    assert verdict.evaluation is not None
    assert verdict.evaluation.epsilon is None


REFERENCE = {"w": np.zeros(2000, np.float32)}


def trained(noise_norm: float, update: np.ndarray[Any, Any]) -> Any:
    expectation = Expected(
        RUN, 3, REFERENCE, AdmissionSection(), private=True, noise_norm=noise_norm
    )  # fmt: skip
    metrics = {
        "num-examples": 1,
        "epsilon-consumers": 1.0,
        "epsilon-server": 1.0,
        "epsilon-delta": 1e-5,
    }
    message = reply(metrics, arrays=record({"w": update.astype(np.float32)}))
    return admit_train(message, SITE, 1, expectation)


def test_an_update_with_its_site_s_noise_passes_and_one_without_must_be_as_short_as_ever() -> None:
    source = Entropy(key=bytes(32))
    found = local.noised(np.ones(2000), 1.0, 5.0, source)
    assert np.linalg.norm(found) > 4 * AdmissionSection().max_update_norm
    allowed = local.max_update_norm(1.0, 5.0, 2000)
    assert trained(allowed, found).update is not None
    assert trained(0.0, found).rejection.code == 402
    beyond = found * (1.01 * (100 + allowed) / np.linalg.norm(found))
    assert trained(allowed, beyond).rejection.code == 402
