"""What a site's study has spent of its privacy budget, as its administrator reads it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from fedge.client import policy
from fedge.shared.errors import FedgeError
from fedge.shared.privacy.ledger import FILE, MARKER_SUFFIX, Ledger

_UNITS: Final = ("example", "site")


def spent(home: Path) -> dict[str, Any] | None:
    """The study's budget and, by unit, what its newest charge came to.

    Returns:
        None where nothing was ever charged, or policy and ledger are another user's; else ``study``, ``budget``,
        ``delta``, ``against``, ``spent`` (by unit: ``consumers`` and ``server``, None for no bound) and ``problem``.
    """
    if not any(os.path.lexists(home / name) for name in (FILE, FILE + MARKER_SUFFIX)):
        return None
    if not os.access(home / policy.FILE, os.R_OK):
        return None
    told: dict[str, Any] = {"spent": {}, "problem": ""}
    try:
        own = policy.read(home).privacy
        told |= {
            "study": own.study,
            "budget": own.epsilon,
            "delta": own.delta,
            "against": own.against,
        }
        for entry in Ledger(home / FILE).entries(own.study):
            both = {"consumers": entry.epsilon_consumers, "server": entry.epsilon_server}
            finite = {who: e if math.isfinite(e) else None for who, e in both.items()}
            told["spent"][entry.charge.unit] = finite | {"delta": entry.epsilon_delta}
    except FedgeError as error:
        told["problem"] = str(error)
    return told


def lines(found: Mapping[str, Any]) -> list[str]:
    """``spent`` as people read it."""
    if found["problem"]:
        return [f"problem    {found['problem']}"]
    against, budget = found["against"], f"{found['budget']:g}"
    return [
        f"privacy    study {found['study']}: epsilon {_number(found['spent'][unit][against])} of {budget} is spent"
        f" for one {unit}, against the {against}, at delta {found['spent'][unit]['delta']:g}"
        for unit in _UNITS
        if unit in found["spent"]
    ]


def _number(epsilon: float | None) -> str:
    return "without bound" if epsilon is None else f"{epsilon:.4f}"
