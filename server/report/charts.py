"""Charts as inline SVG: pure functions from numbers to text, no library, no script.

Every chart is drawn for a given width in CSS pixels, so that its text keeps its size; ``responsive`` draws one for
wide pages and one for phones, and the style sheet shows one of the two. Colours come from the style sheet.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fedge.server.report.axes import Point, nice_ticks, round_ticks, spread, thin, tick_texts
from fedge.server.report.format import esc

#: Mean advance of a character of the 12 px chart text, in px; errs on the wide side.
CHARACTER: Final = 6.7
#: Points of a curve up to which each is marked.
MAX_MARKS: Final = 16


@dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: for the label at its end and the tooltip.
        points: (x, y) by ascending x.
        css: class of the style sheet, which gives colour and width.
        label: text at the right end, empty for none; ``short`` replaces it on phones.
        ringed: mark points with rings, which show where another curve lies below.
        marked: mark the points, where they are few.
        spans: (x, low, high) of the error bars.
    """

    name: str
    points: Sequence[Point]
    css: str
    label: str = ""
    short: str = ""
    ringed: bool = False
    marked: bool = True
    spans: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Band:
    """The area between two curves: (x, low, high) by ascending x."""

    name: str
    points: Sequence[tuple[float, float, float]]
    css: str = "band"


@dataclass(frozen=True)
class Frame:
    """A pair of axes: the plot's place in the picture, in px, and the data range that it spans."""

    left: float
    top: float
    right: float
    bottom: float
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """The picture's x of a data value, in px."""
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (
            self.right - self.left
        )

    def y(self, value: float) -> float:
        """The picture's y of a data value, in px."""
        return self.bottom - (value - self.y_low) / (self.y_high - self.y_low) * (
            self.bottom - self.top
        )


def _svg(width: float, height: float, label: str, body: str, css: str = "chart") -> str:
    return (
        f'<svg class="{css}" role="img" aria-label="{esc(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}">{body}</svg>'
    )


def _path(points: Sequence[Point], frame: Frame) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in points)


