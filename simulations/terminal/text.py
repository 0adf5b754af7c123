"""Formats figures, names and times of a run for a terminal.

Names and reasons come from sites; they are printed without control characters and never read as markup.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

BLOCKS: Final = "▁▂▃▄▅▆▇█"
#: Width of a site's name and of a sparkline, in characters.
NAME_WIDTH: Final = 24
SPARK_WIDTH: Final = 20
#: Standard deviation of noise beyond which a share between 0 and 1 is below the noise floor.
NOISE_FLOOR: Final = 0.25
BELOW_NOISE_FLOOR: Final = "lost in noise"


def printable(name: str, width: int = NAME_WIDTH) -> str:
    """A name of at most ``width`` characters, with ``?`` in place of unprintable ones."""
    kept = "".join(c if c.isprintable() else "?" for c in name[: width + 1])
    return kept if len(kept) <= width else kept[: width - 1] + "…"


def finite(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def member(value: Any, *path: str) -> Any:
    """The member at ``path`` of nested objects, or None."""
    for key in path:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def metric_text(name: str, value: float | None) -> str:
    """Accuracy in percent, anything else with three decimals, a dash where it was not measured."""
    if value is None:
        return "–"
    return f"{100 * value:.1f} %" if name.endswith("accuracy") else f"{value:.3f}"


def noised_text(name: str, value: float | None, metrics: Any, *view: str) -> str:
    """A metric with the standard deviation of its noise, rounded up, where it has noise.

    Args:
        name: of the metric.
        value: None where it was not measured.
        metrics: the evaluation that holds the figure, with its record of noise.
        view: path of the figure in it.
    """
    noise = member(metrics, "noise")
    if value is None or not isinstance(noise, Mapping):
        return metric_text(name, value)
    stddev = finite(member(noise, *view, name))
    if stddev is None or not stddev <= NOISE_FLOOR:
        return BELOW_NOISE_FLOOR
    tenths = math.ceil(1000 * stddev - 1e-9)
    share = name.endswith("accuracy")
    spread = f"{tenths / 10:.1f}" if share else f"{tenths / 1000:.3f}"
    return f"{metric_text(name, value)} ± {spread}"


def lead_metric(site_mean: Any) -> str:
    """The metric shown first: accuracy where there is one, loss only where there is nothing else."""
    names = list(site_mean) if isinstance(site_mean, Mapping) else []
    if "accuracy" in names or not names:
        return "accuracy"
    return next((str(name) for name in names if name != "loss"), "loss")


def clock(seconds: float) -> str:
    """``0:07``, ``12:30``, ``1:02:03``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def round_facts(line: Mapping[str, Any]) -> str:
    """A line of rounds.jsonl in a few words: ``97.2 %  loss 0.081  8/8 sites  1 not counted``."""
    # Under secure aggregation no site's own metrics are known, so there is no mean of them.
    view = "site_mean" if member(line, "metrics", "site_mean") else "pooled"
    mean = member(line, "metrics", view)
    lead = lead_metric(mean)
    loss = finite(member(line, "metrics", "train", "loss"))
    parts = []
    if (value := finite(member(mean, lead))) is not None and lead != "loss":
        text = noised_text(lead, value, member(line, "metrics"), view)
        plain = lead == "accuracy" and "%" in text
        parts.append(text if plain else f"{printable(lead, 12)} {text}")
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    parts.append(f"{len(line.get('trained') or ())}/{len(line.get('invited') or ())} sites")
    if refused := len(line.get("rejected") or ()):
        parts.append(f"{refused} not counted")
    if line.get("outcome") != "committed":
        parts.append("skipped")
    return "  ".join(parts)


def waiting_text(phase: str, sites: Sequence[str], seconds: float) -> str:
    """``waiting for site-3 and 2 more (0:30)``.

    Args:
        phase: what the run waits for: ``"superlink"``, ``"connect"`` or another.
        sites: names of the sites that it waits for.
        seconds: since it began to wait.
    """
    if phase == "superlink":
        subject = "the SuperLink"
    elif not sites:
        subject = "sites to connect" if phase == "connect" else "sites"
    else:
        subject = printable(sites[0]) + (f" and {len(sites) - 1} more" if len(sites) > 1 else "")
        subject += " to connect" if phase == "connect" else ""
    return f"waiting for {subject} ({clock(seconds)})"


def sparkline(values: Sequence[float], low: float, high: float, width: int = SPARK_WIDTH) -> str:
    """Block characters, at most ``width``; where there are more values, the mean of neighbours.

    Args:
        values: to draw, in order.
        low: value of the lowest block.
        high: value of the highest block.
        width: largest number of characters.
    """
    if not values:
        return ""
    cells = min(width, len(values))
    edges = [round(i * len(values) / cells) for i in range(cells + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    span = high - low
    top = len(BLOCKS) - 1
    levels = (round((m - low) / span * top) if span > 0 else top for m in means)
    return "".join(BLOCKS[min(max(level, 0), top)] for level in levels)
