"""A line of rounds.jsonl for the tests of what is shown of a run."""

from __future__ import annotations

from typing import Any


def line(number: int, sites: int = 8, **changes: Any) -> dict[str, Any]:
    names = [f"site-{i}" for i in range(1, sites + 1)]
    per_site = {
        s: {"accuracy": min(1.0, 0.5 + 0.03 * number + 0.001 * i), "loss": 0.3}
        for i, s in enumerate(names)
    }
    return {
        "round": number,
        "outcome": "committed",
        "invited": names,
        "trained": names,
        "rejected": [],
        "metrics": {
            "train": {"loss": 1 / number},
            "per_site": per_site,
            "site_mean": {"accuracy": 0.5 + 0.03 * number, "loss": 0.3},
            "pooled": {"accuracy": 0.91, "loss": 0.3},
        },
        "examples": dict.fromkeys(names, 100),
        "seconds": 1.0,
    } | changes
