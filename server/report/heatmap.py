"""Values as a small grey picture, in inline SVG: no library, no script, no image file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from fedge.server.report import format as fmt
from fedge.server.report.format import esc

#: Shades, from black to white.
SHADES: Final = 32
#: Largest number of values in a row, and number of bins of a histogram.
WIDTH: Final = 32
BINS: Final = 32
#: Side of a value, in px.
_SIDE: Final = 9


def _place(value: float, low: float, high: float, parts: int) -> int:
    share = (value - low) / (high - low)
    return min(max(int(share * parts), 0), parts - 1)


def greys(values: Sequence[float], low: float, high: float) -> list[int]:
    """The shade of each value, 0 at ``low`` to ``SHADES - 1`` at ``high``."""
    return [_place(value, low, high, SHADES) for value in values]


def scaled_bins(values: Sequence[float], low: float, high: float) -> list[int]:
    """How many values lie in each of ``BINS`` equal parts of the range."""
    counts = [0] * BINS
    for value in values:
        counts[_place(value, low, high, BINS)] += 1
    return counts


def range_text(index: int, parts: int, low: float, high: float) -> str:
    """The ends of a bin as people read them."""
    step = (high - low) / parts
    ends = (low + index * step, low + (index + 1) * step)
    first, last = (fmt.significant(end, 3).replace("-", "−") for end in ends)
    return f"{first} to {last}"


def picture(label: str, shades: Sequence[int]) -> str:
    """The shades in rows, from the top left; one path for each shade keeps the page small.

    Args:
        label: description of the picture for screen readers.
        shades: as ``greys`` returns them.
    """
    if not shades:
        return ""
    columns = min(WIDTH, math.ceil(math.sqrt(len(shades))))
    rows = -(-len(shades) // columns)
    paths: dict[int, list[str]] = {}
    for i, shade in enumerate(shades):
        paths.setdefault(shade, []).append(f"M{i % columns} {i // columns}h1v1h-1z")
    parts = []
    for shade, path in sorted(paths.items()):
        level = round(255 * shade / (SHADES - 1))
        parts.append(f'<path fill="#{level:02x}{level:02x}{level:02x}" d="{"".join(path)}"/>')
    return (
        f'<svg class="greys" role="img" aria-label="{esc(label)}" viewBox="0 0 {columns} {rows}" '
        f'width="{columns * _SIDE}" height="{rows * _SIDE}" shape-rendering="crispEdges">{"".join(parts)}</svg>'
    )
