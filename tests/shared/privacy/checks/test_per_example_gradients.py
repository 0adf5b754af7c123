"""Gradients that are clipped must be each example's own: what makes them another thing is refused by name."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import builders
import pytest
import torch
from torch import Tensor, nn

from fedge.shared.config.privacy import PrivacySection
from fedge.shared.models.transformer import TransformerClassifier
from fedge.shared.preprocessing.schema import InputSchema
from fedge.shared.privacy.checks.compatibility import require_compatible
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.task import Task

BY_EXAMPLE = PrivacySection.model_validate({"mechanism": "example", "noise-multiplier": 1.0})
BUILT = get_task("digits")


class Tokens(nn.Module):
    """A Transformer of a task, whose examples are floats."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.inner = TransformerClassifier(
            tokens=4, classes=10, length=length, width=8, heads=2, layers=1
        )

    def forward(self, x: Tensor) -> Tensor:
        actual: Tensor = self.inner(x.long())
        return actual


class Places(nn.Module):
    """Positions without the axis of the examples."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(4, 8), nn.Embedding(length, 8)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        vectors = self.token(x.long()) + self.place(torch.arange(x.shape[1]))
        actual: Tensor = self.fc(vectors.tanh().mean(dim=1))
        return actual


class Idle(nn.Module):
    """A layer that nothing passes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.idle = nn.Linear(64, 10), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        actual: Tensor = self.fc(x.flatten(1))
        return actual


class Drawing(nn.Module):
    """Dropout that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        actual: Tensor = self.fc(nn.functional.dropout(x.flatten(1), training=self.training))
        return actual


def of_tokens(network: Callable[[], nn.Module], length: int) -> Task:
    return replace(BUILT, input=InputSchema((length,)), preprocessing=(), network=network)


def refused(task: Task) -> str:
    return builders.refused(211, require_compatible, BY_EXAMPLE, task)


# Three examples are tried: of three tokens each, so many positions look like so many examples.
@pytest.mark.parametrize("length", [3, 7])
def test_positions_of_all_examples_together_are_refused(length: int) -> None:
    require_compatible(BY_EXAMPLE, of_tokens(lambda: Tokens(length), length))
    assert "place.weight: must have" in refused(of_tokens(lambda: Places(length), length))


def summed(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits, labels, reduction="sum")


def weighted(logits: Tensor, labels: Tensor) -> Tensor:
    weight = torch.arange(1.0, 11.0)
    return nn.functional.cross_entropy(logits, labels, weight=weight)


@pytest.mark.parametrize("loss", [summed, weighted])
def test_a_loss_that_is_no_mean_over_examples_is_refused(loss: Any) -> None:
    assert "the loss must be a mean" in refused(replace(BUILT, loss=loss))


class Running(nn.Module):
    """Keeps the mean of what it has seen, as a layer by itself; no name of a layer says so."""

    def __init__(self, uses: bool) -> None:
        super().__init__()
        self.uses = uses
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = 0.9 * self.seen + 0.1 * x.detach().mean()
        return x - self.seen if self.uses else x


class Counting(nn.Module):
    """What it gives depends on how often it was asked, and is in no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.passes = nn.Linear(64, 10), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        actual: Tensor = self.fc(x.flatten(1)) * self.passes
        return actual


class Written(nn.Module):
    """Keeps the sum of what it has seen in a parameter, which takes no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.data.add_(x.detach().mean())
        return x


def test_a_parameter_that_a_pass_writes_is_refused_like_a_buffer() -> None:
    layers = nn.Sequential(nn.Flatten(), Written(), nn.Linear(64, 10))
    assert refused(replace(BUILT, network=lambda: layers)).startswith(
        "digits: 1.seen: must be the same after a training pass"
    )


@pytest.mark.parametrize("uses", [True, False])
def test_what_a_pass_writes_into_the_network_is_refused(uses: bool) -> None:
    """It would leave the site exactly; and as the passes differ, no gradient would be looked at."""
    layers = nn.Sequential(nn.Flatten(), Running(uses), nn.Linear(64, 10))
    assert refused(replace(BUILT, network=lambda: layers)).startswith(
        "digits: 1.seen: must be the same after a training pass"
    )
    assert "network: must give the same outputs" in refused(replace(BUILT, network=Counting))
    kept = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    kept.register_buffer("scale", torch.ones(1))
    require_compatible(BY_EXAMPLE, replace(BUILT, network=lambda: kept))


def test_a_weight_without_a_gradient_is_refused() -> None:
    said = refused(replace(BUILT, network=Idle))
    assert "idle.weight: must have a gradient for each of 3 examples, got none" in said


@pytest.mark.parametrize(("at_a_bend", "accepted"), [(2, True), (3, False)])
def test_weights_at_the_bend_of_a_relu_are_no_fault_of_the_network(
    at_a_bend: int, accepted: bool
) -> None:
    """There rounding decides between two gradients, once in some thousand initial weights of this network."""
    built = iter([Idle() for _ in range(at_a_bend)] + [BUILT.network() for _ in range(3)])
    task = replace(BUILT, network=lambda: next(built))
    if accepted:
        require_compatible(BY_EXAMPLE, task)
    else:
        assert "idle.weight" in refused(task)


def test_what_draws_is_let_through() -> None:
    layer = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, 10))
    require_compatible(BY_EXAMPLE, replace(BUILT, network=lambda: layer))
    require_compatible(BY_EXAMPLE, replace(BUILT, network=Drawing))


def test_nothing_is_left_behind() -> None:
    network = BUILT.network()
    before = torch.random.get_rng_state()
    require_compatible(BY_EXAMPLE, replace(BUILT, network=lambda: network))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not any(hasattr(p, "grad_sample") for p in network.parameters())


def test_it_is_quick() -> None:
    require_compatible(BY_EXAMPLE, BUILT)
    began = time.process_time()
    require_compatible(BY_EXAMPLE, BUILT)
    assert time.process_time() - began < 6
