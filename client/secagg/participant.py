"""The exchanges of secure aggregation at the worker: which session, which step, and each step once.

The same request twice has the same answer, byte for byte, as a lost reply is asked for again; another request for a
step that was taken is a deviation of the server and ends the session. Sessions live in memory alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedge.client import requests
from fedge.client.requests import Address
from fedge.client.secagg import input_vector as contributions
from fedge.client.secagg.input_vector import InputVector
from fedge.client.secagg.replay_guard import ReplayGuard
from fedge.client.secagg.session import (
    PROTOCOL_VIOLATION,
    Anchors,
    PeerError,
    Session,
    protocol_violation,
)
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.secagg import messages, request_digest, transcript
from fedge.shared.secagg.messages import BEGIN, STEPS
from fedge.shared.secagg.transcript import Attempt, Purpose
from fedge.shared.secagg.vector_layout import Bounds

_NO_KEYS: Final = 426
log = logging.getLogger(__name__)

_PURPOSE_OF: Final[Mapping[str, Purpose]] = {kind: purpose for purpose, kind in BEGIN.items()}
_MAX_BOUND: Final = 1e6


@dataclass
class _Open:
    """A session, and what it has answered."""

    session: Session
    step: int = 0
    digest: bytes = b""
    reply: RecordDict = field(default_factory=RecordDict)


def is_secure(content: RecordDict) -> bool:
    """Whether a request begins or continues a secure sum."""
    return messages.SECURE in content


def bounds_of(content: RecordDict) -> Bounds:
    """The bounds that a request states.

    Raises:
        SiteError: 414, one is missing or not a number in range.
    """
    values = _values(content)

    def bound(key: str) -> float:
        value = values.get(key)
        if not isinstance(value, float) or not 0 < value <= _MAX_BOUND:
            raise requests.refuse(key, f"a number above 0, at most {_MAX_BOUND:g}", value)
        return value

    return Bounds(
        bound(messages.CLIPPING_BOUND),
        bound(messages.VALUE_BOUND),
        bound(messages.STATE_BOUND),
        _integer(values, messages.WEIGHT_CAP, 1, 2**23),
    )


def min_sites_of(content: RecordDict) -> int:
    """The fewest sites of a sum with distributed noise, as the request says.

    Raises:
        SiteError: 414, it says none.
    """
    return _integer(_values(content), messages.MIN_SITES, transcript.MIN_SITES, protocol.MAX_SITES)


class Participant:
    """The secure sums of one site.

    Args:
        anchors: the site's own.
        answered: which rounds are answered for good.
    """

    def __init__(self, anchors: Anchors, answered: ReplayGuard) -> None:
        self._anchors, self._answered = anchors, answered
        self._open: dict[Purpose, _Open] = {}

    def begin(
        self,
        kind: str,
        content: RecordDict,
        address: Address,
        seed: int,
        contribution: Callable[[], InputVector],
        min_sites: int = 0,
        *,
        exact: bool = False,
    ) -> ConfigRecord:
        """Exchange 0: take part in a sum.

        Args:
            kind: the message type, of BEGIN.
            content: the request.
            address: of it.
            seed: of the run, for the rounding.
            contribution: computes what the site adds.
            min_sites: fewest sites of this sum, besides what the policy asks for.
            exact: it counts held-out examples without noise.

        Returns:
            The signed bundle of two new keys.

        Raises:
            SiteError: 423, the round is answered; 422, the attempt is not a new one; 414; what ``contribution`` raises.
        """
        purpose, server_round = _PURPOSE_OF[kind], address.server_round
        if purpose == "statistics" and server_round != 0:
            # One sum a run: those of several rounds, over other sites each, would tell one site's.
            raise requests.refuse(protocol.SERVER_ROUND, "0 for statistics", server_round)
        _integer(_values(content), messages.PROTOCOL, transcript.VERSION, transcript.VERSION)
        number = _integer(_values(content), messages.ATTEMPT, 1, 1000)
        self._answered.require_new(address.run_id, purpose, server_round)
        last = self._open.get(purpose)
        if last is not None and last.session.attempt.run_id == address.run_id:
            before = (last.session.attempt.server_round, last.session.attempt.number)
            if (server_round, number) <= before:
                raise protocol_violation(
                    "attempt", f"come after {before}, as each has new keys", (server_round, number)
                )
        attempt = Attempt(
            request_digest.digest(kind, content), address.run_id, purpose, server_round, number
        )
        given = contribution()
        # Whatever was open is over: a server that asks for the next sum has had, or has lost, the one before. What was
        # answered stays: one that died since may ask for it again.
        for opened in self._open.values():
            opened.session.wipe()

        def note() -> None:
            self._answered.note(address.run_id, purpose, server_round)
            if purpose == "evaluate" and exact:
                self._answered.note_evaluated(address.run_id, session.survivors)

        def allow(survivors: frozenset[str], least: int) -> None:
            if purpose == "qualify" and exact:
                self._answered.require_no_single_site(address.run_id, survivors, least)

        key = contributions.rounding_key(seed, purpose, server_round, self._anchors.site)
        session = Session(self._anchors, attempt, given, key, note, min_sites, allow)
        self._open[purpose] = _Open(session)
        log.info("%s, attempt %d: takes part", purpose, number)
        return messages.record({messages.BUNDLE: session.bundle.encode()})

    def step(self, kind: str, content: RecordDict, address: Address) -> RecordDict:
        """Exchanges 1 to 4.

        Returns:
            Records of the reply; the name of a peer and a number where the fault is with that peer.

        Raises:
            SiteError: 422, the server deviates, and the session is over; 426, this process has begun no such sum, as
                its secrets went with the one before; 423, 424, 414.
        """
        values = _values(content)
        name = values.get(messages.PURPOSE)
        purpose = next((known for known in BEGIN if known == name), None)
        if purpose is None:
            raise requests.refuse(messages.PURPOSE, f"one of {', '.join(BEGIN)}", name)
        opened = self._open.get(purpose)
        number = _integer(values, messages.ATTEMPT, 1, 1000)
        asked = (address.run_id, address.server_round, number)
        if opened is None:
            raise SiteError(
                _NO_KEYS,
                f"{purpose}: must have been begun by this worker, got {asked[0]} {asked[1:]}",
            )
        if asked != _identity(opened.session.attempt):
            raise protocol_violation("attempt", "be the one that this site has begun", asked)
        digest = hashlib.sha256(
            json.dumps(dict(values), sort_keys=True, default=request_digest.no_json).encode()
        ).digest()
        at = STEPS.index(kind) + 1
        if at == opened.step and digest == opened.digest:
            log.info("%s: asked again, answered as before", kind)
            return opened.reply
        try:
            if kind == messages.UNMASK and at == opened.step + 2:
                # As where the request to sign was lost: the server asks all, and cannot know.
                message = (
                    f"{purpose}: must have been asked to sign the survivors, got no such request"
                )
                raise SiteError(_NO_KEYS, message)
            if at != opened.step + 1:
                raise protocol_violation(
                    "exchange", f"be number {opened.step + 1} of this attempt", at
                )
            reply = _STEPS[kind](opened.session, values)
        except PeerError as error:
            opened.session.wipe()
            opened.step = len(STEPS) + 1
            log.error("FE-%d %s", error.code, error.message)
            return RecordDict(
                {
                    messages.SECURE: messages.record(
                        {messages.BLAMED: error.peer, messages.CODE: error.code}
                    )
                }
            )
        except ValueError as error:
            opened.session.wipe()
            opened.step = len(STEPS) + 1
            raise SiteError(PROTOCOL_VIOLATION, f"{kind}: {error}") from None
        except SiteError:
            opened.session.wipe()
            opened.step = len(STEPS) + 1
            raise
        opened.step, opened.digest, opened.reply = at, digest, reply
        return reply


def _share(session: Session, values: ConfigRecord) -> RecordDict:
    shared = session.share(messages.bundles_of(values))
    return _reply(
        {
            messages.COMMITMENT: shared.commitment,
            messages.SIGNATURE: shared.signature,
            messages.ENCRYPTED_SHARES: shared.encrypted_shares,
        }
    )


def _masked(session: Session, values: ConfigRecord) -> RecordDict:
    masked = session.masked(messages.sharers_of(values))
    reply = _reply(
        {
            messages.SIGNATURE: masked.signature,
            messages.CHECKSUM: masked.checksum.to_bytes(8, "big"),
        }
    )
    reply[protocol.ARRAYS] = messages.vector_record(masked.vector.view(np.uint32))
    return reply


def _commit(session: Session, values: ConfigRecord) -> RecordDict:
    most = protocol.MAX_SITES * 65
    survivors = transcript.unpack_sites(messages.data(values, messages.SURVIVORS, most))
    return _reply({messages.SIGNATURE: session.commit(survivors)})


def _unmask(session: Session, values: ConfigRecord) -> RecordDict:
    return _reply({messages.SHARES: session.unmask(messages.signatures_of(values))})


_STEPS: Final[Mapping[str, Callable[[Session, ConfigRecord], RecordDict]]] = {
    messages.SHARE: _share,
    messages.MASKED: _masked,
    messages.COMMIT: _commit,
    messages.UNMASK: _unmask,
}


def _reply(values: Mapping[str, int | float | str | bytes]) -> RecordDict:
    return RecordDict({messages.SECURE: messages.record(values)})


def _identity(attempt: Attempt) -> tuple[str, int, int]:
    return attempt.run_id, attempt.server_round, attempt.number


def _values(content: RecordDict) -> ConfigRecord:
    try:
        return messages.values_of(content)
    except ValueError as error:
        raise SiteError(414, f"request: {error}") from None


def _integer(values: ConfigRecord, key: str, low: int, high: int) -> int:
    try:
        return messages.integer(values, key, low, high)
    except ValueError as error:
        raise SiteError(414, str(error)) from None
