"""How the report writes values: escaped, with units, and never as NaN or None."""

from __future__ import annotations

import html
import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

#: Between a number and its unit; keeps them on one line.
THIN: Final = "\u202f"
MISSING: Final = "–"
#: Names longer than this are broken over lines.
LONG_NAME: Final = 20
_RAISED: Final = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
#: Longest text of one value, in characters; the sites choose their names and the reasons of their errors.
MAX_TEXT: Final = 400


def plain(value: object, limit: int = MAX_TEXT) -> str:
    """The text of a value without control and direction characters, cut at ``limit`` characters."""
    text = str(value)
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


def esc(value: object, limit: int = MAX_TEXT) -> str:
    """``plain`` text that is safe in HTML, between tags and inside quoted attributes."""
    return html.escape(plain(value, limit), quote=True)


def site_name(name: str) -> str:
    """A site's name as HTML; a long one may break anywhere, a short one nowhere."""
    return esc(name, 64) if len(name) <= LONG_NAME else f'<span class="long">{esc(name, 64)}</span>'


def count(value: float) -> str:
    """A whole number with thin spaces between groups of three, from 10 000 on."""
    whole = round(value)
    return f"{whole:,}".replace(",", THIN) if abs(whole) >= 10_000 else str(whole)


def plural(number: int, noun: str, nouns: str = "") -> str:
    """``1 site``, ``8 sites``."""
    return f"{count(number)} {noun if number == 1 else nouns or noun + 's'}"


def is_share(metric: str) -> bool:
    """Whether people read the metric as a percentage."""
    return metric.endswith("accuracy")


def metric_value(metric: str, value: float | None) -> str:
    """A metric in its own unit: accuracy in percent, everything else with three decimals."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f}{THIN}%" if is_share(metric) else f"{value:.3f}"


def metric_name(metric: str) -> str:
    """A metric's name as people write it."""
    return {"auc": "AUC", "auroc": "AUROC", "f1": "F1"}.get(
        metric, metric.replace("-", " ").replace("_", " ")
    )


def size(octets: float | None) -> str:
    """Bytes in SI units, three significant digits: ``1.24 MB``."""
    if octets is None:
        return MISSING
    value, unit = float(octets), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(value) < 999.5 or unit == "TB":
            break
        value /= 1000
    shown = count(value) if unit == "B" else significant(value, zeros=True)
    return f"{shown}{THIN}{unit}"


def duration(seconds: float | None) -> str:
    """A time with three significant digits: ``71.3 µs``, ``420 ms``, ``3.20 s``, ``14.1 min``, ``2.05 h``."""
    if seconds is None:
        return MISSING
    if seconds == 0:
        return f"0{THIN}s"
    for limit, factor, unit in (
        (9.995e-4, 1e6, "µs"),
        (0.9995, 1e3, "ms"),
        (99.95, 1.0, "s"),
        (5997.0, 1 / 60, "min"),
    ):
        if seconds < limit:
            return f"{significant(seconds * factor, zeros=True)}{THIN}{unit}"
    return f"{significant(seconds / 3600, zeros=True)}{THIN}h"


def significant(value: float, digits: int = 3, *, zeros: bool = False) -> str:
    """Significant digits, plain from 0.001 to 999 999, else as ``3.1 × 10⁻⁷``; ``zeros`` pads at the end."""
    if value == 0:
        return "0"
    if not 1e-3 <= abs(value) < 1e6:
        mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
        mantissa = mantissa if zeros or "." not in mantissa else mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}{THIN}×{THIN}10{str(int(exponent)).translate(_RAISED)}"
    if abs(value) >= 10**digits - 0.5:
        return count(value)
    return f"{value:#.{digits}g}".rstrip(".") if zeros else f"{value:.{digits}g}"


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key that puts ``site-2`` before ``site-10``."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return tuple((0, int(p[:18]), p) if p.isascii() and p.isdigit() else (1, 0, p) for p in parts)


