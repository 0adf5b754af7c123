"""What one update gives away: a training example, computed from the weights that a site sends back.

A linear layer computes z = W x + b. On a batch of one the gradient of row i of W is the gradient of b_i times x, so
that every row over its bias tells x (Phong et al. 2018, https://doi.org/10.1109/TIFS.2017.2787987); all rows together,
by least squares, tell it best. The server knows the step size and the weights that it sent, and nothing is guessed.

Where other layers come first, x is what those make of the example. Whoever has the weights then looks for the example
of which they make just that: Levenberg and Marquardt's least squares, from a few starts.

The update comes from the site's own training, in plain, under masks, and under the configured mechanism.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedge.client import contribution
from fedge.client.contribution import SiteNoise
from fedge.client.data import SiteData
from fedge.client.private_release import Noise
from fedge.client.train import Examples, train
from fedge.server.secagg import mean
from fedge.server.secagg.outcome import Opened
from fedge.shared import preprocess
from fedge.shared.arrays import NDArrays
from fedge.shared.config import Config, TrainSection
from fedge.shared.errors import brief
from fedge.shared.privacy.entropy import Entropy
from fedge.shared.secagg import encoding, layout, masking
from fedge.shared.secagg.layout import Bounds
from fedge.shared.tasks.task import Task

#: Values of an example, and inputs of the layer, up to which the example itself is looked for.
_MOST_VALUES: Final = 256
_MOST_INPUTS: Final = 2048
_STARTS: Final = 4
_TURNS: Final = 15
#: From this residual on, as a share of what is wanted, there is no such example, and two starts are enough.
_HOPELESS: Final = 0.5
#: A fit this close, in the layer's inputs, is the example.
_CLOSE: Final = 1e-4


@dataclass(frozen=True)
class View:
    """What comes of the attack on one form of the update.

    Attributes:
        name: plain, masked, or the mechanism.
        layer: ``(k,)``, the layer's inputs as recovered.
        error: largest difference to the true ones.
        example: ``(n,)``, the example as recovered; None where it was not looked for.
        example_error: likewise.
    """

    name: str
    layer: NDArray[np.float64]
    error: float
    example: NDArray[np.float64] | None = None
    example_error: float | None = None


@dataclass(frozen=True)
class Inversion:
    """One example, and what is recovered of it.

    Attributes:
        layer: name of the network's first linear layer.
        direct: whether the example itself is the layer's input.
        truth: ``(k,)``, the layer's inputs.
        example: ``(n,)``, the example as the network takes it.
        views: plain first.
        reason: why the attack does not apply; then there is nothing else.
    """

    layer: str = ""
    direct: bool = False
    truth: NDArray[np.float64] | None = None
    example: NDArray[np.float64] | None = None
    views: tuple[View, ...] = ()
    reason: str = ""


def from_gradients(weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[np.float64]:
    """The input of a linear layer from its gradients on a batch of one, or any multiple of both.

    Args:
        weight: ``(rows, k)``.
        bias: ``(rows,)``.

    Returns:
        ``(k,)``; zeros where no row has a gradient.
    """
    exact = bias.astype(np.float64)
    return np.asarray(exact @ weight.astype(np.float64) / max(float(exact @ exact), 1e-300))


def invert(config: Config, task: Task, data: SiteData, entropy: Entropy) -> Inversion:
    """Train on the first example of a site, in one step, and attack what is sent.

    Args:
        config: its step size, bounds and mechanism; the step is one of plain SGD.
        task: the network is made as at a run's beginning.
        data: of the site.
        entropy: of the mechanism's noise.
    """
    threads = torch.get_num_threads()
    # As a site does; more would only wait for each other over so little work.
    torch.set_num_threads(config.run.threads)
    try:
        return _inverted(config, task, data, entropy)
    finally:
        torch.set_num_threads(threads)


def _inverted(config: Config, task: Task, data: SiteData, entropy: Entropy) -> Inversion:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        network = task.network()
    steps = task.preprocessing
    if preprocess.learns(steps):
        found = preprocess.statistics(steps, data.train_features)
        steps = preprocess.fitted(steps, found.standardise())
    x = preprocess.apply(steps, data.train_features[:1]).astype(np.float32)
    examples = Examples(torch.from_numpy(x), torch.from_numpy(data.train_labels[:1]))
    try:
        name, inputs = _first_linear(network, examples.x)
        if not name:
            return Inversion(
                reason="The network has no linear layer with a bias, so the closed form does not apply."
            )
        views = _views(_Site(config, task, network, examples, entropy), name)
    except ValueError as error:
        # BatchNorm, for one, trains on no single example.
        return Inversion(reason=f"The network does not train on a single example: {brief(error)}")
    truth, example = inputs[0].double().numpy(), x.reshape(-1).astype(np.float64)
    direct = truth.shape == example.shape and bool(np.array_equal(truth, example))
    look = None
    if not direct and example.size <= _MOST_VALUES and truth.size <= _MOST_INPUTS:
        look = _Search(network, name, tuple(x.shape[1:]))
    made = []
    for kind, layer in views:
        again = look.example(layer) if look else None
        made.append(
            View(
                kind, layer, _distance(layer, truth),
                again, None if again is None else _distance(again, example),
            )
        )  # fmt: skip
    return Inversion(name, direct, truth, example, tuple(made))


def _distance(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.abs(a - b).max())


def _first_linear(network: nn.Module, x: Tensor) -> tuple[str, Tensor]:
    """Name and input ``(b, k)`` of the first linear layer that the network comes to; no name where there is none."""
    found: list[tuple[str, Tensor]] = []
    hooks = []
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and layer.bias is not None:

            def note(_: nn.Module, given: tuple[Tensor, ...], name: str = name) -> None:
                found.append((name, given[0]))

            hooks.append(layer.register_forward_pre_hook(note))
    network.train()
    try:
        network(x)
    finally:
        for hook in hooks:
            hook.remove()
    name, given = found[0] if found else ("", x)
    return (name, given.detach()) if given.ndim == 2 else ("", x)


@dataclass(frozen=True)
class _Site:
    """A site with one example, and what it sends."""

    config: Config
    task: Task
    network: nn.Module
    examples: Examples
    entropy: Entropy

    @property
    def received(self) -> NDArrays:
        return _arrays(self.network)

    def trained(self, noise: Noise | None = None) -> NDArrays:
        """The weights after one step of SGD, by DP-SGD where noise is given."""
        settings = TrainSection.model_validate(
            {"learning-rate": self.config.train.learning_rate, "batch-size": 1, "local-steps": 1}
        )
        network = copy.deepcopy(self.network)
        with torch.random.fork_rng(devices=[]):
            if noise is None:
                train(self.task, network, self.examples, [np.zeros(1, np.int64)], settings)
            else:
                from fedge.client.private_training import train_privately

                train_privately(self.task, network, self.examples, settings, noise, self.entropy)
        return _arrays(network)

    def masked(self, trained: NDArrays) -> NDArrays:
        """What the server makes of a masked vector if it decodes it as if it were a sum."""
        secure, received = self.config.secure_aggregation, self.received
        bounds = Bounds(
            secure.clipping_bound, secure.value_bound, secure.state_bound, secure.weight_cap
        )
        of = layout.of_training(_shapes(received), self._parameters, bounds, control=False)
        part = contribution.training(of, bounds, received, trained, 1, 0.0)
        vector = part.encode(secure.min_sites, os.urandom(masking.KEY_BYTES))
        # The site's own mask, and one shared with each of the others.
        keys = [os.urandom(masking.KEY_BYTES) for _ in range(secure.min_sites)]
        masking.add_masks(vector, [(key, 1 if i % 2 else -1) for i, key in enumerate(keys)])
        return of.unflatten(encoding.decode(vector[: of.values], of.segments, secure.min_sites))

    def noised_sum(self, trained: NDArrays) -> NDArrays:
        """What the server opens: this site's update among sites that have none, and the noise of them all."""
        section, received = self.config.privacy, self.received
        honest = self.config.secure_aggregation.min_sites - section.corrupt_sites
        noise = SiteNoise(
            section.clipping_bound, section.noise_multiplier or 0, honest, self.entropy
        )
        of = layout.of_noised(_shapes(received), self._parameters, section.clipping_bound)
        total = masking.zeros(of.length)
        for site in range(honest):
            own = trained if site == 0 else None
            part = contribution.noised(of, noise, received, own).encode(honest, b"")
            masking.add_vectors(total, [part])
        sites = tuple(f"site-{i}" for i in range(honest))
        # Before decoding reuses their memory.
        still = {name: a.copy() for name, a in received.items()}
        opened = mean.noised_mean(of, Opened(sites, honest, honest, total), received).mean
        return {name: opened[name] - still[name] for name in still}

    @property
    def _parameters(self) -> list[str]:
        return [name for name, p in self.network.named_parameters() if p.requires_grad]


