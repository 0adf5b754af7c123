"""Noise that the server adds: it gets the updates without, and the model's consumers see the noised mean alone.

``central``: each site is sampled independently (Poisson sampling), its update is clipped and added, and every round has
new noise (McMahan et al. 2018, https://arxiv.org/abs/1710.06963), with a clipping bound that may follow a quantile of
the norms (Andrew et al. 2021). ``central-mf``: the sites participate round-robin, and the noise is correlated over the
rounds, so that it adds up to less in the model (``toeplitz``).

The sum over a round is divided by the number of sites that take part on average, which depends on who is registered
and not on who was sampled, who replied, or whose update was refused. So one site changes the mean by the clipping bound
over that number at most, whatever the others do; with the real number it could change the weight of all of them. A site
that joins later is sampled, or has its round, like the others, and from then on it is in that number. Who is registered
is no secret: the names stand in a release.

A round in which no site was sampled has its noise like any other: to leave it out would reveal that.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedge.server.aggregation.integer_grid import (
    IntegerGrid,
    difference,
    floating,
    grid,
    moved,
    norm,
    on_grid,
)
from fedge.server.aggregation.privacy_cost import central_spent, noise_multiplier_of
from fedge.server.aggregation.updates import Summed, Update
from fedge.shared.config.privacy import CENTRAL, PrivacySection
from fedge.shared.errors import RunError
from fedge.shared.privacy.mechanisms import adaptive_clipping, poisson_sampling, toeplitz
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.privacy.mechanisms.discrete_gaussian import table
from fedge.shared.privacy.mechanisms.gaussian import normal
from fedge.shared.wire.tensors import NDArrays

_log = logging.getLogger(__name__)

#: A bound that follows a quantile stays within these.
MIN_BOUND: Final = 1e-9
MAX_BOUND: Final = 1e9

_DAMAGED: Final = 504
_SLOT: Final = "central/"
#: Sites sampled on average for each standard deviation of the noise on their bits (Andrew et al., section 3).
_SITES_PER_SIGMA: Final = 20.0
#: Beyond it a noisy share tells nothing more.
_MAX_SHARE: Final = 10.0


@dataclass(frozen=True)
class Noised:
    """A round's mean with its noise, as the strategy gets it, and what the round's line says of it."""

    result: Summed
    facts: dict[str, Any]


def for_run(
    section: PrivacySection, rounds: int, current: NDArrays, evaluate_every: int = 1
) -> CentralNoise | None:
    """The server's noise of a run; None where the mechanism is another one."""
    if section.mechanism not in CENTRAL:
        return None
    return CentralNoise(section, rounds, current, evaluate_every=evaluate_every)


