"""What goes into a site's privacy ledger and comes out of it: charges, budgets, and what is spent."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from typing import Final, Literal, TypeAlias, get_args

from fedge.shared.config.privacy import Unit
from fedge.shared.privacy.accounting.epsilon import Release

Purpose: TypeAlias = Literal["train", "evaluate", "statistics", "calibrate", "qualify"]


_MAX_STEPS: Final = 10**9
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Charge:
    """One release of noised data.

    Attributes:
        study: the privacy budget account that it is charged to.
        unit: what the noise hides: one example, or the whole site.
        run_id: fedge's id of the run.
        server_round: of the run.
        purpose: what was asked for.
        attempt: of the round; fresh noise for the same round is a charge of its own.
        mechanism: its name in the configuration.
        release: what accounting needs of it.
        delta: at which the request accounts. Kept only; the ledger accounts at the budget's.
        digest: SHA-256 (hex) of the request that it answers.

    Raises:
        ValueError: a value is out of its range.
    """

    study: str
    unit: Unit
    run_id: str
    server_round: int
    purpose: Purpose
    attempt: int
    mechanism: str
    release: Release
    delta: float
    digest: str

    def __post_init__(self) -> None:
        for name in ("study", "run_id", "mechanism"):
            text = getattr(self, name)
            if not (isinstance(text, str) and 1 <= len(text) <= 128 and text.isprintable()):
                raise ValueError(f"{name}: must be 1 to 128 printable characters, got {text!r:.80}")
        for name, choices in (("unit", get_args(Unit)), ("purpose", get_args(Purpose))):
            if getattr(self, name) not in choices:
                wanted = " or ".join(choices)
                raise ValueError(f"{name}: must be {wanted}, got {getattr(self, name)!r:.80}")
        for name in ("server_round", "attempt"):
            number = getattr(self, name)
            if type(number) is not int or not 0 <= number < 2**31:
                raise ValueError(f"{name}: must be 0 to 2^31 - 1, got {number!r:.80}")
        if not 1 <= self.release.steps <= _MAX_STEPS:
            raise ValueError(f"steps: must be 1 to {_MAX_STEPS}, got {self.release.steps}")
        check_delta(self.delta)
        if not _DIGEST.fullmatch(self.digest):
            raise ValueError(f"digest: must be SHA-256 in hexadecimal, got {self.digest!r:.80}")


#: What a record holds of a charge under the same name; the release's parts lie beside them.
OF_CHARGE: Final = tuple(field.name for field in fields(Charge) if field.name != "release")


@dataclass(frozen=True)
class Budget:
    """What a privacy budget account (study) may spend on a unit.

    Attributes:
        epsilon: the maximum; a charge that ends exactly there is accepted.
        delta: at which epsilon is computed.
        against: whose epsilon counts. The server's is never the smaller one, as it sees who was sampled.

    Raises:
        ValueError: a value is out of its range.
    """

    epsilon: float
    delta: float
    against: Literal["server", "consumers"] = "server"

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon: must be finite and at least 0, got {self.epsilon}")
        check_delta(self.delta)
        if self.against not in ("server", "consumers"):
            raise ValueError(f"against: must be server or consumers, got {self.against!r:.80}")


@dataclass(frozen=True)
class Spent:
    """Epsilon against the model's consumers, and against the server, after this many charges, at this delta."""

    consumers: float
    server: float
    charges: int
    delta: float


@dataclass(frozen=True)
class Entry:
    """A charge as the ledger holds it.

    Attributes:
        id: 1, 2, ... over all studies.
        time: UTC, ISO 8601.
        charge: as it was made.
        epsilon_consumers: epsilon of its study and unit up to here against the model's consumers, at
            ``epsilon_delta``.
        epsilon_server: the same against the server.
        epsilon_delta: the budget's, when it was charged.
        hash: of the chain up to here.
    """

    id: int
    time: str
    charge: Charge
    epsilon_consumers: float
    epsilon_server: float
    epsilon_delta: float
    hash: str


def check_delta(delta: float) -> None:
    """Check that a delta is within its range.

    Raises:
        ValueError: it is not within (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta: must be within (0, 1), got {delta}")
