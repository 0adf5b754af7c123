"""What guesses about canaries prove: a lower bound on epsilon from one run.

Privacy Auditing with One (1) Training Run (Steinke, Nasr and Jagielski, NeurIPS 2023,
https://arxiv.org/abs/2305.08846), their bound for (epsilon, delta) with abstentions. Each of m canaries is in with
probability 1/2, independently; who sees what comes out guesses r of them, and v guesses are right. Under epsilon alone
v is at most as large as the number of successes in r trials that succeed with probability e^epsilon / (1 + e^epsilon);
delta adds to the chance of each v at most 2 m delta times a factor that the binomial distribution gives.
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np

#: Halvings of an interval of length 1.
_HALVINGS: Final = 40


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The chance, at most, of so many right guesses where the mechanism keeps (epsilon, delta).

    Args:
        canaries: m.
        guesses: r, up to m, their number fixed before the scores are seen.
        correct: v, up to r.
        epsilon: 0 or more.
        delta: 0 to 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    _require(canaries, guesses, correct, delta)
    # Not at the top: SciPy's statistics take a while to import.
    from scipy.stats import binom

    share = 1 / (1 + math.exp(-epsilon))
    beta = float(binom.sf(correct - 1, guesses, share))
    # P[v > X >= v - i] for i = 1 to v, each by its own i.
    chances = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, share))
    alpha = float(np.max(chances / np.arange(1, correct + 1), initial=0.0))
    return min(beta + alpha * delta * 2 * canaries, 1.0)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, p: float = 0.05) -> float:
    """The largest epsilon that so many right guesses rule out, with a chance of error of at most p; 0 for none.

    Args:
        canaries: m, each in with probability 1/2.
        guesses: r.
        correct: v.
        delta: at which epsilon is meant.
        p: how often a mechanism that keeps (epsilon, delta) may be ruled out, above 0 and below 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    _require(canaries, guesses, correct, delta)
    if not 0 < p < 1:
        raise ValueError(f"p: must be above 0 and below 1, got {p}")

    def ruled_out(epsilon: float) -> bool:
        return p_value(canaries, guesses, correct, epsilon, delta) < p

    low, high = 0.0, 1.0
    while ruled_out(high):
        low, high = high, high + 1
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if ruled_out(middle):
            low = middle
        else:
            high = middle
    return low


def _require(canaries: int, guesses: int, correct: int, delta: float) -> None:
    if not 0 <= guesses <= canaries:
        raise ValueError(f"guesses: must be 0 to {canaries}, got {guesses}")
    if not 0 <= correct <= guesses:
        raise ValueError(f"correct: must be 0 to {guesses}, got {correct}")
    if not 0 <= delta <= 1:
        raise ValueError(f"delta: must be 0 to 1, got {delta}")


#: Least share of the noise that is left by the check of the check.
MIN_FACTOR: Final = 0.01
