"""Canaries: contributions that are put in or left out by a coin each, and guessed from what the mechanism gives out.

Every canary is a direction of its own, drawn at random, so that two of them have next to nothing in common. The release
goes through the code of a real run: with ``distributed`` a canary is the update of a site, clipped, rounded, noised and
added modulo 2^32; with ``example`` it is a training example whose gradient is the canary, in one full-batch step of
DP-SGD; with ``off`` the same step without either. A canary is twice as long as the clipping bound, so that what clips
is audited too.

A sum with distributed noise is promised to protect if a certain number of honest sites is in it, whoever else is. The
audit takes the worst such sum: as many sites as that add noise, and the others, as corrupt ones may, add none. A site
that is out adds zeros; an honest one adds its noise to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedge.client import contribution
from fedge.client.contribution import SiteNoise
from fedge.client.private_release import Noise, release_of
from fedge.client.train import Examples, train
from fedge.server.secagg import mean
from fedge.server.secagg.outcome import Opened
from fedge.shared.config import Config, TrainSection
from fedge.shared.errors import ConfigError, SiteError
from fedge.shared.privacy import accounting, distributed
from fedge.shared.privacy.accounting import Release
from fedge.shared.privacy.discrete_gaussian import MIN_SIGMA
from fedge.shared.privacy.entropy import Entropy
from fedge.shared.secagg import layout, masking
from fedge.shared.tasks.task import Task
from fedge.simulations.audit.bound import lower_bound

#: How often a mechanism that keeps its promise may be told as broken.
P: Final = 0.05
#: A site's own where its policy names none.
DELTA: Final = 1e-5
#: Least share of the noise that is left by the check of the check.
LEAST_FACTOR: Final = 0.01

_LONGER: Final = 2.0
_NAME: Final = "canary"
#: Vectors that are added at a time.
_GROUP: Final = 8

Verdict: TypeAlias = Literal["unprotected", "caught", "not contradicted"]
#: Told of what is being done, how much of it is done, and of how much.
Listener: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sizes:
    """How large an audit is; fixed before anything is seen.

    Attributes:
        canaries: each in by a coin of its own.
        guesses: half of them for in, half for out; even, up to as many as canaries.
        parameters: coordinates of the release.

    Raises:
        ValueError: an attribute is out of its range.
    """

    canaries: int = 1000
    guesses: int = 400
    parameters: int = 100_000

    def __post_init__(self) -> None:
        if not 2 <= self.guesses <= self.canaries or self.guesses % 2:
            raise ValueError(f"guesses: must be even and 2 to {self.canaries}, got {self.guesses}")
        if self.parameters < 1:
            raise ValueError(f"parameters: must be 1 or more, got {self.parameters}")


@dataclass(frozen=True)
class Finding:
    """What an audit came to.

    Attributes:
        mechanism: that was audited.
        sizes: of the audit.
        noise_multiplier: as configured; None without noise.
        noise_factor: share of the noise that was left, 1 but in a check of the check.
        honest: sites that added noise (distributed), else 0.
        delta: of claim and bound.
        claim: epsilon that the accountant gives this release; None without noise.
        scores: ``(canaries,)``, about 1 for who is in and 0 for who is out.
        inside: ``(canaries,)``, which were in.
        correct: guesses that were right.
        bound: what they prove, with a confidence of 1 - ``P``.
        most: what all of them right would prove.
    """

    mechanism: str
    sizes: Sizes
    noise_multiplier: float | None
    noise_factor: float
    honest: int
    delta: float
    claim: float | None
    scores: NDArray[np.float64]
    inside: NDArray[np.bool_]
    correct: int
    bound: float
    most: float

    @property
    def verdict(self) -> Verdict:
        """Whether the bound contradicts the claim."""
        if self.claim is None:
            return "unprotected"
        return "caught" if self.bound > self.claim else "not contradicted"

    @property
    def could_contradict(self) -> bool:
        """Whether any outcome could have been above the claim."""
        return self.claim is not None and self.most > self.claim


@dataclass(frozen=True)
class _Canaries:
    """Directions by number, made anew when needed: together they would take 400 MB."""

    seed: int
    inside: NDArray[np.bool_]
    size: int

    def unit(self, index: int) -> NDArray[np.float32]:
        """A direction, ``(size,)``, of length 1."""
        drawn = np.random.default_rng([self.seed, index]).standard_normal(self.size, np.float32)
        drawn /= np.linalg.norm(drawn)
        return drawn

    def scores(self, release: NDArray[np.float64], told: Callable[[int], None]) -> Iterator[float]:
        """Inner product of each direction and the release."""
        for index in range(self.inside.size):
            told(index)
            yield float(self.unit(index) @ release)


def audit(
    config: Config,
    task: Task,
    sizes: Sizes,
    entropy: Entropy,
    listener: Listener,
    *,
    noise_factor: float = 1.0,
) -> Finding:
    """Audit one release of the mechanism that a configuration names.

    Args:
        config: names mechanism, noise and clipping bound, and with ``distributed`` how many sites are honest.
        task: of the configuration; its network is not used.
        sizes: of the audit.
        entropy: of coins, directions and noise.
        listener: of the progress.
        noise_factor: what the noise's deviation is multiplied by, while the claim stays: an audit that is of any use
            tells less noise than promised.

    Raises:
        ConfigError: 201, the noise does not fit the grid or the ring of a secure sum.
        ValueError: the factor is out of its range.
    """
    if not LEAST_FACTOR <= noise_factor <= 1:
        raise ValueError(f"noise_factor: must be {LEAST_FACTOR:g} to 1, got {noise_factor:g}")
    section = config.privacy
    bits = np.frombuffer(entropy.bytes(sizes.canaries), np.uint8) & 1
    seed = int.from_bytes(entropy.bytes(16), "little")
    canaries = _Canaries(seed, bits.astype(np.bool_), sizes.parameters)
    honest, claim = 0, None
    if section.mechanism == "distributed":
        honest = config.secure_aggregation.min_sites - config.privacy.corrupt_sites
        noise = SiteNoise(section.clipping_bound, section.noise_multiplier or 0, honest, entropy)
        release = _opened_sum(canaries, noise, noise_factor, listener)
        claim = accounting.epsilon([Release(noise.noise_multiplier)], DELTA)
    elif section.mechanism == "example":
        listener("one step of DP-SGD", 0, 1)
        terms = Noise(section.noise_multiplier or 0, section.clipping_bound)
        release, given_out = _private_step(canaries, task, terms, noise_factor, entropy)
        claim = accounting.epsilon([given_out], DELTA)
    else:
        listener("one plain step", 0, 1)
        release = _plain_step(canaries, task, section.clipping_bound)
    release /= section.clipping_bound
    scores = np.fromiter(
        canaries.scores(release, lambda done: listener("scores", done, sizes.canaries)),
        np.float64,
        sizes.canaries,
    )
    correct = guessed_right(scores, canaries.inside, sizes.guesses)
    m, r = sizes.canaries, sizes.guesses
    return Finding(
        section.mechanism, sizes, section.noise_multiplier, noise_factor, honest, DELTA, claim,
        scores, canaries.inside, correct,
        bound=lower_bound(m, r, correct, DELTA, P), most=lower_bound(m, r, r, DELTA, P),
    )  # fmt: skip


def guessed_right(scores: NDArray[np.float64], inside: NDArray[np.bool_], guesses: int) -> int:
    """How many guesses are right: the highest scores are guessed in, as many of the lowest out, the rest not at all."""
    order, half = np.argsort(scores, kind="stable"), guesses // 2
    return int(inside[order[-half:]].sum() + (~inside[order[:half]]).sum())


def _opened_sum(
    canaries: _Canaries, noise: SiteNoise, factor: float, listener: Listener
) -> NDArray[np.float64]:
    """What the server computes from the sum over all sites, made the sum again.

    Raises:
        ConfigError: 201, the noise does not fit.
    """
    size, count = canaries.size, max(canaries.inside.size, noise.honest)
    of = layout.of_noised({_NAME: (size,)}, [_NAME], noise.clipping_bound)
    still = {_NAME: np.zeros(size, np.float32)}
    total, waiting = masking.zeros(of.length), []
    try:
        deviation = distributed.deviation(noise.noise_multiplier, size, noise.honest, count)
    except ValueError as error:
        raise ConfigError(201, f"privacy: {error}") from None
    for site in range(count):
        listener("sites add up", site, count)
        trained = still
        if site < canaries.inside.size and canaries.inside[site]:
            length = np.float32(_LONGER * noise.clipping_bound)
            trained = {_NAME: length * canaries.unit(site)}
        part = contribution.noised(of, noise, still, trained)
        if site >= noise.honest:
            part = replace(part, noise=_cut(noise, MIN_SIGMA))
        elif factor != 1:
            part = replace(part, noise=_cut(noise, factor * deviation))
        try:
            waiting.append(part.encode(count, b""))
        except SiteError as error:
            raise ConfigError(201, error.message) from None
        if len(waiting) == _GROUP or site == count - 1:
            masking.add_vectors(total, waiting)
            waiting = []
    sites = tuple(f"site-{i}" for i in range(count))
    summed = mean.noised_mean(of, Opened(sites, count, count, total), still)
    found: NDArray[np.float64] = summed.mean[_NAME].astype(np.float64) * count
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
    canaries: _Canaries, task: Task, noise: Noise, factor: float, entropy: Entropy
) -> tuple[NDArray[np.float64], Release]:
    """The sum of the clipped gradients with its noise, and what accountants are told of it."""
    # Only here: Opacus takes seconds to import.
    from fedge.client.private_training import train_privately

    network, examples, settings = _linear(canaries, _LONGER * noise.clipping_bound)
    less = replace(noise, noise_multiplier=factor * noise.noise_multiplier)
    train_privately(_with_mean(task), network, examples, settings, less, entropy)
    return _moved(network, examples), release_of(noise, settings, len(examples.y))


def _plain_step(canaries: _Canaries, task: Task, length: float) -> NDArray[np.float64]:
    network, examples, settings = _linear(canaries, length)
    train(_with_mean(task), network, examples, [np.arange(len(examples.y))], settings)
    return _moved(network, examples)


def _linear(canaries: _Canaries, length: float) -> tuple[nn.Linear, Examples, TrainSection]:
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
