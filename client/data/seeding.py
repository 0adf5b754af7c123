"""Randomness as a function of what it is for: no generator is carried from round to round.

So a site that dies and starts again, or answers requests in another order, draws the same.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np


def seed_of(seed: int, *purpose: str | int) -> int:
    """A 64-bit seed: the head of the SHA-256 of the run's seed and the purpose.

    Args:
        seed: the run's.
        purpose: names and numbers, for example site and round.
    """
    text = json.dumps([seed, *purpose], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def generator(seed: int, *purpose: str | int) -> np.random.Generator:
    """NumPy's generator for one purpose."""
    return np.random.Generator(np.random.PCG64(seed_of(seed, *purpose)))
