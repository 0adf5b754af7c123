"""How a secure sum begins, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from fedge.server.admission.validation_result import Rejection
from fedge.server.participants.members import Member
from fedge.shared.secagg import messages
from fedge.shared.secagg.masking import Shape
from fedge.shared.secagg.transcript import Purpose

#: What each exchange is called where people read of it.
NAMES: Final = {
    messages.SHARE: "share",
    messages.MASKED: "masked",
    messages.COMMIT: "commit",
    messages.UNMASK: "unmask",
}
#: Values of a masked vector that are kept to be shown.
SAMPLE: Final = 1024


@dataclass(frozen=True)
class SumRequest:
    """How a sum begins.

    Attributes:
        purpose: what is summed.
        server_round: of the run.
        shape: of its vector.
        messages: exchange 0's requests to some members, in their order, for an attempt's number.
    """

    purpose: Purpose
    server_round: int
    shape: Shape
    messages: Callable[[list[Member], int], list[Message]]


@dataclass(frozen=True)
class UnmaskedSum:
    """A sum that was unmasked.

    Attributes:
        sites: whose vectors are in it, sorted.
        sharers: how many shared, by which the scale is chosen.
        threshold: how many had to stay.
        total: values modulo 2^32, then counters modulo 2^128, without masks.
    """

    sites: tuple[str, ...]
    sharers: int
    threshold: int
    total: NDArray[np.uint32]


@dataclass
class Outcome:
    """What came of the exchanges.

    Attributes:
        unmasked_sums: one for each group whose sum was unmasked.
        failed: why the others were not, a line each.
        lost: by attempt: who dropped out, at which exchange, and why.
        attempts: that were made.
        sent, received: bytes.
        sample: the first values of one masked vector, as it came.
        ledgers: SHA-256 (hex) of each site's privacy ledger, where they say it.
    """

    unmasked_sums: list[UnmaskedSum] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    lost: list[dict[str, Any]] = field(default_factory=list)
    attempts: int = 0
    sent: int = 0
    received: int = 0
    sample: list[int] = field(default_factory=list)
    ledgers: dict[str, str] = field(default_factory=dict)
    out: dict[str, Rejection] = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        """The sites whose vectors are in an unmasked sum, sorted."""
        return sorted(site for unmasked_sums in self.unmasked_sums for site in unmasked_sums.sites)

    def rejections(self, invited: Sequence[Member]) -> list[Rejection]:
        """Why members that were invited are in none of the sums."""
        within = set(self.sites)
        return [self.out[m.site] for m in invited if m.site not in within and m.site in self.out]
