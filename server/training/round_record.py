"""The record of a round, collected while the round goes on: its line in rounds.jsonl."""

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
from fedge.server.transport.exchange import Exchange, no_reply_reason


@dataclass
class RoundRecord:
    """What a round's line in rounds.jsonl is made of.

    Attributes:
        invited: sites that are asked to train.
        rejections: sites without an accepted reply, each with the reason.
        drops: metrics that were left out of accepted replies.
        metrics: metrics of the evaluation.
        sent, received: payload in bytes.
        secure: facts about the secure sums; None without secure aggregation.
        ledgers: site -> SHA-256 (hex) of its privacy ledger.
        central: facts about the server's noise; None without it.
        masked_epsilon: epsilon of the run under distributed noise, by adversary; None without it.
        spent: site -> the epsilon that it reported with an evaluation: model consumers', server's, at which delta.
    """

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
    spent: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.rejections = list(self.rejections)

    @classmethod
    def from_line(cls, line: Line) -> RoundRecord:
        """Continue the record of a committed round; its ``metrics`` are those in addition to the line's."""
        rejections = [
            Rejection(r["site"], int(r["code"].removeprefix("FE-")), r["outcome"], r["reason"])
            for r in line["rejected"]
        ]
        moved = line["bytes"]
        return cls(
            list(line["invited"]), rejections, list(line["dropped"]), {}, moved["sent"], moved["received"]
        )  # fmt: skip

    def completed(self, line: Line, seconds: float) -> Line:
        """The line of a committed round, completed by the evaluation that followed.

        Args:
            line: the line as it was committed.
            seconds: duration of the round, the evaluation included.
        """
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
        """Add the rejection and the dropped metrics of a validated reply."""
        if verdict.rejection is not None:
            self.rejections.append(verdict.rejection)
        self.drops += [drop.to_json() for drop in verdict.drops]

    def add_evaluation(self, evaluation: Evaluation) -> None:
        """Add what an evaluation with noise reports about the site's ledger."""
        if evaluation.epsilon is not None:
            self.spent[evaluation.site] = evaluation.epsilon
        if evaluation.ledger is not None:
            self.ledgers[evaluation.site] = evaluation.ledger

    def count(self, result: Exchange, members: list[Member], deadline: float) -> None:
        """Add an exchange's bytes, and its late, missing, duplicate and unexpected replies.

        Args:
            result: outcome of the exchange.
            members: the members to which a request was sent.
            deadline: of the exchange, in seconds.
        """
        self.sent += result.sent
        self.received += result.received
        site = {m.node_id: m.site for m in members}
        self.rejections += [
            *(
                Rejection(site[n], 408, "late", f"reply after the deadline of {deadline:g} s")
                for n in result.late
            ),
            *(
                Rejection(site[n], 409, "absent", no_reply_reason(result, n, deadline))
                for n in result.timed_out
            ),
            *(
                Rejection(site[n], 407, "duplicate", "a second reply; the first one counts")
                for n in result.duplicates
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
        """Add the bytes of a secure sum, and the members that are not in it.

        Args:
            sent: payload in bytes.
            received: payload in bytes.
            rejections: why members are not in the sum; one of a site that is rejected already is left out.
        """
        self.sent += sent
        self.received += received
        rejected = {r.site for r in self.rejections}
        self.rejections += [r for r in rejections if r.site not in rejected]

    def line(
        self,
        server_round: int,
        reason: str | None,
        result: RoundResult,
        model_sha256: str,
        seconds: float,
    ) -> Line:
        """The round's line in rounds.jsonl.

        Args:
            server_round: number of the round.
            reason: why the round makes no model; None where it makes one.
            result: the accepted updates, single or summed.
            model_sha256: digest (hex) of the model after the round.
            seconds: duration of the round.
        """
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
        # The epsilon that a site reports with an evaluation is later than the one of its update.
        if epsilon := updates.epsilon(result) | self.spent:
            line["privacy"] = _epsilons(epsilon)
        if ledgers := updates.ledgers(result) | self.ledgers:
            line["privacy_ledgers"] = ledgers
        if self.central is not None:
            line["central"] = self.central
        if self.masked_epsilon is not None:
            line[privacy_cost.KEY] = self.masked_epsilon
        return line if self.secure is None else line | {"secure": self.secure}


def _epsilons(
    spent: Mapping[str, tuple[float, float, float]],
) -> dict[str, dict[str, float | None]]:
    """Epsilon by site and adversary; None for infinity (a server that gets updates without noise), not in JSON."""
    return {
        site: {
            "consumers": consumers,
            "server": server if math.isfinite(server) else None,
            "delta": delta,
        }
        for site, (consumers, server, delta) in spent.items()
    }