def value_text(value: Any, depth: int = 0) -> str:
    """A JSON value of unknown meaning as one line of (unescaped) text."""
    match value:
        case None | "":
            return MISSING
        case bool():
            return "yes" if value else "no"
        case int():
            return count(value)
        case float():
            return significant(value) if math.isfinite(value) else MISSING
        case str():
            return value
        case Mapping() if depth < 2:
            return ", ".join(
                f"{k}: {value_text(v, depth + 1)}" for k, v in list(value.items())[:40]
            )
        case list() if depth < 2 and len(value) <= 40:
            return ", ".join(value_text(v, depth + 1) for v in value)
        case list():
            return f"{count(len(value))} values"
        case _:
            return json.dumps(value, default=str)


def definitions(rows: Iterable[tuple[str, str]]) -> str:
    """A definition list; the second of each pair is HTML, the first is text."""
    body = "".join(f"<div><dt>{esc(term)}</dt><dd>{text}</dd></div>" for term, text in rows if text)
    return f'<dl class="facts">{body}</dl>' if body else ""


def table(
    caption: str,
    head: Iterable[tuple[str, str]],
    rows: Iterable[Iterable[str]],
    *,
    css: str = "",
    tall: bool = False,
    labels: Sequence[str] = (),
) -> str:
    """A table in a container that scrolls sideways, first column as row headers.

    With ``labels`` it scrolls nowhere: on a narrow page each row is a block of its own, and each cell has a label.

    Args:
        caption: text; names the table for screen readers.
        head: (text, class) of each column; class ``n`` aligns numbers right.
        rows: HTML of the cells.
        css: further classes of the table.
        tall: whether the container has a maximal height and scrolls.
        labels: text of what each column's cells are where there is no head; the first one's is not shown.
    """
    columns = list(head)
    css = f"{css} stacked".strip() if labels else css
    heads = "".join(f'<th scope="col" class="{css_}">{esc(text)}</th>' for text, css_ in columns)
    lines = []
    for row in rows:
        cells = list(row)
        rest = "".join(
            _cell(cells[i], columns[i][1], labels[i] if labels else "")
            for i in range(1, len(cells))
        )
        lines.append(f'<tr><th scope="row" class="{columns[0][1]}">{cells[0]}</th>{rest}</tr>')
    return (
        f'<div class="scroll{" tall" if tall else ""}" role="region" aria-label="{esc(caption)}" tabindex="0">'
        f'<table class="{css}"><caption>{esc(caption)}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(text: str, css: str, label: str) -> str:
    """A cell; on a narrow page one that has a label and no value takes no room."""
    if not label:
        return f'<td class="{css}">{text}</td>'
    css = f"{css} none".strip() if text == MISSING else css
    return f'<td class="{css}" data-label="{esc(label)}">{text}</td>'


def section(anchor: str, title: str, lead: str, body: str) -> str:
    """A section of the page; ``lead`` and ``body`` are HTML."""
    words = f'<p class="lead">{lead}</p>' if lead else ""
    return f'<section id="{anchor}"><h2>{esc(title)}</h2>{words}{body}</section>'


def card(title: str, body: str, note: str = "", css: str = "") -> str:
    """A framed part of a section; ``body`` and ``note`` are HTML."""
    words = f'<p class="note">{note}</p>' if note else ""
    return f'<div class="card {css}"><h3>{esc(title)}</h3>{words}{body}</div>'


def tile(label: str, value: str, note: str = "", css: str = "") -> str:
    """A key figure; all three are text or numbers already formatted."""
    small = f'<p class="tile-note">{esc(note)}</p>' if note else ""
    return (
        f'<div class="tile {css}"><p class="tile-label">{esc(label)}</p>'
        f'<p class="tile-value">{esc(value)}</p>{small}</div>'
    )


def share(value: float) -> str:
    """A share in percent; only what is exactly one reads 100 %."""
    percent = 100 * value
    return f"{percent:.0f}{THIN}%" if percent in (0, 100) else f"{min(percent, 99.99):.2f}{THIN}%"
