"""Local training: plain steps, FedProx's proximal term, SCAFFOLD's correction.

Notation of the papers: x are the weights as received, y the site's own, c and c_i the control
variates of server and site, K the number of local steps, lr the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer

from fedge.client.training import device
from fedge.client.training.optimizers import EagerAdam, EagerSGD
from fedge.shared.config.sections import TrainSection
from fedge.shared.tasks.task import Task


@dataclass(frozen=True)
class Examples:
    """Preprocessed examples.

    Attributes:
        x: ``(n, *in)``, on the device of the network.
        y: ``(n,)``, int64, there too.
    """

    x: Tensor
    y: Tensor


def optimizer(settings: TrainSection, network: nn.Module) -> Optimizer:
    """A fresh optimiser, without memory of earlier rounds."""
    if settings.optimizer == "adam":
        return EagerAdam(
            network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
    return EagerSGD(
        network.parameters(),
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


@dataclass(frozen=True)
class Outcome:
    """The result of the local steps, besides the changed network.

    Attributes:
        loss: mean over the steps of the batch's mean loss, without the proximal term.
        mean_gradient: by parameter name, the mean over the steps of the gradient before SCAFFOLD's
            correction, weight decay included; empty without SCAFFOLD.
    """

    loss: float
    mean_gradient: dict[str, Tensor]


def train(
    task: Task,
    network: nn.Module,
    examples: Examples,
    order: Iterable[NDArray[Any]],
    settings: TrainSection,
    *,
    proximal_mu: float = 0.0,
    correction: Mapping[str, Tensor] | None = None,
) -> Outcome:
    """Take one step a batch, changing ``network`` in place.

    FedProx (Federated Optimization in Heterogeneous Networks, MLSys 2020,
    https://arxiv.org/abs/1812.06127) adds mu/2 ||y - x||^2 to the loss, so mu (y - x) to its
    gradient.

    SCAFFOLD (ICML 2020, https://arxiv.org/abs/1910.06378) adds c - c_i to the gradient. Its option
    II, c_i+ = c_i - c + (x - y) / (K lr), is for plain SGD the mean of the uncorrected gradients:
    that mean is kept, as it stays correct with momentum or Adam, where the distance moved no
    longer gives the gradient.

    Args:
        task: whose loss.
        network: holds the weights as received.
        examples: the site's training split, preprocessed.
        order: row indices of each step's batch, one step or more.
        settings: optimiser and its numbers.
        proximal_mu: mu of FedProx, 0 for none.
        correction: c - c_i by parameter name, or None without SCAFFOLD.

    Raises:
        SiteError: 414, float16 without CUDA.
    """
    place = examples.x.device
    device.require(settings, place)
    network.train()
    steps = optimizer(settings, network)
    parameters = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    received = {name: p.detach().clone() for name, p in parameters} if proximal_mu else {}
    gradients = {name: torch.zeros_like(p) for name, p in parameters} if correction else {}
    scaler = device.scaler(settings, place)
    # Summed where the steps are: reading each loss would wait for the device at every step.
    total, count = torch.zeros((), dtype=torch.float64, device=place), 0
    for rows in order:
        index = torch.from_numpy(rows).to(place)
        with device.autocast(settings, place):
            logits = network(examples.x[index])
        loss = task.loss(_full(logits, settings), examples.y[index])
        steps.zero_grad()
        if scaler is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.unscale_(steps)
        with torch.no_grad():
            # A float16 step that overflowed is skipped, and its gradient counts as zero.
            moves = scaler is None or all(
                bool(p.grad.isfinite().all()) for _, p in parameters if p.grad is not None
            )
            for name, p in parameters:
                if p.grad is None:
                    continue
                if proximal_mu:
                    p.grad.add_(p - received[name], alpha=proximal_mu)
                if correction and moves:
                    gradients[name].add_(p.grad).add_(p, alpha=settings.weight_decay)
                    p.grad.add_(correction[name])
        if scaler is None:
            steps.step()
        else:
            scaler.step(steps)
            scaler.update()
        total += loss.detach()
        count += 1
    return Outcome(float(total) / count, {name: g / count for name, g in gradients.items()})


def _full(logits: Tensor, settings: TrainSection) -> Tensor:
    """Logits in full precision, as a loss needs it."""
    return logits if settings.mixed_precision == "off" else logits.float()
