"""What rounds.jsonl says of secure sums, as plain values for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from fedge.server.report.json_values import mapping, sequence, text, whole
from fedge.server.report.records import Round, Run

#: What the server calls the exchanges.
EXCHANGES: Final = ("begin", "share", "masked", "commit", "unmask")


@dataclass(frozen=True)
class Loss:
    """A site that dropped out of an attempt at the sum of the updates, or of an evaluation."""

    round: int
    what: str
    attempt: int
    site: str
    exchange: str
    reason: str


@dataclass(frozen=True)
class Sum:
    """What a round's line says of its secure sums.

    Attributes:
        groups: sites whose vectors were opened, by group.
        attempts: that were made at the updates; 0 where too few sites were there to try.
        threshold: sites that had to stay, of the first group; None where no sum was opened.
        counts: ``clipped`` and ``capped`` sites, ``saturated`` values.
        lost: who dropped out of the sum of the updates.
        evaluated: sites in the evaluation's sum; 0 where it was not opened, None where there was no evaluation.
        evaluation_reason: why it was not opened.
        evaluation_lost: who dropped out of it.
    """

    groups: tuple[tuple[str, ...], ...]
    attempts: int
    threshold: int | None
    counts: Mapping[str, int]
    lost: tuple[Loss, ...]
    evaluated: int | None
    evaluation_reason: str
    evaluation_lost: tuple[Loss, ...]

    def answered(self) -> dict[str, int]:
        """How many sites answered each exchange of the attempt that was opened, after who was asked."""
        opened = set(chain.from_iterable(self.groups))
        # Groups may be opened in different attempts; one sum is opened in the last.
        counted = [x for x in self.lost if len(self.groups) > 1 or x.attempt == self.attempts]
        last = {loss.site: loss for loss in counted}
        out = Counter(loss.exchange for site, loss in last.items() if site not in opened)
        late = Counter(
            x.exchange for x in self.lost if x.site in opened and x.attempt == self.attempts
        )
        there = len(opened)
        return {
            "asked": there + out["begin"] + out["share"] + out["masked"],
            "begin": there + out["share"] + out["masked"],
            "share": there + out["masked"],
            "masked": there,
            "commit": there - late["commit"],
            "unmask": there - late["unmask"],
        }


def _losses(r: Round, found: Any, what: str) -> tuple[Loss, ...]:
    return tuple(
        Loss(
            r.number,
            what,
            whole(x.get("attempt")) or 1,
            *(text(x.get(key)) for key in ("site", "exchange", "reason")),
        )
        for x in map(mapping, sequence(found))
    )


def sum_of(r: Round) -> Sum | None:
    """A round's secure sums; None where it had none."""
    if not r.secure:
        return None
    groups = (sequence(group) for group in sequence(r.secure.get("groups")))
    evaluation = mapping(r.secure.get("evaluation"))
    return Sum(
        tuple(tuple(s for s in group if isinstance(s, str)) for group in groups),
        whole(r.secure.get("attempts")) or 0,
        whole(r.secure.get("threshold")),
        {name: whole(r.secure.get(name)) or 0 for name in ("clipped", "capped", "saturated")},
        _losses(r, r.secure.get("lost"), "update"),
        (whole(evaluation.get("sites")) or 0) if evaluation else None,
        text(evaluation.get("reason")),
        _losses(r, evaluation.get("lost"), "evaluation"),
    )


def sums(run: Run) -> list[tuple[Round, Sum]]:
    """The rounds that tried a secure sum."""
    found = ((r, sum_of(r)) for r in run.rounds)
    return [(r, s) for r, s in found if s is not None]
