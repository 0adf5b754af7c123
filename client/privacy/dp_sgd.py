"""DP-SGD at a site (Abadi et al., CCS 2016, https://arxiv.org/abs/1607.00133), by Opacus.

Each step samples every example with the same probability q, independently of the others (Poisson sampling, which the
accountant assumes), scales each example's gradient down to the clipping bound C, adds the gradients, adds normal noise
of standard deviation noise_multiplier * C, and divides by the batch size that is expected, not by the one that was
sampled: that one would reveal something of the data. A step in which no example is sampled still adds its noise.

Opacus computes gradients by example, clips and adds; the sampling and the noise are ours, as Opacus takes them from a
generator that can be predicted.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import nn

from fedge.client.privacy.noise_calibration import Noise, release_of
from fedge.client.training.local_steps import Examples, optimizer
from fedge.shared.config.sections import TrainSection
from fedge.shared.errors import SiteError
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.gaussian import normal
from fedge.shared.tasks.task import Task

_BITS: Final = 53
_TASK_FAILED: Final = 413


def train_privately(
    task: Task,
    network: nn.Module,
    examples: Examples,
    settings: TrainSection,
    noise: Noise,
    entropy: Entropy,
    *,
    proximal_mu: float = 0.0,
) -> None:
    """Take the steps of ``release_of``, changing ``network`` in place; no loss is told, which would be exact.

    Args:
        task: whose loss, a mean over the batch of a loss of each example.
        network: holds the weights as received; without layers that mix examples.
        examples: the site's training split.
        settings: optimiser and its numbers, in full precision.
        noise: of each step.
        entropy: of sampling and noise.
        proximal_mu: of FedProx, whose term is of the weights alone and is added after the noise.

    Raises:
        SiteError: 413, a parameter's gradients are not by example.
    """
    release = release_of(noise, settings, len(examples.y))
    network.train()
    received = [p.detach().clone() for p in network.parameters() if p.requires_grad]
    module = GradSampleModule(network)
    try:
        steps = _OwnNoise(
            optimizer(settings, network),
            noise_multiplier=noise.noise_multiplier,
            max_grad_norm=noise.clipping_bound,
            expected_batch_size=release.sampling_rate * len(examples.y),
            entropy=entropy,
            received=received,
            proximal_mu=proximal_mu,
        )
        for rows in _poisson(release, len(examples.y), entropy):
            steps.zero_grad()
            if len(rows):
                index = torch.from_numpy(rows).to(examples.x.device)
                loss = task.loss(module(examples.x[index]), examples.y[index])
                with warnings.catch_warnings():
                    # Torch says of every network's first layer that its input has no gradient.
                    warnings.filterwarnings("ignore", "Full backward hook", UserWarning)
                    loss.backward()  # type: ignore[no-untyped-call]
                _require_apart(network, len(rows))
                _zero_non_finite(steps.params)
            else:
                for p in steps.params:
                    p.grad_sample = torch.zeros((0, *p.shape), device=p.device, dtype=p.dtype)
            steps.step()
    finally:
        module.to_standard_module()


def _require_apart(network: nn.Module, rows: int) -> None:
    """Hold the gradients against what is clipped: one an example, or the noise hides less than is charged."""
    for name, p in network.named_parameters():
        gradient = getattr(p, "grad_sample", None)
        if p.requires_grad and not (isinstance(gradient, torch.Tensor) and len(gradient) == rows):
            got = (
                tuple(gradient.shape)
                if isinstance(gradient, torch.Tensor)
                else type(gradient).__name__
            )
            raise SiteError(
                _TASK_FAILED,
                f"{name}: must have a gradient for each of {rows} examples, got {got}",
            )


def _zero_non_finite(params: list[Any]) -> None:
    """Let an example whose gradient is not finite, in any parameter, count as a gradient of zeros.

    A clipped gradient changes the sum by C at most; NaN and infinity have no norm that could be clipped. With weights
    of the server's choice one example alone would make the update NaN, and the error that follows would say whether it
    was sampled: a release without noise.
    """
    finite = torch.stack([p.grad_sample.flatten(1).isfinite().all(1) for p in params]).all(0)
    if not finite.all():
        for p in params:
            p.grad_sample[~finite] = 0


def _poisson(release: Release, rows: int, entropy: Entropy) -> Iterator[NDArray[np.int64]]:
    """Row indices of each step: every row is in with the same probability, independently."""
    # Of 2^53 equally likely numbers so many are below the rate.
    limit = np.uint64(round(release.sampling_rate * 2**_BITS))
    for _ in range(release.steps):
        sampled = entropy.uint64(rows) >> np.uint64(64 - _BITS)
        yield np.flatnonzero(sampled < limit)


class _OwnNoise(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimiser with noise that nobody can predict."""

    def __init__(
        self,
        steps: torch.optim.Optimizer,
        *,
        entropy: Entropy,
        received: list[torch.Tensor],
        proximal_mu: float,
        **options: Any,
    ) -> None:
        super().__init__(steps, **options)
        self._entropy, self._received, self._mu = entropy, received, proximal_mu

    def add_noise(self) -> None:
        """Add noise in float64 to the sum of clipped gradients, rounded once after."""
        stddev = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            noise = torch.from_numpy(normal(p.numel(), self._entropy)).view(p.shape)
            summed = p.summed_grad.detach().cpu().double() + stddev * noise
            p.grad = summed.to(p.device, p.dtype).view_as(p)

    def scale_grad(self) -> None:
        """By the expected batch size, then FedProx's term, which no example is in."""
        super().scale_grad()
        if self._mu:
            for p, x in zip(self.params, self._received, strict=True):
                p.grad.add_(p.detach() - x, alpha=self._mu)
