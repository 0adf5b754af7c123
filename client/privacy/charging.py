"""What a site gives out under differential privacy: charged before it is made, and sent again as it was."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flwr.app import ConfigRecord, RecordDict

from fedge.client import requests
from fedge.client.requests import Address
from fedge.client.settings.privacy_policy import PrivacyPolicy
from fedge.shared import protocol
from fedge.shared.config.privacy import Unit
from fedge.shared.errors import DeployError
from fedge.shared.files import write_atomically
from fedge.shared.privacy.accounting.charges import Budget, Charge, Purpose, Spent
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger.ledger import FILE, Ledger
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.secagg import request_digest
from fedge.shared.wire import frames

log = logging.getLogger(__name__)

#: Folder of a site's home with the last reply of each purpose that was charged.
FOLDER: Final = "privacy"
_DIGEST_BYTES: Final = 32


@dataclass(frozen=True)
class ReleaseRequest:
    """What a noised reply answers.

    Attributes:
        kind: the message type.
        address: run and round.
        digest: SHA-256 of the request, the same for every site.
        delta: at which the run's epsilon is meant.
    """

    kind: str
    address: Address
    digest: bytes
    delta: float

    @classmethod
    def of(cls, kind: str, request: RecordDict, address: Address, delta: float) -> ReleaseRequest:
        """The request's own.

        Raises:
            SiteError: 414, a value in it has no canonical text.
        """
        return cls(kind, address, request_digest.digest(kind, request), delta)


_PURPOSES: Final[Mapping[str, Purpose]] = {
    protocol.TRAIN: "train",
    protocol.EVALUATE: "evaluate",
    protocol.CALIBRATE: "calibrate",
    protocol.QUALIFY: "qualify",
}


def _purpose(release_request: ReleaseRequest) -> Purpose:
    return _PURPOSES[release_request.kind]


class ChargedReplies:
    """The ledger of one site, its noise, and the last replies that were paid for.

    Args:
        home: folder of this site alone.
        policy: of the site, as it is now.
    """

    def __init__(self, home: Path, policy: Callable[[], PrivacyPolicy]) -> None:
        self._home, self._policy = home, policy
        self.entropy = Entropy()

    def answer(
        self,
        release_request: ReleaseRequest,
        unit: Unit,
        mechanism: str,
        release: Release,
        make: Callable[[Spent], RecordDict],
        *,
        once: bool = False,
    ) -> RecordDict:
        """A reply with noise in it, which is charged before it is made.

        The very same request is answered with the very same reply, also by another process: that tells nothing more,
        and costs nothing. Where the reply was lost, new noise is a new charge.

        Args:
            release_request: the request.
            unit: what the noise hides.
            mechanism: its name.
            release: what the reply gives out.
            make: the reply, when it is paid for.
            once: the release is the whole run's, and is charged with its first reply.

        Raises:
            SiteError: 427, the budget would be exceeded; 428, the ledger cannot be relied on; 414, the run was
                charged for another release.
        """
        kept = self._kept(release_request)
        if kept is not None:
            log.info("%s: asked again, answered as before", release_request.kind)
            return kept
        spent = self._paid(release_request, unit, release) if once else None
        reply = make(spent or self.charge(release_request, unit, mechanism, release))
        self._keep(release_request, reply)
        return reply

    def charge(
        self, release_request: ReleaseRequest, unit: Unit, mechanism: str, release: Release
    ) -> Spent:
        """Write down what is about to be given out.

        Returns:
            What the study has then spent on the unit, at the run's delta; the budget counts at the policy's.

        Raises:
            SiteError: 427, the budget would be exceeded; 428, the ledger cannot be relied on.
        """
        policy = self._policy()
        charge = Charge(
            policy.study,
            unit,
            release_request.address.run_id,
            release_request.address.server_round,
            _purpose(release_request),
            0,
            mechanism,
            release,
            release_request.delta,
            release_request.digest.hex(),
        )
        ledger = self._ledger()
        spent = ledger.charge(charge, Budget(policy.epsilon, policy.delta, policy.against))
        log.info(
            "%s: charged to %s, epsilon for one %s is %.4f against the model's consumers, %.4f against the server, "
            "at delta %g",
            release_request.kind, policy.study, unit, spent.consumers, spent.server, spent.delta,
        )  # fmt: skip
        if spent.delta == release_request.delta:
            return spent
        return ledger.spent(policy.study, unit, release_request.delta)

    def _paid(self, release_request: ReleaseRequest, unit: Unit, release: Release) -> Spent | None:
        """What is spent, where this run was charged before; None where it was not."""
        policy, ledger = self._policy(), self._ledger()
        purpose = _purpose(release_request)
        before = [
            entry.charge.release
            for entry in ledger.entries(policy.study)
            if (entry.charge.run_id, entry.charge.purpose)
            == (release_request.address.run_id, purpose)
        ]
        if not before:
            return None
        if before != [release]:
            raise requests.refuse(
                protocol.PRIVACY, f"as this run was charged for, {before[0]}", release
            )
        return ledger.spent(policy.study, unit, release_request.delta)

    @staticmethod
    def told(spent: Spent) -> dict[str, int | float]:
        """What a reply says of it."""
        return {
            protocol.EPSILON_CONSUMERS: spent.consumers,
            protocol.EPSILON_SERVER: spent.server,
            protocol.EPSILON_DELTA: spent.delta,
        }

    def attach_ledger_digest(self, reply: RecordDict) -> RecordDict:
        """Put the ledger's digest into a reply: what has left the site shows if its ledger is rewritten."""
        config = reply[protocol.CONFIG]
        if isinstance(config, ConfigRecord):
            config[protocol.PRIVACY_LEDGER] = self.digest()
        return reply

    def digest(self) -> str:
        """The ledger's chain at the study's newest charge."""
        return self._ledger().digest(self._policy().study)

    def _ledger(self) -> Ledger:
        path = self._home / FILE
        try:
            return Ledger(path)
        except DeployError:
            # There never was one. One that is gone is another error.
            self._home.mkdir(parents=True, exist_ok=True)
            return Ledger.create(path)

    def _path(self, release_request: ReleaseRequest) -> Path:
        # One for each purpose: a round that is redone asks for all again.
        name = (
            "last-reply"
            if release_request.kind == protocol.TRAIN
            else f"last-reply-{_purpose(release_request)}"
        )
        return self._home / FOLDER / name

    def _kept(self, release_request: ReleaseRequest) -> RecordDict | None:
        try:
            found = self._path(release_request).read_bytes()
        except FileNotFoundError:
            return None
        digest, frame = found[:_DIGEST_BYTES], found[_DIGEST_BYTES:]
        if digest != release_request.digest:
            return None
        try:
            reply = frames.decode_reply(frame)
        except frames.WireError:
            log.warning("%s: a kept reply is damaged, so it is made again", release_request.kind)
            return None
        return reply if isinstance(reply, RecordDict) else None

    def _keep(self, release_request: ReleaseRequest, reply: RecordDict) -> None:
        path = self._path(release_request)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without the frame's length, which the reader of a socket takes off.
        frame = b"".join(frames.encode_reply(reply))[frames.LENGTH_BYTES :]
        write_atomically(path, release_request.digest + frame)
