"""What happened in a round, gathered while it happens: the line of rounds.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedge.server.admission.validation_result import Evaluation, Rejection, Verdict
from fedge.server.aggregation import privacy_cost, updates
from fedge.server.aggregation.updates import RoundResult
from fedge.server.participants.members import Member
from fedge.server.runs.journal import Line
from fedge.server.transport.exchange import Exchange, absence


@dataclass
class RoundRecord:
    """What a round's line is made of."""

    invited: list[str]
    rejections: list[Rejection]
    drops: list[dict[str, str]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    sent: int = 0
    received: int = 0
    secure: dict[str, Any] | None = None
    ledgers: dict[str, str] = field(default_factory=dict)
    central: dict[str, Any] | None = None
    masked_epsilon: dict[str, float | None] | None = None
    spent: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rejections = list(self.rejections)

    @classmethod
    def of(cls, line: Line) -> RoundRecord:
        """What a line tells of a round, to go on from there; ``metrics`` is what comes in addition."""
        rejections = [
            Rejection(r["site"], int(r["code"].removeprefix("FE-")), r["outcome"], r["reason"])
            for r in line["rejected"]
        ]
        moved = line["bytes"]
        return cls(
            list(line["invited"]), rejections, list(line["dropped"]), {}, moved["sent"], moved["received"]
        )  # fmt: skip

    def completed(self, line: Line, seconds: float) -> Line:
        """The line of a committed round with what an evaluation has brought since."""
        more: Line = {
            "rejected": [r.to_json() for r in self.rejections],
            "dropped": self.drops,
            "metrics": {**line["metrics"], **self.metrics},
            "seconds": round(seconds, 4),
            "bytes": {"sent": self.sent, "received": self.received},
        }
        if self.spent:
            more["privacy"] = {**line.get("privacy", {}), **_epsilons(self.spent)}
        if self.ledgers:
            more["privacy_ledgers"] = {**line.get("privacy_ledgers", {}), **self.ledgers}
        return line | more

    def take(self, verdict: Verdict) -> None:
        """Note what the gate said."""
        if verdict.rejection is not None:
            self.rejections.append(verdict.rejection)
        self.drops += [drop.to_json() for drop in verdict.drops]

    def told(self, evaluation: Evaluation) -> None:
        """Note what an evaluation with noise says of the site's ledger."""
        if evaluation.epsilon is not None:
            self.spent[evaluation.site] = evaluation.epsilon
        if evaluation.ledger is not None:
            self.ledgers[evaluation.site] = evaluation.ledger

    def count(self, result: Exchange, asked: list[Member], deadline: float) -> None:
        """Note bytes, and who was late, absent, heard twice or unasked."""
        self.sent += result.sent
        self.received += result.received
        site = {m.node_id: m.site for m in asked}
        self.rejections += [
            *(
                Rejection(site[n], 408, "late", f"reply after the deadline of {deadline:g} s")
                for n in result.late
            ),
            *(
                Rejection(site[n], 409, "absent", absence(result, n, deadline))
                for n in result.absent
            ),
            *(
                Rejection(site[n], 407, "duplicate", "a second reply; the first one counts")
                for n in result.again
            ),
            *(
                Rejection(
                    site.get(n, f"node {n}"),
                    406,
                    "stale",
                    "a reply to nothing that was asked in this exchange",
                )
                for n in result.stray
            ),
        ]

    def add(self, sent: int, received: int, rejections: list[Rejection]) -> None:
        """Note the bytes of a secure sum, and who was asked and is not in it."""
        self.sent += sent
        self.received += received
        told = {r.site for r in self.rejections}
        self.rejections += [r for r in rejections if r.site not in told]

    def line(
        self,
        server_round: int,
        reason: str | None,
        result: RoundResult,
        model_sha256: str,
        seconds: float,
    ) -> Line:
        """The round's line in rounds.jsonl."""
        loss = updates.train_loss(result)
        train = {} if loss is None else {"loss": loss}
        line: Line = {
            "round": server_round,
            "outcome": "committed" if reason is None else "skipped",
            "reason": reason,
            "invited": self.invited,
            "trained": updates.sites(result),
            "rejected": [r.to_json() for r in self.rejections],
            "dropped": self.drops,
            "metrics": {"train": train, **self.metrics},
            "examples": updates.examples(result),
            "seconds": round(seconds, 4),
            "bytes": {"sent": self.sent, "received": self.received},
            "model_sha256": model_sha256,
        }
        # What an evaluation says was spent comes after what the training said.
        if epsilon := updates.epsilon(result) | self.spent:
            line["privacy"] = _epsilons(epsilon)
        if ledgers := updates.ledgers(result) | self.ledgers:
            line["privacy_ledgers"] = ledgers
        if self.central is not None:
            line["central"] = self.central
        if self.masked_epsilon is not None:
            line[privacy_cost.KEY] = self.masked_epsilon
        return line if self.secure is None else line | {"secure": self.secure}


def _epsilons(told: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float | None]]:
    """By site and reader. None: a server that gets updates without noise learns without bound; JSON has no infinity."""
    return {
        site: {"consumers": consumers, "server": server if math.isfinite(server) else None}
        for site, (consumers, server) in told.items()
    }
