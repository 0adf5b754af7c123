"""Canaries: contributions that are put in or left out by a coin each, and guessed from what the mechanism gives out.

Every canary is a direction of its own, drawn at random, so that two of them have next to nothing in common. What comes
out of them (``canary_releases``) goes through the code of a real run. A canary is twice as long as the clipping bound,
so that what clips is audited too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.shared.config.federation import Config
from fedge.shared.config.privacy import Unit
from fedge.shared.privacy.accounting import epsilon
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.tasks.task import Task
from fedge.simulations.audit.bound import MIN_FACTOR, lower_bound
from fedge.simulations.audit.canary_releases import given_out
from fedge.simulations.audit.canary_rounds import parameters
from fedge.simulations.audit.canary_vectors import Canaries, Listener

#: How often a mechanism that keeps its promise may be told as broken.
P: Final = 0.05
#: A site's own where its policy names none.
DELTA: Final = 1e-5

Verdict: TypeAlias = Literal["unprotected", "caught", "not contradicted"]


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
        claim: epsilon that the accountant gives what was audited; None without noise.
        scores: ``(canaries,)``, about 1 for who is in and 0 for who is out.
        inside: ``(canaries,)``, which were in.
        correct: guesses that were right.
        bound: what they prove, with a confidence of 1 - ``P``.
        most: what all of them right would prove.
        rounds: that claim and bound are of; the whole run's with ``central-mf``.
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
    rounds: int = 1

    @property
    def unit(self) -> Unit:
        """What a canary is, and what epsilon is of."""
        return "example" if self.mechanism in ("off", "example") else "site"

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


def audit(
    config: Config,
    task: Task,
    sizes: Sizes,
    entropy: Entropy,
    listener: Listener,
    *,
    noise_factor: float = 1.0,
) -> Finding:
    """Audit the mechanism that a configuration names: one release, or a whole run with ``central-mf``.

    Args:
        config: names mechanism, noise and clipping bound, and with ``distributed`` how many sites are honest.
        task: of the configuration; its network is not used.
        sizes: of the audit.
        entropy: of coins, directions and noise.
        listener: of the progress.
        noise_factor: what the noise's deviation is multiplied by, while the claim stays: an audit that is of any use
            tells less noise than promised.

    Raises:
        ConfigError: 201, the noise does not fit its grid, or the ring of a secure sum.
        ValueError: the factor is out of its range.
    """
    if not MIN_FACTOR <= noise_factor <= 1:
        raise ValueError(f"noise_factor: must be {MIN_FACTOR:g} to 1, got {noise_factor:g}")
    section = config.privacy
    sizes = replace(sizes, parameters=parameters(section, config.run.rounds, sizes.parameters))
    bits = np.frombuffer(entropy.bytes(sizes.canaries), np.uint8) & 1
    seed = int.from_bytes(entropy.bytes(16), "little")
    canaries = Canaries(seed, bits.astype(np.bool_), sizes.parameters)
    found = given_out(config, task, canaries, noise_factor, entropy, listener)
    claim = None if found.release is None else epsilon.epsilon([found.release], DELTA)
    correct = guessed_right(found.scores, canaries.inside, sizes.guesses)
    m, r = sizes.canaries, sizes.guesses
    return Finding(
        section.mechanism, sizes, section.noise_multiplier, noise_factor, found.honest, DELTA,
        claim, found.scores, canaries.inside, correct,
        bound=lower_bound(m, r, correct, DELTA, P), most=lower_bound(m, r, r, DELTA, P),
        rounds=found.rounds,
    )  # fmt: skip


def guessed_right(scores: NDArray[np.float64], inside: NDArray[np.bool_], guesses: int) -> int:
    """How many guesses are right: the highest scores are guessed in, as many of the lowest out, the rest not at all."""
    order, half = np.argsort(scores, kind="stable"), guesses // 2
    return int(inside[order[-half:]].sum() + (~inside[order[:half]]).sum())
