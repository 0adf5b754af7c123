"""The canaries' directions, and what they make of a release."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.shared.wire.tensors import NDArrays

#: Length of a canary, by the clipping bound, so that what clips is audited too.
LONGER: Final = 2.0
#: The only tensor of an update.
NAME: Final = "canary"

#: Told of what is being done, how much of it is done, and of how much.
Listener: TypeAlias = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Canaries:
    """Directions by number, made again when needed: together they would take 400 MB.

    Attributes:
        seed: of the directions.
        inside: ``(canaries,)``, which coins say in.
        size: coordinates of a direction.
    """

    seed: int
    inside: NDArray[np.bool_]
    size: int

    def unit(self, index: int) -> NDArray[np.float32]:
        """A direction, ``(size,)``, of length 1."""
        drawn = np.random.default_rng([self.seed, index]).standard_normal(self.size, np.float32)
        drawn /= np.linalg.norm(drawn)
        return drawn

    def update(self, index: int, clipping_bound: float) -> NDArrays:
        """A canary as a site's weights after a round that began with zeros."""
        return {NAME: np.float32(LONGER * clipping_bound) * self.unit(index)}

    def still(self) -> NDArrays:
        """The weights with which a round begins: zeros."""
        return {NAME: np.zeros(self.size, np.float32)}

    def scores(self, release: NDArray[np.float64], listener: Listener) -> NDArray[np.float64]:
        """Inner product of each direction and the release, ``(canaries,)``."""
        found = self._products(release, listener)
        return np.fromiter(found, np.float64, self.inside.size)

    def _products(self, release: NDArray[np.float64], listener: Listener) -> Iterator[float]:
        for index in range(self.inside.size):
            listener("scores", index, self.inside.size)
            yield float(self.unit(index) @ release)