def _views(site: _Site, name: str) -> list[tuple[str, NDArray[np.float64]]]:
    """The layer's inputs as each form of the update tells them."""
    trained, received, section = site.trained(), site.received, site.config.privacy
    updates = {"plain": _less(trained, received), "masked": site.masked(trained)}
    if section.mechanism == "example":
        noise = Noise(section.noise_multiplier or 0, section.clipping_bound)
        updates["example"] = _less(site.trained(noise), received)
    elif section.mechanism == "distributed":
        updates["distributed"] = site.noised_sum(trained)
    prefix = f"{name}." if name else ""
    return [
        (kind, from_gradients(update[f"{prefix}weight"], update[f"{prefix}bias"]))
        for kind, update in updates.items()
    ]


def _less(trained: Mapping[str, NDArray[Any]], received: Mapping[str, NDArray[Any]]) -> NDArrays:
    return {name: trained[name] - a for name, a in received.items()}


def _arrays(network: nn.Module) -> NDArrays:
    """Floating-point tensors, in the network's order."""
    state = network.state_dict().items()
    return {name: t.detach().numpy().copy() for name, t in state if t.is_floating_point()}


def _shapes(arrays: Mapping[str, NDArray[Any]]) -> dict[str, tuple[int, ...]]:
    return {name: a.shape for name, a in arrays.items()}


