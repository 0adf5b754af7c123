"""What the admission gate says, and what it is told to expect."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from flwr.app import Error

from fedge.server.aggregation.updates import Update
from fedge.shared.config.sections import AdmissionSection
from fedge.shared.error_catalogue import CATALOGUE
from fedge.shared.preprocessing.steps import Statistics
from fedge.shared.privacy.mechanisms.noised_counts import NoisedCounts
from fedge.shared.wire.tensors import NDArrays

Outcome: TypeAlias = Literal["rejected", "error", "stale", "duplicate", "late", "absent"]


@dataclass(frozen=True)
class Rejection:
    """Why a site's reply does not count in this round."""

    site: str
    code: int
    outcome: Outcome
    reason: str

    def to_json(self) -> dict[str, str]:
        """As it stands in rounds.jsonl."""
        return {
            "site": self.site,
            "code": f"FE-{self.code}",
            "outcome": self.outcome,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Drop:
    """A metric that was left out while the reply counts."""

    site: str
    metric: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """As it stands in rounds.jsonl."""
        return {"site": self.site, "code": "FE-405", "metric": self.metric, "reason": self.reason}


@dataclass(frozen=True)
class Registration:
    """What a site says of itself before the first round."""

    site: str
    train_examples: int
    test_examples: int
    statistics: Statistics | None


@dataclass(frozen=True)
class Expected:
    """What a reply of this round must look like.

    Attributes:
        run_id, server_round: whom and what it must answer.
        reference: the arrays sent out; a site's tensors must have their names, shapes and types, and its update
            is the difference to them. Control variates are compared with zero.
        policy: bounds.
        needs_loss: the strategy weighs by the training loss, so a bad one rejects the update.
        counters: names that an evaluation may hold.
        private: the sites train under differential privacy: they tell no loss, but what they have spent.
        noise_norm: how far a site's own noise may move its update beyond the bound, 0 where it adds none.
        noised: how an evaluation's counters got noise, None where they are exact.
    """

    run_id: str
    server_round: int
    reference: NDArrays
    policy: AdmissionSection
    needs_loss: bool = False
    counters: tuple[str, ...] = ()
    private: bool = False
    noise_norm: float = 0.0
    noised: NoisedCounts | None = None


@dataclass(frozen=True)
class Evaluation:
    """Admitted counters of one site's test split.

    Attributes:
        epsilon: what the site's study has spent with them, as it says; None where the counters are exact.
        ledger: SHA-256 (hex) of the site's privacy ledger.
    """

    site: str
    counters: dict[str, float]
    epsilon: tuple[float, float] | None = None
    ledger: str | None = None


@dataclass
class Verdict:
    """What the gate made of one reply: at most one of ``update``, ``evaluation`` and ``rejection`` is set."""

    update: Update | None = None
    evaluation: Evaluation | None = None
    rejection: Rejection | None = None
    drops: list[Drop] = field(default_factory=list)


def printable(value: object, limit: int = 64) -> str:
    """A foreign value as short plain text: no control characters, no line breaks, bounded."""
    text = value if isinstance(value, str) else repr(value)[: 4 * limit]
    text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


#: Flower's number for an exception in a ClientApp; and what of its text is looked at.
_CLIENT_APP_RAISED, _LONGEST_REASON = 2, 2000


def reported(error: Error) -> int | None:
    """The number of the catalogue that a site's error stands for; None where it names none.

    A ClientApp that cannot even start has no other way than to raise: then the number is in the text.
    """
    code = error.code
    if type(code) is int and code in CATALOGUE:
        return code
    if code == _CLIENT_APP_RAISED and isinstance(error.reason, str):
        found = re.search(r"\bFE-([34]\d\d)\b", error.reason[:_LONGEST_REASON])
        if found and int(found[1]) in CATALOGUE:
            return int(found[1])
    return None


def reported_words(error: Error) -> str:
    """A site's error as the round's line tells it: its number and the number's title, nothing of its text."""
    code = reported(error)
    shown = (
        "an error without a known number"
        if code is None
        else f"FE-{code} ({CATALOGUE[code].title})"
    )
    return f"the site reported {shown}; its text is in the site's log"
