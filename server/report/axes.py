"""The arithmetic of a chart: round numbers for its axes, thinning of points, spacing of labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

#: Smallest distance of two labels' baselines, in px.
LABEL_PITCH: Final = 15.0

#: Largest number of points of a line; more would not be visible.
MAX_POINTS: Final = 400


Point = tuple[float, float]


def nice_step(span: float, target: int) -> float:
    """The step of 1, 2 or 5 times a power of ten that divides ``span`` into at most about ``target`` parts."""
    raw = max(span, 1e-12) / max(target, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    return next((m * power for m in (1, 2, 5) if raw <= m * power * (1 + 1e-9)), 10 * power)


def nice_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``; at least two."""
    if high - low < max(1e-12, 1e-9 * max(abs(low), abs(high))):
        pad = abs(high) * 0.05 if abs(high) > 1e-9 else 0.5
        low, high = low - pad, high + pad
    step = nice_step(high - low, target)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [k * step for k in range(first, last + 1)]


def tick_texts(ticks: Sequence[float]) -> list[str]:
    """The ticks with as many decimals as their step needs, the same for all."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [
        f"{t:.{decimals}f}".replace("-0", "0", 1) if t == 0 else f"{t:.{decimals}f}" for t in ticks
    ]


def round_ticks(first: int, last: int, target: int) -> list[int]:
    """Round numbers to label on the x axis: multiples of a nice step, and the first where there is room."""
    step = max(1, round(nice_step(last - first, target)))
    ticks = [k for k in range(first, last + 1) if k % step == 0]
    if not ticks or ticks[0] - first > step / 2:
        ticks.insert(0, first)
    return ticks


def thin(points: Sequence[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """At most ``max_points`` of the points, evenly chosen, the first and the last always."""
    if len(points) <= max_points:
        return list(points)
    return [points[round(i * (len(points) - 1) / (max_points - 1))] for i in range(max_points)]


def spread(
    positions: Sequence[float], low: float, high: float, pitch: float = LABEL_PITCH
) -> list[float]:
    """Move positions apart until neighbours keep a distance; their order is kept.

    Args:
        positions: in px.
        low: lower limit of the result, in px, while there is room.
        high: upper limit.
        pitch: smallest distance, in px.
    """
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = [min(max(positions[i], low), high) for i in order]
    for k in range(1, len(placed)):
        placed[k] = max(placed[k], placed[k - 1] + pitch)
    if placed and placed[-1] > high:
        placed[-1] = high
        for k in range(len(placed) - 2, -1, -1):
            placed[k] = min(placed[k], placed[k + 1] - pitch)
    result = [0.0] * len(placed)
    for k, i in enumerate(order):
        result[i] = placed[k]
    return result
