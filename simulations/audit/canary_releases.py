"""What mechanisms give out of canaries, through the code of a real run.

With ``distributed`` a canary is the update of a site, clipped, rounded, noised and added modulo 2^32; with ``example``
it is a training example whose gradient is the canary, in one full-batch step of DP-SGD; with ``off`` the same step
without either. For ``central``, ``central-mf`` and ``local`` see ``canary_rounds``.

A sum with distributed noise is promised to protect if a certain number of honest sites is in it, whichever others are.
The audit takes the worst such sum: as many sites as that add noise, and the others add none, as corrupt ones may. A
site that is out adds zeros; an honest one adds its noise to them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedge.client.privacy.noise_calibration import Noise, release_of
from fedge.client.secagg import input_vector
from fedge.client.secagg.input_vector import SiteNoise
from fedge.client.training.local_steps import Examples, train
from fedge.server.secagg import decoding
from fedge.server.secagg.outcome import UnmaskedSum
from fedge.shared.config.federation import Config
from fedge.shared.config.privacy import CENTRAL
from fedge.shared.config.sections import TrainSection
from fedge.shared.errors import ConfigError, SiteError
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.mechanisms import distributed
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.discrete_gaussian import MIN_SIGMA
from fedge.shared.secagg import masking, vector_layout
from fedge.shared.tasks.task import Task
from fedge.simulations.audit import canary_rounds
from fedge.simulations.audit.canary_vectors import LONGER, NAME, Canaries, Listener

#: Vectors that are added at a time.
_GROUP: Final = 8


@dataclass(frozen=True)
class Given:
    """What came out of the canaries, and what is claimed for it.

    Attributes:
        scores: ``(canaries,)``, about 1 for who is in and 0 for who is out.
        release: what accountants are told of it; None without noise.
        honest: sites that added noise (distributed), else 0.
        rounds: that were audited together.
    """

    scores: NDArray[np.float64]
    release: Release | None = None
    honest: int = 0
    rounds: int = 1


def given_out(
    config: Config,
    task: Task,
    canaries: Canaries,
    factor: float,
    entropy: Entropy,
    listener: Listener,
) -> Given:
    """Run a configuration's mechanism over canaries.

    Args:
        config: names mechanism, noise and clipping bound.
        task: of the configuration; its network is not used.
        canaries: with their coins.
        factor: what the noise's deviation is multiplied by.
        entropy: of the noise.
        listener: of the progress.

    Raises:
        ConfigError: 201, the noise does not fit the grid or the ring of a secure sum.
    """
    section = config.privacy
    noise = Noise(section.noise_multiplier or 0, section.clipping_bound)
    told, honest, rounds = Release(noise.noise_multiplier), 0, 1
    if section.mechanism == "local":
        found = canary_rounds.local_scores(canaries, section, factor, entropy, listener)
        return Given(found, told)
    if section.mechanism in CENTRAL:
        rounds = config.run.rounds if section.mechanism == "central-mf" else 1
        release = canary_rounds.central(canaries, section, rounds, factor, entropy, listener)
    elif section.mechanism == "distributed":
        honest = config.secure_aggregation.min_sites - section.corrupt_sites
        own = SiteNoise(section.clipping_bound, noise.noise_multiplier, honest, entropy)
        release = _opened_sum(canaries, own, factor, listener)
    elif section.mechanism == "example":
        listener("one step of DP-SGD", 0, 1)
        release, told = _private_step(canaries, task, noise, factor, entropy)
    else:
        listener("one plain step", 0, 1)
        release = _plain_step(canaries, task, section.clipping_bound)
    scores = canaries.scores(release / section.clipping_bound, listener)
    return Given(scores, None if section.mechanism == "off" else told, honest, rounds)


def _opened_sum(
    canaries: Canaries, noise: SiteNoise, factor: float, listener: Listener
) -> NDArray[np.float64]:
    """What the server computes from the sum over all sites, made the sum again.

    Raises:
        ConfigError: 201, the noise does not fit.
    """
    size, count = canaries.size, max(canaries.inside.size, noise.honest)
    layout = vector_layout.of_noised({NAME: (size,)}, [NAME], noise.clipping_bound)
    still = canaries.still()
    total, waiting = masking.zeros(layout.shape.length), []
    try:
        deviation = distributed.stddev(noise.noise_multiplier, size, noise.honest, count)
    except ValueError as error:
        raise ConfigError(201, f"privacy: {error}") from None
    for site in range(count):
        listener("sites add up", site, count)
        trained = still
        if site < canaries.inside.size and canaries.inside[site]:
            trained = canaries.update(site, noise.clipping_bound)
        part = input_vector.noised(layout, noise, still, trained)
        if site >= noise.honest:
            part = replace(part, noise=_cut(noise, MIN_SIGMA))
        elif factor != 1:
            part = replace(part, noise=_cut(noise, factor * deviation))
        try:
            waiting.append(part.encode(count, b""))
        except SiteError as error:
            raise ConfigError(201, error.message) from None
        if len(waiting) == _GROUP or site == count - 1:
            masking.add_vectors(total, waiting, counters=layout.shape.counters)
            waiting = []
    sites = tuple(f"site-{i}" for i in range(count))
    summed = decoding.noised_mean(layout, UnmaskedSum(sites, count, count, total), still)
    found: NDArray[np.float64] = summed.mean[NAME].astype(np.float64) * count
    return found


def _cut(noise: SiteNoise, left: float) -> _Cut:
    return _Cut(noise.clipping_bound, noise.noise_multiplier, noise.honest, noise.entropy, left)


@dataclass(frozen=True)
class _Cut(SiteNoise):
    """A site that adds another noise than it should.

    Attributes:
        left: its standard deviation, in steps; at ``MIN_SIGMA`` all but none.
    """

    left: float = MIN_SIGMA

    def encode(self, update: NDArray[Any], sites: int) -> NDArray[np.uint32]:  # noqa: ARG002
        """The update with that noise, in the ring."""
        return distributed.encode(update, self.clipping_bound, self.left, self.entropy)


def _private_step(
    canaries: Canaries, task: Task, noise: Noise, factor: float, entropy: Entropy
) -> tuple[NDArray[np.float64], Release]:
    """The sum of the clipped gradients with its noise, and what accountants are told of it."""
    # Only here: Opacus takes seconds to import.
    from fedge.client.privacy.dp_sgd import train_privately

    network, examples, settings = _linear(canaries, LONGER * noise.clipping_bound)
    less = replace(noise, noise_multiplier=factor * noise.noise_multiplier)
    train_privately(_with_mean(task), network, examples, settings, less, entropy)
    return _moved(network, examples), release_of(noise, settings, len(examples.y))


def _plain_step(canaries: Canaries, task: Task, length: float) -> NDArray[np.float64]:
    network, examples, settings = _linear(canaries, length)
    train(_with_mean(task), network, examples, [np.arange(len(examples.y))], settings)
    return _moved(network, examples)


def _linear(canaries: Canaries, length: float) -> tuple[nn.Linear, Examples, TrainSection]:
    """A network whose gradient on an example is the example, and the canaries that are in as examples."""
    with torch.random.fork_rng(devices=[]):
        network = nn.Linear(canaries.size, 1, bias=False)
    nn.init.zeros_(network.weight)
    rows = np.flatnonzero(canaries.inside)
    x = np.empty((len(rows), canaries.size), np.float32)
    for place, index in enumerate(rows):
        np.multiply(canaries.unit(int(index)), np.float32(length), out=x[place])
    given = {"batch-size": max(len(rows), 1), "local-steps": 1, "learning-rate": 1.0}
    examples = Examples(torch.from_numpy(x), torch.zeros(len(rows), dtype=torch.int64))
    return network, examples, TrainSection.model_validate(given)


def _with_mean(task: Task) -> Task:
    """The task with a loss of which each example's gradient is its input."""
    return replace(task, loss=lambda logits, _: logits.mean())


def _moved(network: nn.Linear, examples: Examples) -> NDArray[np.float64]:
    """The sum of gradients that a step of length 1 took from weights of 0."""
    moved: NDArray[np.float64] = network.weight.detach().numpy()[0].astype(np.float64)
    return -moved * len(examples.y)