class CentralNoise:
    """The server's noise over the rounds of one run.

    Args:
        section: with a mechanism of the server's.
        rounds: of the whole run.
        current: the model, for its sizes.
        evaluate_every: rounds between evaluations, which cost too where they are noised.
        entropy: where the noise's random bits come from.
        system: where the sites' coins come from.
    """

    def __init__(
        self,
        section: PrivacySection,
        rounds: int,
        current: NDArrays,
        *,
        evaluate_every: int = 1,
        entropy: Entropy | None = None,
        system: random.SystemRandom | None = None,
    ) -> None:
        self._section, self._rounds, self._every = section, rounds, evaluate_every
        self._multiplier = noise_multiplier_of(section)
        self._size = sum(current[name].size for name in floating(current))
        self._entropy, self._system = entropy or Entropy(), system or random.SystemRandom()
        self.clipping_bound, self.done = section.clipping_bound, 0
        self._noise: toeplitz.Correlated | None = None
        if section.mechanism == "central-mf":
            self._correlate()

    def _correlate(self) -> None:
        rounds, apart = self._rounds, self._section.min_separation
        times = -(-rounds // apart)
        bands = self._section.bands or toeplitz.best_bands(rounds, times, apart)
        coefficients = toeplitz.coefficients(rounds, bands)
        self._multiplier *= toeplitz.sensitivity(coefficients, rounds, times, apart)
        self._noise = toeplitz.Correlated(coefficients, self._size)
        _log.info(
            "central-mf: noise correlated over %d rounds, error %.2f of independent noise's",
            bands,
            toeplitz.error(coefficients, rounds, times, apart),
        )
        if bands == 1 and rounds > 1:
            _log.warning(
                "central-mf: gains nothing here, as each round has noise of its own; set privacy.min-separation"
            )

    def invite(
        self, server_round: int, present: Iterable[str], registered: Sequence[str]
    ) -> list[str]:
        """Who is asked to train, in name order; possibly nobody.

        Args:
            server_round: from 1.
            present: sites that can be asked.
            registered: all sites of the run, in the order in which they came, which never changes: a site's turn is
                its place in it, so that two of its turns are ``min-separation`` rounds apart, whenever it came.
        """
        names = sorted(present)
        if self._noise is None:
            return poisson_sampling.poisson(names, self._section.sampling_rate, self._system)
        apart = self._section.min_separation
        turn = set(registered[(server_round - 1) % apart :: apart])
        return [name for name in names if name in turn]

    def expected(self, registered: int) -> float:
        """Sites that take part in a round on average: what every round's sum is divided by.

        With turns it is the same for each of them, though one may have a site more: noise that one round takes back
        must have the weight that it had when it was added.
        """
        if self._noise is None:
            return self._section.sampling_rate * registered
        return registered / self._section.min_separation

    def skip(self, server_round: int) -> dict[str, Any]:
        """A round that gives nothing out.

        Correlated noise goes on all the same: its sequence has one for each round's number, and none is used twice.
        """
        self._begin(server_round)
        if self._noise is not None:
            self._correlated_noise(grid(self.clipping_bound, self._multiplier, self._size))
        return self._facts(server_round, self.clipping_bound, self._multiplier, None)

    def release(
        self, server_round: int, updates: Sequence[Update], current: NDArrays, registered: int
    ) -> Noised:
        """The mean of a round with its noise; possibly of no updates.

        Args:
            server_round: one more than the last.
            updates: admitted ones. How many examples they are of plays no part.
            current: the round's model.
            registered: sites of the run, 1 or more.
        """
        self._begin(server_round)
        bound, expected = self.clipping_bound, self.expected(registered)
        multiplier, count_noise = self._multipliers(expected)
        integer_grid = grid(bound, multiplier, self._size)
        total, within = np.zeros(self._size, np.int64), 0
        for update in updates:
            change = difference(update.arrays, current)
            length = norm(change)
            within += length <= bound
            total += on_grid(change, length, integer_grid)
        total += self._sample_noise(integer_grid)
        fraction = None
        if count_noise is not None:
            fraction = self._follow(within, len(updates), count_noise, expected)
        change = np.multiply(total, integer_grid.step / expected, dtype=np.float64)
        mean = moved(current, change)
        return Noised(
            Summed(tuple(u.site for u in updates), mean, 1, None),
            {**self._facts(server_round, bound, multiplier, fraction), "expected_sites": expected},
        )

    def state(self) -> NDArrays:
        """What a checkpoint needs to hold, so that the run can go on.

        Past noise is as secret as the updates: who has it can take it off again. After the last round it is left out.
        """
        found: NDArrays = {
            f"{_SLOT}round": np.asarray(self.done, np.int64),
            f"{_SLOT}clipping-bound": np.asarray(self.clipping_bound, np.float64),
        }
        if self._noise is not None and self.done < self._rounds:
            found[f"{_SLOT}past-noise"] = self._noise.state()
        return found

    def restore(self, memory: Mapping[str, NDArray[Any]], done: int) -> None:
        """Go on after round ``done`` from what ``state`` gave then; other entries are passed over.

        Raises:
            RunError: 504, it is not that round's. Noise that begins again within a run is not what was accounted for.
        """
        if done == 0:
            return
        try:
            told = int(memory[f"{_SLOT}round"])
            if told != done:
                raise ValueError(f"round: must be {done}, got {told}")
            bound = float(memory[f"{_SLOT}clipping-bound"])
            if not 0 < bound < math.inf:
                raise ValueError(f"clipping-bound: must be above 0 and finite, got {bound}")
            if self._noise is not None and done < self._rounds:
                self._noise.restore(memory[f"{_SLOT}past-noise"], done)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                _DAMAGED, f"checkpoint: must hold the noise's state after round {done}, got {error}"
            ) from None
        self.clipping_bound, self.done = bound, done

    def _begin(self, server_round: int) -> None:
        if server_round != self.done + 1:
            raise ValueError(f"server_round: must be {self.done + 1}, got {server_round}")
        self.done = server_round

    def _multipliers(self, expected: float) -> tuple[float, float | None]:
        """Of the noise on the updates, and of that on the number of those within the bound, where that is asked for."""
        if self._section.clipping_quantile is None:
            return self._multiplier, None
        count = self._section.count_noise_multiplier
        if count is None:
            count = max(expected / _SITES_PER_SIGMA, self._multiplier)
        count = min(
            max(count, adaptive_clipping.MIN_COUNT_NOISE), adaptive_clipping.MAX_COUNT_NOISE
        )
        return adaptive_clipping.noise_multiplier_of_updates(self._multiplier, count), count

    def _sample_noise(self, integer_grid: IntegerGrid) -> NDArray[np.int64]:
        """The round's noise, in steps."""
        if self._noise is None:
            return table(integer_grid.stddev).sample(self._size, self._entropy)
        return self._correlated_noise(integer_grid)

    def _correlated_noise(self, integer_grid: IntegerGrid) -> NDArray[np.int64]:
        """Real numbers, of which each is a sum over rounds, so that they can be on no grid; rounded once they are made.

        The sum of updates is in whole steps, so this is the sum with its real noise, rounded: the steps are far wider
        than the gaps between floats, and rounding what is private tells nothing more.
        """
        if self._noise is None:
            raise ValueError("noise: must be correlated, got another")
        fresh = normal(self._size, self._entropy)
        fresh *= integer_grid.stddev * integer_grid.step
        return np.rint(self._noise.next(fresh) / integer_grid.step).astype(np.int64)

    def _follow(self, within: int, sites: int, count_noise: float, expected: float) -> float:
        """Move the bound for the next round; the noisy share that this round's had within it."""
        target, rate = self._section.clipping_quantile, self._section.clipping_learning_rate
        if target is None:
            raise ValueError("clipping-quantile: must be a number, got none")
        fraction = adaptive_clipping.noisy_fraction(
            within, sites, count_noise, self._entropy, expected
        )
        near = min(max(fraction, -_MAX_SHARE), _MAX_SHARE)
        bound = adaptive_clipping.update(self.clipping_bound, near, target, rate)
        self.clipping_bound = min(max(bound, MIN_BOUND), MAX_BOUND)
        return fraction

    def _facts(
        self, server_round: int, bound: float, multiplier: float, fraction: float | None
    ) -> dict[str, Any]:
        """What the round's line says; all of it is covered by the epsilon in it."""
        # With this round's, which comes after.
        evaluations = server_round // self._every
        if server_round == self._rounds:
            evaluations = -(-server_round // self._every)
        return {
            "clipping_bound": bound,
            "fraction_within": fraction,
            "noise_multiplier": multiplier,
            "epsilon": central_spent(self._section, server_round, evaluations),
        }
