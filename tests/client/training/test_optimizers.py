"""Torch's optimisers without its compiler: the same bits, and nothing of the compiler in the process."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedge.client.training.optimizers import EagerAdam, EagerSGD

TRAINING = """
import sys
import torch
from fedge.client.training.local_steps import optimizer
from fedge.shared.config.sections import TrainSection
for name in ("sgd", "adam"):
    network = torch.nn.Linear(2, 1)
    steps = optimizer(TrainSection(optimizer=name), network)
    network(torch.ones(1, 2)).sum().backward()
    steps.step()
    steps.zero_grad()
print("torch._dynamo" in sys.modules)
"""


def trained(kind: type[torch.optim.Optimizer], **settings: Any) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        network = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 2))
        steps = kind(network.parameters(), lr=0.05, **settings)  # type: ignore[call-arg]
        for _ in range(20):
            steps.zero_grad()
            nn.functional.cross_entropy(
                network(torch.randn(4, 5)), torch.tensor([0, 1, 1, 0])
            ).backward()
            steps.step()
    assert torch.is_grad_enabled()
    assert all(p.requires_grad and p.grad_fn is None for p in network.parameters())
    return [p.detach() for p in network.parameters()]


@pytest.mark.parametrize(
    ("own", "torchs", "settings"),
    [
        (EagerSGD, torch.optim.SGD, {}),
        (EagerSGD, torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}),
        (EagerAdam, torch.optim.Adam, {}),
        (EagerAdam, torch.optim.Adam, {"weight_decay": 0.01}),
    ],
)
def test_the_steps_are_torchs(own: Any, torchs: Any, settings: dict[str, float]) -> None:
    pairs = zip(trained(own, **settings), trained(torchs, **settings), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.slow
def test_training_does_not_import_torchs_compiler() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAINING], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("kind", [EagerSGD, EagerAdam])
def test_an_empty_list_of_parameters_is_refused(kind: Any) -> None:
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])