def _axes(
    frame: Frame,
    y_ticks: Sequence[float],
    x_ticks: Sequence[tuple[float, str]],
    names: tuple[str, str],
) -> str:
    """Grid, tick labels, and the axes' names: y above the plot, x below at its right end."""
    parts = []
    for tick, text in zip(y_ticks, tick_texts(y_ticks), strict=True):
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{frame.left:.1f} {y:.1f}H{frame.right:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{frame.left - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
        )
    parts.append(f'<path class="axis" d="M{frame.left:.1f} {frame.bottom:.1f}H{frame.right:.1f}"/>')
    for x, text in x_ticks:
        at = frame.x(x)
        parts.append(f'<path class="axis" d="M{at:.1f} {frame.bottom:.1f}v4"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{frame.bottom + 17:.1f}" text-anchor="middle">{esc(text)}</text>'
        )
    parts.append(f'<text class="name" x="0" y="12">{esc(names[1])}</text>')
    parts.append(
        f'<text class="name" x="{frame.right:.1f}" y="{frame.bottom + 33:.1f}" text-anchor="end">{esc(names[0])}</text>'
    )
    return "".join(parts)


def _frame(
    size: tuple[float, float], y_ticks: Sequence[float], x_span: tuple[float, float], right: float
) -> Frame:
    left = max(len(t) for t in tick_texts(y_ticks)) * CHARACTER + 10
    return Frame(left, 28, size[0] - right, size[1] - 38, *x_span, y_ticks[0], y_ticks[-1])


def line_chart(
    label: str,
    names: tuple[str, str],
    lines: Sequence[Line],
    bands: Sequence[Band] = (),
    *,
    width: float,
    height: float = 260,
    limits: tuple[float, float] | None = None,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    phone: bool = False,
) -> str:
    """Curves, by round unless ``x_ticks`` say otherwise, labelled at their right ends.

    Args:
        label: description of the picture for screen readers.
        names: of the x axis and of the y axis with its unit.
        lines: drawn in order, the last on top.
        bands: drawn below the lines.
        width: of the picture, in px.
        height: of the picture, in px.
        limits: y values that the axis does not pass, for example (0, 100).
        x_ticks: (x, text); rounds where not given.
        phone: use the lines' short labels.
    """
    lines = [line for line in lines if line.points]
    xs = [x for line in lines for x, _ in line.points] + [p[0] for b in bands for p in b.points]
    spans = [p for band in bands for p in band.points] + [p for line in lines for p in line.spans]
    ys = [y for line in lines for _, y in line.points] + [v for p in spans for v in p[1:]]
    if not xs:
        return ""
    low, high = min(ys), max(ys)
    y_ticks = nice_ticks(low, high)
    if limits is not None:
        y_ticks = [t for t in y_ticks if limits[0] - 1e-9 <= t <= limits[1] + 1e-9] or list(limits)
        y_ticks = y_ticks if len(y_ticks) > 1 else [y_ticks[0] - 1, y_ticks[0]]
    first, last = min(xs), max(xs)
    span = (first, last) if last > first else (first - 1, last + 1)
    texts = {
        line.name: (line.short or line.label) if phone else line.label
        for line in lines
        if line.label
    }
    right = max((len(t) * CHARACTER for t in texts.values()), default=0) + 18
    frame = _frame((width, height), y_ticks, span, right)
    if x_ticks is None:
        x_ticks = [(t, str(t)) for t in round_ticks(int(first), int(last), 5 if phone else 8)]
    parts = [_axes(frame, y_ticks, x_ticks, names)]
    for band in bands:
        outline = [(x, high) for x, _, high in band.points] + [
            (x, low) for x, low, _ in reversed(band.points)
        ]
        parts.append(
            f'<path class="{band.css}" d="{_path(outline, frame)}Z"><title>{esc(band.name)}</title></path>'
        )
    for line in lines:
        points = thin(line.points)
        parts.append(f'<g class="{line.css}"><title>{esc(line.name)}</title>')
        if len(points) > 1:
            parts.append(f'<path d="{_path(points, frame)}"/>')
        parts += [_error_bar(span, frame) for span in line.spans]
        radius = 4.6 if line.ringed else 3 if line.label else 1.6
        for x, y in _marked(points, line.ringed) if line.marked else ():
            parts.append(f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}"/>')
        parts.append("</g>")
    named = [line for line in lines if line.name in texts]
    ends = [frame.y(line.points[-1][1]) for line in named]
    for line, end, y in zip(named, ends, spread(ends, frame.top, frame.bottom), strict=True):
        x = frame.x(line.points[-1][0])
        parts.append(
            f'<path class="leader" d="M{x + 4:.1f} {end:.1f}L{frame.right + 9:.1f} {y:.1f}"/>'
        )
        parts.append(
            f'<text class="label {line.css}" x="{frame.right + 12:.1f}" y="{y + 4:.1f}">{esc(texts[line.name])}</text>'
        )
    return _svg(width, height, label, "".join(parts))


def _error_bar(span: tuple[float, float, float], frame: Frame) -> str:
    x, low, high = frame.x(span[0]), frame.y(span[1]), frame.y(span[2])
    caps = "".join(f"M{x - 5:.1f} {y:.1f}h10" for y in (low, high))
    return f'<path class="span" d="M{x:.1f} {low:.1f}V{high:.1f}{caps}"/>'


def _marked(points: Sequence[Point], ringed: bool) -> Sequence[Point]:
    """The points to mark: all of a few; of many none, or for rings some that end with the last."""
    if len(points) <= MAX_MARKS:
        return points
    return points[:: -(-len(points) // -MAX_MARKS)][::-1] if ringed else ()


@dataclass(frozen=True)
class Column:
    """One column of a chart: its parts stacked from below, and its tooltip."""

    x: float
    parts: Sequence[float]
    title: str


def column_chart(
    label: str,
    names: tuple[str, str],
    columns: Sequence[Column],
    css: Sequence[str],
    *,
    width: float,
    height: float = 220,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    pitch: float = 1.0,
    phone: bool = False,
) -> str:
    """Stacked columns.

    Args:
        label: description of the picture for screen readers.
        names: of the x axis and of the y axis with its unit.
        columns: by ascending x.
        css: class of each part, from below.
        width: of the picture, in px.
        height: of the picture, in px.
        x_ticks: (x, text); whole numbers where not given.
        pitch: distance of two columns on the x axis.
        phone: fewer ticks.
    """
    if not columns:
        return ""
    y_ticks = nice_ticks(0, max(sum(c.parts) for c in columns) or 1, 4)
    first, last = columns[0].x, columns[-1].x
    frame = _frame((width, height), y_ticks, (first - pitch / 2, last + pitch / 2), 6)
    if x_ticks is None:
        x_ticks = [
            (t, str(t)) for t in round_ticks(math.ceil(first), math.floor(last), 5 if phone else 8)
        ]
    parts = [_axes(frame, y_ticks, x_ticks, names)]
    slot = (frame.right - frame.left) / ((last - first) / pitch + 1)
    bar = min(max(slot * 0.72, 1.0), 36.0)
    for column in columns:
        base = 0.0
        parts.append(f"<g><title>{esc(column.title)}</title>")
        for part, name in zip(column.parts, css, strict=True):
            if part > 0:
                top = frame.y(base + part)
                parts.append(
                    f'<rect class="{name}" x="{frame.x(column.x) - bar / 2:.1f}" y="{top:.1f}" '
                    f'width="{bar:.1f}" height="{frame.y(base) - top:.1f}"/>'
                )
            base += part
        parts.append("</g>")
    return _svg(width, height, label, "".join(parts))


@dataclass(frozen=True)
class Bubble:
    """One circle of a chart: its place, its area as a share of the largest one's, its label and its tooltip."""

    x: float
    y: float
    share: float
    label: str
    title: str
    css: str


def bubble_chart(
    label: str,
    names: tuple[str, str],
    bubbles: Sequence[Bubble],
    *,
    width: float,
    height: float = 260,
    phone: bool = False,
) -> str:
    """Circles on two axes that begin at 0 or below, each with its label beside it.

    Args:
        label: description of the picture for screen readers.
        names: of the x axis and of the y axis with its unit.
        bubbles: the largest ones lie below the others.
        width: of the picture, in px.
        height: of the picture, in px.
        phone: fewer ticks, and smaller circles.
    """
    if not bubbles:
        return ""
    most, radius = max(b.x for b in bubbles), 14.0 if phone else 20.0
    low, high = min(0.0, *(b.y for b in bubbles)), max(b.y for b in bubbles)
    y_ticks = nice_ticks(low, high if high > low else low + 1, 4)
    x_ticks = nice_ticks(0, most * 1.1 or 1, 4 if phone else 6)
    frame = _frame((width, height), y_ticks, (0, x_ticks[-1]), radius)
    # Room below the lowest line for the circles on it.
    room = (y_ticks[-1] - y_ticks[0]) * radius / (frame.bottom - frame.top - radius)
    frame = replace(frame, y_low=y_ticks[0] - room)
    parts = [_axes(frame, y_ticks, list(zip(x_ticks, tick_texts(x_ticks), strict=True)), names)]
    # Of the y axis's name, which stands in the corner.
    taken = [(0.0, len(names[1]) * CHARACTER, 0.0, 15.0)]
    for b in sorted(bubbles, key=lambda b: -b.share):
        x, y, r = frame.x(b.x), frame.y(b.y), max(3.0, radius * math.sqrt(b.share))
        taken.append((x - r, x + r, y - r, y + r))
        parts.append(
            f'<circle class="bubble {b.css}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}">'
            f"<title>{esc(b.title)}</title></circle>"
        )
    for b in sorted(bubbles, key=lambda b: (b.y, b.x)):
        half = len(b.label) * CHARACTER / 2
        x = min(max(frame.x(b.x), half), width - half)
        r = max(3.0, radius * math.sqrt(b.share))
        above, below = int(frame.y(b.y) - r - 6), int(frame.y(b.y) + r + 14)
        # Above its circle, and higher where another text or circle is; where no room is left there, below it.
        free = (
            y
            for y in (*range(above, 11, -2), *range(below, int(height), 2))
            if not any(
                left < x + half and x - half < right and top < y + 3 and y - 11 < bottom
                for left, right, top, bottom in taken
            )
        )
        y = next(free, above)
        taken.append((x - half, x + half, y - 11, y + 3))
        parts.append(
            f'<text class="label" x="{x:.1f}" y="{y:.1f}" text-anchor="middle">{esc(b.label)}</text>'
        )
    return _svg(width, height, label, "".join(parts))


def sparkline(
    label: str, values: Sequence[float], low: float, high: float, width: float = 110
) -> str:
    """A line without axes, 22 px high.

    Args:
        label: description for screen readers.
        values: in order.
        low: lower end of the vertical axis, the same for neighbouring lines.
        high: its upper end.
        width: in px.
    """
    if not values:
        return ""
    points = thin(list(enumerate(values)), 120)
    top = high if high > low else low + 1
    frame = Frame(3, 3, width - 4, 19, 0, max(len(values) - 1, 1), low, top)
    end_x, end_y = frame.x(points[-1][0]), frame.y(points[-1][1])
    body = f'<path d="{_path(points, frame)}"/>' if len(points) > 1 else ""
    return _svg(
        width, 22, label, f'{body}<circle cx="{end_x:.1f}" cy="{end_y:.1f}" r="2.2"/>', "spark"
    )


def bar(label: str, share: float, mark: float | None = None) -> str:
    """A horizontal bar that fills ``share`` (0 to 1) of its cell, and a line at ``mark``."""
    filled = 100 * min(max(share, 0.0), 1.0)
    line = ""
    if mark is not None:
        line = f'<rect class="mark" x="{100 * min(max(mark, 0.0), 1.0) - 0.4:.2f}" width=".8" height="10"/>'
    return (
        f'<svg class="bar" role="img" aria-label="{esc(label)}" viewBox="0 0 100 10" preserveAspectRatio="none">'
        f'<rect class="track" y="1" width="100" height="8"/><rect class="fill" y="1" width="{filled:.2f}" height="8"/>'
        f"{line}</svg>"
    )


def responsive(draw: Callable[[float, bool], str]) -> str:
    """The chart twice, drawn for a wide page and for a phone.

    Args:
        draw: takes the width in px and whether it is for a phone, and returns HTML.
    """
    return f'<div class="wide">{draw(540, False)}</div><div class="narrow">{draw(330, True)}</div>'
