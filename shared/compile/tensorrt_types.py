"""What a build of an engine takes and gives, apart from the builder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

#: Smallest, best and largest size of an axis; the engine is chosen for the best, and refuses what is beyond.
Sizes: TypeAlias = tuple[int, int, int]
#: Told the phase that a build is in, and the share that is done, from 0 to 1.
Listener: TypeAlias = Callable[[str, float], None]

BATCH: Final[Sizes] = (1, 8, 64)


@dataclass(frozen=True)
class Built:
    """A built engine.

    Attributes:
        engine: its bytes, which may differ from build to build.
        timing_cache: makes the next build on this device faster; None where the runtime has none.
        version: of the runtime.
        capabilities: GPUs that it is for, ascending.
    """

    engine: bytes
    timing_cache: bytes | None
    version: str
    capabilities: tuple[int, ...]


def around(example: Mapping[str, int]) -> dict[str, Sizes]:
    """Sizes of open axes from those of an example: from half to four times as much."""
    return {name: (max(1, size // 2), size, 4 * size) for name, size in example.items()}
