"""The secure sums of rounds.jsonl, as plain values for the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from fedge.server.report.json_values import mapping, sequence, text, whole
from fedge.server.report.records import Round, Run

#: Names of the exchanges, as the server records them.
EXCHANGES: Final = ("begin", "share", "masked", "commit", "unmask")


@dataclass(frozen=True)
class Dropout:
    """A site that dropped out of an attempt at a secure sum.

    Attributes:
        kind: of the sum, ``update`` or ``evaluation``.
        exchange: at which it dropped out, one of ``EXCHANGES``.
    """

    round: int
    kind: str
    attempt: int
    site: str
    exchange: str
    reason: str


@dataclass(frozen=True)
class Sum:
    """The secure sums of a round.

    Attributes:
        groups: sites in each group's unmasked sum of updates.
        attempts: at the sum of the updates; 0 where too few sites were connected.
        threshold: smallest number of sites that must not drop out, of the first group; None where no sum was unmasked.
        counts: ``clipped`` and ``capped`` sites, ``saturated`` values.
        dropouts: sites that dropped out of the sum of the updates.
        evaluated: sites in the evaluation's sum; 0 where it was not unmasked, None where there was no evaluation.
        evaluation_reason: why it was not unmasked.
        evaluation_dropouts: sites that dropped out of it.
    """

    groups: tuple[tuple[str, ...], ...]
    attempts: int
    threshold: int | None
    counts: Mapping[str, int]
    dropouts: tuple[Dropout, ...]
    evaluated: int | None
    evaluation_reason: str
    evaluation_dropouts: tuple[Dropout, ...]

    def answered(self) -> dict[str, int]:
        """Number of sites that answered each exchange of the attempt that was unmasked, after the number asked."""
        unmasked = set(chain.from_iterable(self.groups))
        # Groups may be unmasked in different attempts; a single sum is unmasked in the last.
        counted = [x for x in self.dropouts if len(self.groups) > 1 or x.attempt == self.attempts]
        last = {dropout.site: dropout for dropout in counted}
        out = Counter(dropout.exchange for site, dropout in last.items() if site not in unmasked)
        late = Counter(
            x.exchange for x in self.dropouts if x.site in unmasked and x.attempt == self.attempts
        )
        there = len(unmasked)
        return {
            "asked": there + out["begin"] + out["share"] + out["masked"],
            "begin": there + out["share"] + out["masked"],
            "share": there + out["masked"],
            "masked": there,
            "commit": there - late["commit"],
            "unmask": there - late["unmask"],
        }


def _dropouts(r: Round, entries: Any, kind: str) -> tuple[Dropout, ...]:
    return tuple(
        Dropout(
            r.number,
            kind,
            whole(x.get("attempt")) or 1,
            *(text(x.get(key)) for key in ("site", "exchange", "reason")),
        )
        for x in map(mapping, sequence(entries))
    )


def secure_sum(r: Round) -> Sum | None:
    """The secure sums of a round; None where it had none."""
    if not r.secure:
        return None
    groups = (sequence(group) for group in sequence(r.secure.get("groups")))
    evaluation = mapping(r.secure.get("evaluation"))
    return Sum(
        tuple(tuple(s for s in group if isinstance(s, str)) for group in groups),
        whole(r.secure.get("attempts")) or 0,
        whole(r.secure.get("threshold")),
        {name: whole(r.secure.get(name)) or 0 for name in ("clipped", "capped", "saturated")},
        _dropouts(r, r.secure.get("lost"), "update"),
        (whole(evaluation.get("sites")) or 0) if evaluation else None,
        text(evaluation.get("reason")),
        _dropouts(r, evaluation.get("lost"), "evaluation"),
    )


def sums(run: Run) -> list[tuple[Round, Sum]]:
    """The rounds that attempted a secure sum."""
    parsed = ((r, secure_sum(r)) for r in run.rounds)
    return [(r, s) for r, s in parsed if s is not None]
