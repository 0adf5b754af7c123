"""Counters of a network over a site's examples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedge.shared.tasks.task import Counters, Task

#: Examples at a time; fixed, as the order of a sum is part of its last bits.
CHUNK = 1024


def counters(task: Task, network: nn.Module, x: Tensor, y: Tensor) -> Counters:
    """Sum the task's counters.

    Args:
        task: whose counters.
        network: put into evaluation mode.
        x: preprocessed examples ``(n, *in)``.
        y: labels ``(n,)``, int64.
    """
    network.eval()
    total: Counters = {}
    with torch.no_grad():
        for start in range(0, len(y), CHUNK):
            rows = slice(start, start + CHUNK)
            for name, value in task.counters(network(x[rows]), y[rows]).items():
                total[name] = total.get(name, 0.0) + value
    return total


def mean_loss(task: Task, network: nn.Module, x: Tensor, y: Tensor) -> float:
    """Mean loss over all examples, in evaluation mode."""
    found = counters(task, network, x, y)
    return found["loss-sum"] / found["examples"]
