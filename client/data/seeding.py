"""Seeds derived from a purpose: no generator keeps state from round to round.

So a site that restarts, or answers requests in another order, samples the same values.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def seed_of(seed: int, *purpose: str | int) -> int:
    """A 64-bit seed: the head of the SHA-256 of the run's seed and the purpose.

    Args:
        seed: of the run.
        purpose: names and numbers, for example site and round.
    """
    text = json.dumps([seed, *purpose], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """NumPy's generator for one purpose, seeded by ``seed_of``."""
    return np.random.Generator(np.random.PCG64(seed_of(seed, *purpose)))
