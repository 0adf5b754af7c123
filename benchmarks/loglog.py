"""Plots with two logarithmic axes as SVG files that stand alone: no library, no script."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from fedge.server.report.axes import spread
from fedge.server.report.charts import CHARACTER, Frame

#: Okabe and Ito's colours that read on white and on black, one for each place in the order.
COLOURS: Final = ("#0a84c6", "#d98200", "#0a9a72", "#c7659c")
WIDTH, HEIGHT = 430.0, 330.0
LEFT, TOP, BOTTOM = 62.0, 40.0, 44.0
_STYLE: Final = (
    "text{font:12px system-ui,sans-serif;fill:#57606a}.title{font-weight:600;fill:#24292f}"
    ".grid{stroke:#8b949e;stroke-opacity:.3;fill:none}.curve{fill:none;stroke-width:2}"
    "@media(prefers-color-scheme:dark){text{fill:#9ea7b3}.title{fill:#e6edf3}}"
)
_EXPONENT: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Curve:
    """One curve.

    Attributes:
        name: at its right end; empty for none.
        points: (x, y), all above 0, by ascending x.
        colour: place in ``COLOURS``.
        dashed: whether it is.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One plot."""

    title: str
    unit: str
    curves: Sequence[Curve]


def draw(label: str, panels: Sequence[Panel]) -> str:
    """A picture of panels side by side.

    Args:
        label: what it says, for those who cannot see it.
        panels: share nothing but the height.
    """
    width = WIDTH * len(panels)
    body = "".join(_panel(p, WIDTH * i) for i, p in enumerate(panels))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{escape(label)}" '
        f'viewBox="0 0 {width:g} {HEIGHT:g}" width="{width:g}" height="{HEIGHT:g}">'
        f"<title>{escape(label)}</title><style>{_STYLE}</style>{body}</svg>\n"
    )


def _panel(panel: Panel, left: float) -> str:
    curves = [c for c in panel.curves if c.points]
    xs = [math.log10(x) for c in curves for x, _ in c.points]
    ys = [math.log10(y) for c in curves for _, y in c.points]
    named = [c for c in curves if c.name]
    right = max((len(c.name) * CHARACTER for c in named), default=0.0) + 8
    frame = Frame(left + LEFT, TOP, left + WIDTH - right, HEIGHT - BOTTOM, min(xs), max(xs),
                  math.floor(min(ys)), math.ceil(max(ys)))  # fmt: skip
    parts = [f'<text class="title" x="{left + 8:.1f}" y="18">{escape(panel.title)}</text>']
    for power in range(int(frame.y_low), int(frame.y_high) + 1):
        y = frame.y(power)
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
        parts.append(
            f'<text x="{frame.left - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{_power(power)}</text>'
        )
    for count in _ticks(sorted({x for c in curves for x, _ in c.points})):
        x = frame.x(math.log10(count))
        parts.append(f'<path class="grid" d="M{x:.1f} {frame.top:.1f}V{frame.bottom:.1f}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{frame.bottom + 16:.1f}" text-anchor="middle">{count:g}</text>'
        )
    middle = (frame.left + frame.right) / 2
    parts.append(
        f'<text x="{middle:.1f}" y="{frame.bottom + 34:.1f}" text-anchor="middle">sites</text>'
        f'<text x="{frame.left - 6:.1f}" y="{frame.top - 8:.1f}" text-anchor="end">{escape(panel.unit)}</text>'
    )
    parts += [_curve(c, frame) for c in curves]
    ends = [frame.y(math.log10(c.points[-1][1])) for c in named]
    for c, y in zip(named, spread(ends, frame.top, frame.bottom), strict=True):
        parts.append(
            f'<text x="{frame.right + 6:.1f}" y="{y + 4:.1f}" style="fill:{COLOURS[c.colour]}">{escape(c.name)}</text>'
        )
    return "".join(parts)


def _curve(curve: Curve, frame: Frame) -> str:
    places = [(frame.x(math.log10(x)), frame.y(math.log10(y))) for x, y in curve.points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="5 4"' if curve.dashed else ""
    colour = COLOURS[curve.colour]
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in places
    )
    return f'<path class="curve" stroke="{colour}"{dash} d="M{path}"/>{dots}'


def _ticks(values: Sequence[float]) -> list[float]:
    """Those of the measured places whose texts do not touch, the last one among them."""
    kept: list[float] = []
    for value in reversed(values):
        if not kept or 2.4 * value <= kept[-1]:
            kept.append(value)
    return kept[::-1]


def _power(exponent: int) -> str:
    if -3 <= exponent <= 2:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(_EXPONENT)
