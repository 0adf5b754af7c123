"""The input of a graph: numbers or tokens, and the axes without a fixed size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedge.shared.bundle.manifest import GRAPH_BATCH

#: No sizes but the example's own.
_NONE: Final[Mapping[str, int]] = {}


@dataclass(frozen=True)
class GraphInput:
    """The one input of a graph.

    Attributes:
        shape: of one example as the network takes it; for an open axis the size at export, at least 2.
        tokens: 0 for float32; otherwise examples are int64, at least 0 and below this.
        open: axes of any size besides the batch, counted with the batch, each with its name:
            ``{1: "length"}`` for ``(batch, length)``.
    """

    shape: tuple[int, ...]
    tokens: int = 0
    open: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(type(size) is not int or size < 1 for size in self.shape):
            raise ValueError(f"shape: must be sizes of at least 1, got {self.shape}")
        if self.tokens < 0:
            raise ValueError(f"tokens: must be at least 0, got {self.tokens}")
        for axis in self.open:
            if not 1 <= axis <= len(self.shape):
                raise ValueError(f"open: must be axes from 1 to {len(self.shape)}, got {axis}")
        names = [GRAPH_BATCH, *self.open.values()]
        if len(set(names)) != len(names) or not all(name.isidentifier() for name in names):
            raise ValueError(f"open: must be different names beside the batch's, got {names[1:]}")

    @classmethod
    def from_shape(cls, value: Sequence[int] | GraphInput) -> GraphInput:
        """Float32 examples of a shape, with only the batch axis open; a ``GraphInput`` is returned as it is."""
        return value if isinstance(value, GraphInput) else cls(tuple(value))

    @property
    def names(self) -> dict[int, str]:
        """All open axes, the batch first."""
        return {0: GRAPH_BATCH, **dict(sorted(self.open.items()))}

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes at export of the open axes besides the batch."""
        return {name: self.shape[axis - 1] for axis, name in sorted(self.open.items())}

    def resized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of an example with other sizes of some open axes, by name.

        Raises:
            ValueError: a name is not that of an open axis.
        """
        if unknown := sizes.keys() - set(self.open.values()):
            raise ValueError(
                f"sizes: must be of {sorted(self.open.values())}, got {sorted(unknown)}"
            )
        return tuple(
            sizes.get(self.open.get(axis, ""), size) for axis, size in enumerate(self.shape, 1)
        )

    def sample(
        self, generator: np.random.Generator, batch: int, sizes: Mapping[str, int] = _NONE
    ) -> NDArray[Any]:
        """A batch of random examples: standard normal float32, or tokens, equally likely, of int64.

        Args:
            generator: of the random numbers.
            batch: number of examples.
            sizes: of open axes by name; others have the size at export.

        Raises:
            ValueError: as ``resized``.
        """
        shape = (batch, *self.resized(sizes))
        if self.tokens:
            return generator.integers(0, self.tokens, shape)
        return generator.standard_normal(shape).astype(np.float32)
