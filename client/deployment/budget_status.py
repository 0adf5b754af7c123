"""How much of its privacy budget a site has spent, for its administrator."""

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
    """The privacy budget and, by unit of privacy, the epsilon after the newest charge.

    Args:
        home: of the site.

    Returns:
        None where nothing was charged and privacy is not required, or policy and ledger are another user's; else
        ``study``, ``budget``, ``delta``, ``against``, ``spent`` (by unit: ``consumers`` and ``server``, None for no
        bound) and ``problem``.
    """
    charged = any(os.path.lexists(home / name) for name in (FILE, FILE + MARKER_SUFFIX))
    if not os.access(home / policy.FILE, os.R_OK):
        return None
    status: dict[str, Any] = {"spent": {}, "problem": ""}
    try:
        own = policy.read(home).privacy
        if not charged and not own.required:
            return None
        status |= {
            "study": own.study,
            "budget": own.epsilon,
            "delta": own.delta,
            "against": own.against,
        }
        entries = Ledger(home / FILE).entries(own.study) if charged else []
        for unit in sorted({entry.charge.unit for entry in entries}):
            status["spent"][unit] = _after(entries, unit)
    except FedgeError as error:
        status["problem"] = str(error)
    return status


def _after(entries: Sequence[Entry], unit: Unit) -> dict[str, float | None]:
    delta = entries[-1].epsilon_delta
    both = of_entries(entries, unit, delta)
    consumers, server = (e if math.isfinite(e) else None for e in both)
    return {"consumers": consumers, "server": server, "delta": delta}


def lines(status: Mapping[str, Any]) -> list[str]:
    """The result of ``spent`` as lines of text."""
    if status["problem"]:
        return [f"problem    {status['problem']}"]
    against, budget = status["against"], f"{status['budget']:g}"
    if not status["spent"]:
        return [
            f"privacy    study {status['study']}: nothing of epsilon {budget} is spent for one example or one site,"
            f" against the {against}, at delta {status['delta']:g}"
        ]
    return [
        f"privacy    study {status['study']}: epsilon {_number(status['spent'][unit][against])} of {budget} is spent"
        f" for one {unit}, against the {against}, at delta {status['spent'][unit]['delta']:g}"
        for unit in _UNITS
        if unit in status["spent"]
    ]


def _number(epsilon: float | None) -> str:
    return "without bound" if epsilon is None else f"{epsilon:.4f}"
