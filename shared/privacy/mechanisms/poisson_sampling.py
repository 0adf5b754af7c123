"""Poisson sampling: who takes part in a round, each sampled independently.

Amplification by sampling holds for exactly this: independent choices, from a generator that no one can predict, and a
sample that stays secret. A fixed number of sites taken without replacement is another mechanism with another epsilon.
The sample may be empty, and that round counts like any other; drawing again would not be Poisson sampling.
"""

from __future__ import annotations

import random
from collections.abc import Sequence


def poisson(
    names: Sequence[str], sampling_rate: float, system: random.SystemRandom | None = None
) -> list[str]:
    """Sample each name with this probability, independently of the others.

    The probability is exactly the float's: that is a whole number over 2^k, and k random bits are compared with the
    whole number, without rounding (k = 55 for 0.1).

    Args:
        names: all that might be sampled, each once.
        sampling_rate: above 0, up to 1.
        system: the operating system's generator; a new handle where not given.

    Returns:
        The sampled names, in the order of ``names``; possibly none.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: the generator is not the operating system's.
    """
    if not 0 < sampling_rate <= 1:
        raise ValueError(f"sampling_rate: must be above 0 and up to 1, got {sampling_rate}")
    if len(set(names)) != len(names):
        raise ValueError("names: must be each there once, got one twice")
    if system is None:
        system = random.SystemRandom()
    elif not isinstance(system, random.SystemRandom):
        raise TypeError(f"system: must be a SystemRandom, got {type(system).__name__}")
    share, whole = float(sampling_rate).as_integer_ratio()
    bits = whole.bit_length() - 1
    return [name for name in names if system.getrandbits(bits) < share]
