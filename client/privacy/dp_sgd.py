"""DP-SGD at a site (Abadi et al., CCS 2016, https://arxiv.org/abs/1607.00133), by Opacus.

Each step samples every example with the same probability q, independently of the others (Poisson sampling, which the
accountant assumes), scales each example's gradient down to the clipping bound C, adds the gradients, adds normal noise
of standard deviation noise_multiplier * C, and divides by the batch size that is expected, not by the one that was
sampled: that one would reveal something of the data. A step in which no example is sampled still adds its noise.

Opacus computes gradients by example and adds them; the sampling and the noise are ours, as Opacus takes them from a
generator that can be predicted, and so are the norms. The weights are of the server's choice, so that an example's part
of the sum must be its own alone also where numbers overflow: else one more example, by changing the others' rounding,
would take all their gradients out of the sum. So the loss of each example has a gradient of its own instead of one n-th
of a mean's, norms are taken in float64, and an example whose gradients are huge or not finite is computed by itself.
What remains is the order in which a kernel adds within one example, which may differ with the size of a batch.
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
#: From here on, a gradient's numbers are near enough to float32's end to be computed by themselves.
_HUGE: Final = 2.0**60
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
    trained = {name for name, p in network.named_parameters() if p.requires_grad}
    state = {n: t.clone() for n, t in network.state_dict().items() if n not in trained}
    received = [p.detach().clone() for p in network.parameters() if p.requires_grad]
    # The sum's gradient in each example's loss is 1, whatever the number of examples.
    module = GradSampleModule(network, loss_reduction="sum")
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
            _restore(network, state)
            steps.zero_grad()
            if len(rows):
                index = torch.from_numpy(rows).to(examples.x.device)
                x, y = examples.x[index], examples.y[index]
                _backward(task, module, x, y)
                _require_apart(network, len(rows))
                _compute_alone(task, module, x, y, steps)
            else:
                for p in steps.params:
                    p.grad_sample = torch.zeros((0, *p.shape), device=p.device, dtype=p.dtype)
            steps.step()
    finally:
        module.to_standard_module()
        _restore(network, state)


def _restore(network: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Set what no gradient changes to what it was: a forward pass may write examples into it, and no noise is on it.

    A trial before the run refuses a network that does so, but what a pass writes may depend on the examples.
    """
    if state:
        network.load_state_dict(state, strict=False)


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


def _backward(task: Task, module: GradSampleModule, x: torch.Tensor, y: torch.Tensor) -> None:
    """Set the parameters' gradients of each example's own loss."""
    logits = module(x)
    try:
        losses = torch.func.vmap(lambda row, label: task.loss(row[None], label[None]))(logits, y)
    except RuntimeError:  # a loss whose operations cannot be batched
        losses = torch.stack([task.loss(logits[i : i + 1], y[i : i + 1]) for i in range(len(y))])
    with warnings.catch_warnings():
        # Torch says of every network's first layer that its input has no gradient.
        warnings.filterwarnings("ignore", "Full backward hook", UserWarning)
        losses.sum().backward()  # type: ignore[no-untyped-call]


def _compute_alone(
    task: Task, module: GradSampleModule, x: torch.Tensor, y: torch.Tensor, steps: _OwnNoise
) -> None:
    """Compute the gradients of an example that has a huge number in them by itself, and clip them in float64.

    One that is not finite even so counts as a gradient of zeros. A clipped gradient changes the sum by C at most; NaN
    and infinity have no norm that could be clipped. One such example would make the update NaN, and the error that
    follows would say whether it was sampled: a release without noise.
    """
    largest = torch.stack([_rows(p.grad_sample).abs().amax(1) for p in steps.params]).amax(0)
    # Also true of NaN.
    huge = torch.nonzero(~(largest <= _HUGE)).flatten().tolist()
    if not huge:
        return
    together = [p.grad_sample for p in steps.params]
    for i in huge:
        for p in steps.params:
            p.grad_sample = None
        _backward(task, module, x[i : i + 1], y[i : i + 1])
        own = [p.grad_sample[0].double() for p in steps.params]
        norm = torch.stack([torch.linalg.vector_norm(g) for g in own]).norm()
        factor = min(1.0, steps.max_grad_norm / float(norm)) if norm.isfinite() and norm else 0.0
        for all_rows, g in zip(together, own, strict=True):
            # Not a product with 0, which NaN survives.
            all_rows[i] = (g * factor).to(all_rows.dtype) if factor else 0
    for p, all_rows in zip(steps.params, together, strict=True):
        p.grad_sample, p.grad = all_rows, None


def _rows(gradients: torch.Tensor) -> torch.Tensor:
    """``(n, *shape)`` as ``(n, numbers)``, also where n is 0."""
    return gradients.reshape(len(gradients), gradients.shape[1:].numel())


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

    def clip_and_accumulate(self) -> None:
        """Add the clipped gradients; their norms are taken in float64, in which no square overflows."""
        samples = self.grad_samples
        norms = torch.stack(
            [torch.linalg.vector_norm(_rows(g), dim=1, dtype=torch.float64) for g in samples]
        ).norm(dim=0)
        # Below C by more than float32 rounds.
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0).to(samples[0].dtype)
        for p, g in zip(self.params, samples, strict=True):
            p.summed_grad = torch.einsum("i,i...", factors, g)

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
