"""The result of validating a reply, and what a valid reply must look like."""

from __future__ import annotations

import math
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
    """Why a site's reply is not accepted in this round.

    Attributes:
        site: name of the site, or "node ID" where it is not known.
        code: FE number.
        outcome: kind of the rejection.
        reason: in words.
    """

    site: str
    code: int
    outcome: Outcome
    reason: str

    def to_json(self) -> dict[str, str]:
        """The entry in rounds.jsonl."""
        return {
            "site": self.site,
            "code": f"FE-{self.code}",
            "outcome": self.outcome,
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Drop:
    """A metric that was left out of a reply that is accepted otherwise."""

    site: str
    metric: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """The entry in rounds.jsonl."""
        return {"site": self.site, "code": "FE-405", "metric": self.metric, "reason": self.reason}


@dataclass(frozen=True)
class Registration:
    """What a site reports about itself before it takes part.

    Attributes:
        site: name of the site.
        train_examples, test_examples: numbers of examples; 0 under secure aggregation.
        statistics: sums over its training examples; None where the task fits none, and under secure aggregation.
    """

    site: str
    train_examples: int
    test_examples: int
    statistics: Statistics | None


@dataclass(frozen=True)
class Expected:
    """What a reply of this round must look like.

    Attributes:
        run_id, server_round: the run and the round that it must answer.
        reference: tensor name -> the array that was sent; a site's tensors must have these names, shapes and dtypes,
            and its update is the difference to them. Control variates are compared with zero.
        policy: the ``admission`` section, with the bounds.
        needs_loss: the strategy weighs by the training loss, so that an invalid one rejects the update.
        counters: names of the counters that an evaluation may hold.
        private: the sites train under differential privacy: they report no loss, but the epsilon that they have spent.
        noise_norm: L2 norm by which a site's own noise may move its update beyond the bound; 0 without noise.
        noised: the noise on an evaluation's counters; None where they are exact.
        delta: at which sites tell the epsilon that they have spent.
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
    delta: float = 1e-5

    @property
    def noised_range(self) -> tuple[float, float]:
        """Between which values noise may bring a counter: a share where a site is the unit, else a count."""
        if self.noised is None:
            return -math.inf, math.inf
        most = 1 if self.noised.unit == "site" else self.policy.max_examples
        return -self.noised.max_noise, most + self.noised.max_noise


@dataclass(frozen=True)
class Evaluation:
    """Admitted counters of one site's test split.

    Attributes:
        site: name of the site.
        counters: name -> count.
        epsilon: what the site's privacy budget account has spent with them, against the model consumers and against
            the server, and the delta of both, as the site reports it; None where the counters are exact.
        ledger: SHA-256 (hex) of the site's privacy ledger.
    """

    site: str
    counters: dict[str, float]
    epsilon: tuple[float, float, float] | None = None
    ledger: str | None = None


@dataclass
class Verdict:
    """The result of validating one reply: at most one of ``update``, ``evaluation`` and ``rejection`` is set."""

    update: Update | None = None
    evaluation: Evaluation | None = None
    rejection: Rejection | None = None
    drops: list[Drop] = field(default_factory=list)


def printable(value: object, limit: int = 64) -> str:
    """An untrusted value as plain text of at most ``limit`` characters, without control characters or line breaks."""
    text = value if isinstance(value, str) else repr(value)[: 4 * limit]
    text = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


#: Flower's number for an exception in a ClientApp; and how many characters of its text are searched.
_CLIENT_APP_RAISED, _MAX_REASON = 2, 2000


def reported(error: Error) -> int | None:
    """The number of the error catalogue that a site's error names; None where it names none.

    A ClientApp that cannot start can only raise an exception: then the number is in the exception's text.
    """
    code = error.code
    if type(code) is int and code in CATALOGUE:
        return code
    if code == _CLIENT_APP_RAISED and isinstance(error.reason, str):
        match = re.search(r"\bFE-([34]\d\d)\b", error.reason[:_MAX_REASON])
        if match and int(match[1]) in CATALOGUE:
            return int(match[1])
    return None


def reported_words(error: Error) -> str:
    """A site's error as the round's line reports it: its number and the number's title, nothing of its text."""
    code = reported(error)
    shown = (
        "an error without a known number"
        if code is None
        else f"FE-{code} ({CATALOGUE[code].title})"
    )
    return f"the site reported {shown}; its text is in the site's log"
