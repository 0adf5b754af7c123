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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedge.client.data.dataset import SiteData
from fedge.client.privacy.noise_calibration import Noise
from fedge.client.secagg import input_vector
from fedge.client.secagg.input_vector import SiteNoise
from fedge.client.training.local_steps import Examples, train
from fedge.server.aggregation.central_noise import CentralNoise
from fedge.server.aggregation.updates import Update
from fedge.server.secagg import decoding
from fedge.server.secagg.outcome import UnmaskedSum
from fedge.shared.config.federation import Config
from fedge.shared.config.privacy import CENTRAL
from fedge.shared.config.sections import TrainSection
from fedge.shared.crypto.keystream import KEY_BYTES
from fedge.shared.errors import ConfigError, brief
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.privacy.mechanisms import local
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.secagg import fixed_point, masking, vector_layout
from fedge.shared.secagg.vector_layout import Bounds
from fedge.shared.tasks.task import Task
from fedge.shared.wire.tensors import NDArrays
from fedge.simulations.audit.example_search import MAX_INPUTS, MAX_VALUES, Search


@dataclass(frozen=True)
class View:
    """What comes of the attack on one form of the update.

    Attributes:
        name: plain, masked, or the mechanism.
        layer: ``(k,)``, the layer's inputs as recovered.
        error: largest difference to the true ones.
        example: ``(n,)``, the example as recovered; None where it was not looked for.
        example_error: the same for the example.
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

    Raises:
        ConfigError: 201, local noise does not fit its grid.
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
    if preprocessing.learns(steps):
        found = preprocessing.statistics(steps, data.train_features)
        steps = preprocessing.fitted(steps, found.standardise())
    x = preprocessing.apply(steps, data.train_features[:1]).astype(np.float32)
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
    if not direct and example.size <= MAX_VALUES and truth.size <= MAX_INPUTS:
        look = Search(network, name, tuple(x.shape[1:]))
    made = []
    for kind, layer in views:
        again = look.example(layer) if look else None
        off = None if again is None else _distance(again, example)
        made.append(View(kind, layer, _distance(layer, truth), again, off))
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
                from fedge.client.privacy.dp_sgd import train_privately

                train_privately(self.task, network, self.examples, settings, noise, self.entropy)
        return _arrays(network)

    def masked(self, trained: NDArrays) -> NDArrays:
        """What the server makes of a masked vector if it decodes it as if it were a sum."""
        secure, received = self.config.secure_aggregation, self.received
        bounds = Bounds(
            secure.clipping_bound, secure.value_bound, secure.state_bound, secure.weight_cap
        )
        layout = vector_layout.of_training(
            _shapes(received), self._parameters, bounds, control=False
        )
        part = input_vector.training(layout, bounds, received, trained, 1, 0.0)
        vector = part.encode(secure.min_sites, os.urandom(KEY_BYTES))
        # The site's own mask, and one shared with each of the others.
        keys = [os.urandom(KEY_BYTES) for _ in range(secure.min_sites)]
        masks = [(key, 1 if i % 2 else -1) for i, key in enumerate(keys)]
        masking.add_masks(vector, masks, counters=layout.shape.counters)
        return layout.unflatten(
            fixed_point.decode(vector[: layout.values], layout.segments, secure.min_sites)
        )

    def noised_sum(self, trained: NDArrays) -> NDArrays:
        """What the server opens: this site's update among sites that have none, and the noise of them all."""
        section, received = self.config.privacy, self.received
        honest = self.config.secure_aggregation.min_sites - section.corrupt_sites
        noise = SiteNoise(
            section.clipping_bound, section.noise_multiplier or 0, honest, self.entropy
        )
        layout = vector_layout.of_noised(
            _shapes(received), self._parameters, section.clipping_bound
        )
        total = masking.zeros(layout.shape.length)
        for site in range(honest):
            own = trained if site == 0 else None
            part = input_vector.noised(layout, noise, received, own).encode(honest, b"")
            masking.add_vectors(total, [part], counters=layout.shape.counters)
        sites = tuple(f"site-{i}" for i in range(honest))
        # Before decoding reuses their memory.
        still = {name: a.copy() for name, a in received.items()}
        unmasked = decoding.noised_mean(
            layout, UnmaskedSum(sites, honest, honest, total), received
        ).mean
        return {name: unmasked[name] - still[name] for name in still}

    def noised_mean(self, trained: NDArrays) -> NDArrays:
        """What readers of the model compute from a first round with the server's noise, in which this site is alone."""
        config, received = self.config, self.received
        server = CentralNoise(config.privacy, config.run.rounds, received, entropy=self.entropy)
        update = Update("site-1", trained, 1, None)
        return server.release(1, [update], received, config.sites.count).result.mean

    def noised(self, trained: NDArrays) -> NDArrays:
        """What leaves a site that adds all of its noise itself.

        Raises:
            ConfigError: 201, the noise does not fit its grid.
        """
        section, received = self.config.privacy, self.received
        noise = section.clipping_bound, section.noise_multiplier or 0
        try:
            return local.noised_weights(received, trained, *noise, self.entropy)
        except ValueError as error:
            raise ConfigError(201, f"privacy: {error}") from None

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
    elif section.mechanism in CENTRAL:
        updates[section.mechanism] = _less(site.noised_mean(trained), received)
    elif section.mechanism == "local":
        updates["local"] = _less(site.noised(trained), received)
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
