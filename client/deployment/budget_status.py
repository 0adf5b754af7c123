"""What a site's study has spent of its privacy budget, as its administrator reads it."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedge.client.settings import policy
from fedge.shared.config.privacy import Unit
from fedge.shared.errors import FedgeError
from fedge.shared.privacy.accounting.adversaries import of_entries
from fedge.shared.privacy.accounting.charges import Entry
from fedge.shared.privacy.ledger.files import MARKER_SUFFIX
from fedge.shared.privacy.ledger.ledger import FILE, Ledger

_UNITS: Final = ("example", "site")


def spent(home: Path) -> dict[str, Any] | None:
    """The study's budget and, by unit, what its newest charge came to.

    Returns:
        None where nothing was ever charged and nothing must be, or policy and ledger are another user's; else
        ``study``, ``budget``, ``delta``, ``against``, ``spent`` (by unit: ``consumers`` and ``server``, None for no
        bound) and ``problem``.
    """
    charged = any(os.path.lexists(home / name) for name in (FILE, FILE + MARKER_SUFFIX))
    if not os.access(home / policy.FILE, os.R_OK):
        return None
    told: dict[str, Any] = {"spent": {}, "problem": ""}
    try:
        own = policy.read(home).privacy
        if not charged and not own.required:
            return None
        told |= {
            "study": own.study,
            "budget": own.epsilon,
            "delta": own.delta,
            "against": own.against,
        }
        entries = Ledger(home / FILE).entries(own.study) if charged else []
        for unit in sorted({entry.charge.unit for entry in entries}):
            told["spent"][unit] = _after(entries, unit)
    except FedgeError as error:
        told["problem"] = str(error)
    return told


def _after(entries: Sequence[Entry], unit: Unit) -> dict[str, float | None]:
    delta = entries[-1].epsilon_delta
    both = of_entries(entries, unit, delta)
    consumers, server = (e if math.isfinite(e) else None for e in both)
    return {"consumers": consumers, "server": server, "delta": delta}


def lines(found: Mapping[str, Any]) -> list[str]:
    """``spent`` as people read it."""
    if found["problem"]:
        return [f"problem    {found['problem']}"]
    against, budget = found["against"], f"{found['budget']:g}"
    if not found["spent"]:
        return [f"privacy    study {found['study']}: nothing of epsilon {budget} is spent"]
    return [
        f"privacy    study {found['study']}: epsilon {_number(found['spent'][unit][against])} of {budget} is spent"
        f" for one {unit}, against the {against}, at delta {found['spent'][unit]['delta']:g}"
        for unit in _UNITS
        if unit in found["spent"]
    ]


def _number(epsilon: float | None) -> str:
    return "without bound" if epsilon is None else f"{epsilon:.4f}"