class _Search:
    """Looks for the example of which a network's first layers make given values.

    Args:
        network: with weights as received.
        name: of the layer that takes the values.
        shape: of an example.
    """

    def __init__(self, network: nn.Module, name: str, shape: Sequence[int]) -> None:
        self._network = copy.deepcopy(network).double()
        for p in self._network.parameters():
            p.requires_grad_(False)
        self._name, self._shape = name, tuple(shape)

    def example(self, wanted: NDArray[np.float64]) -> NDArray[np.float64]:
        """The best fit of a few starts at random, ``(n,)``."""
        target, size = torch.from_numpy(wanted), int(np.prod(self._shape))
        generator = np.random.default_rng(0)
        best, least = np.zeros(size), np.inf
        for start in range(_STARTS):
            first = torch.from_numpy(generator.random(size))
            found, distance = _fit(self._made, first, target)
            if distance < least:
                best, least = found.numpy(), distance
            if least < _CLOSE or (start and least > _HOPELESS * float(target.norm())):
                break
        return best

    def _made(self, x: Tensor) -> Tensor:
        """Rows ``(b, n)`` to the layer's inputs ``(b, k)``."""
        kept: list[Tensor] = []
        layer = self._network.get_submodule(self._name)
        hook = layer.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
        try:
            self._network(x.reshape(-1, *self._shape))
        finally:
            hook.remove()
        return kept[0]


def _fit(made: Callable[[Tensor], Tensor], x: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Levenberg and Marquardt's least squares from one start: where it ends, and how far off that is."""
    damping, left = 1.0, made(x[None])[0] - target
    for _ in range(_TURNS):
        # A row for each value that is wanted: its gradient is a row of the Jacobian.
        rows = x.repeat(target.numel(), 1).requires_grad_()
        slopes = torch.autograd.grad(made(rows).diagonal().sum(), rows)[0]
        square, down = slopes.T @ slopes, slopes.T @ left
        while damping < 1e8:
            step = torch.linalg.solve(square + damping * torch.eye(x.numel(), dtype=x.dtype), down)
            there = made((x - step)[None])[0] - target
            if there.norm() < left.norm():
                break
            damping *= 4
        else:
            break
        gain = float(left.norm() - there.norm())
        x, left, damping = x - step, there, damping / 5
        if gain < 1e-9 * float(left.norm()) or float(left.norm()) < 1e-9:
            break
    return x, float(left.norm())
