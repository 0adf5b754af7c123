"""What a restarted coordinator knows of a secure sum: the last attempt's number, and sums about to be unmasked.

A site signs the list of survivors of a round once, and gives its shares once. So what the coordinator needs for either
is on disk before it asks, and stays there until the round is committed; a coordinator that starts again asks for the
very same, which sites answer as they did before. The files hold nothing that anybody can read: the sums are masked, and
the shares that open them are not written down.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from fedge.server.secagg import group
from fedge.server.secagg.group import Group
from fedge.shared.errors import RunError
from fedge.shared.files import write_atomically
from fedge.shared.secagg.transcript import Purpose
from fedge.shared.wire import tensors

_log = logging.getLogger(__name__)

FOLDER: Final = "secagg"
_SUMS: Final = ".safetensors"
_SIGNATURES: Final = ".signatures"
_LEFT_OUT: Final = "left_out.json"
#: What reading a damaged file raises.
_DAMAGED: Final = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError, RunError,
)  # fmt: skip


class RecoveryStore:
    """The files of a run's secure sums.

    Args:
        run_directory: made already.
    """

    def __init__(self, run_directory: Path) -> None:
        self._folder = run_directory / FOLDER

    def attempts(self, purpose: Purpose, server_round: int) -> int:
        """The number of a round's last attempt; 0 where there was none.

        Raises:
            RunError: 504, the record of attempts is damaged.
        """
        return self._last(purpose, server_round)[1]

    def _last(self, purpose: Purpose, server_round: int) -> tuple[dict[str, list[int]], int]:
        path = self._folder / "attempts.json"
        last: dict[str, list[int]] = {}
        try:
            last = json.loads(path.read_bytes())
            before, number = map(int, last.get(purpose, (-1, 0)))
        except FileNotFoundError:
            before, number = -1, 0
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            raise RunError(
                504, f"{path.name}: must say which attempt was last, is damaged"
            ) from None
        return last, number if before == server_round else 0

    def next_attempt(self, purpose: Purpose, server_round: int) -> int:
        """The number of a new attempt, written down before it is returned.

        Raises:
            RunError: 504, the record of attempts is damaged.
        """
        path = self._folder / "attempts.json"
        last, number = self._last(purpose, server_round)
        number += 1
        self._folder.mkdir(exist_ok=True)
        text = json.dumps({**last, purpose: [server_round, number]}, sort_keys=True)
        write_atomically(path, text.encode())
        return number

    def keep(self, groups: Sequence[Group]) -> None:
        """Write down sums of one attempt that are about to be unmasked, beside those of attempts before."""
        attempt = groups[0].attempt
        path = self._folder / f"{attempt.purpose}-{attempt.number}.json"
        totals = {f"group-{i}": g.total for i, g in enumerate(groups)}
        # What is there under this name is of another round, and is not read for this one.
        self._folder.mkdir(exist_ok=True)
        path.with_suffix(_SIGNATURES).unlink(missing_ok=True)
        data = tensors.encode(totals)
        write_atomically(path.with_suffix(_SUMS), data)
        record = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "groups": [group.to_json(g) for g in groups],
        }
        write_atomically(path, json.dumps(record).encode())

    def forget(self, purpose: Purpose, number: int) -> None:
        """Forget the sums of one attempt, whose survivors too few have signed: nobody can unmask them."""
        for suffix in (".json", _SUMS, _SIGNATURES):
            (self._folder / f"{purpose}-{number}{suffix}").unlink(missing_ok=True)

    def left_out(self) -> dict[str, tuple[int, str]]:
        """Sites of no further sum of the run, with the number and the reason.

        Raises:
            RunError: 504, the record is damaged.
        """
        path = self._folder / _LEFT_OUT
        try:
            found = json.loads(path.read_bytes())
            return {str(site): (int(code), str(why)) for site, (code, why) in found.items()}
        except FileNotFoundError:
            return {}
        except _DAMAGED:
            raise RunError(504, f"{path.name}: must say who is left out, is damaged") from None

    def leave_out(self, found: Mapping[str, tuple[int, str]]) -> None:
        """Write down all who are in no further sum of the run."""
        self._folder.mkdir(exist_ok=True)
        write_atomically(self._folder / _LEFT_OUT, json.dumps(found, sort_keys=True).encode())

    def keep_signatures(self, groups: Sequence[Group]) -> None:
        """Write down who has signed the survivors of sums that are kept."""
        by_path: dict[Path, dict[str, str]] = {}
        for one in groups:
            path = self._folder / f"{one.attempt.purpose}-{one.attempt.number}{_SIGNATURES}"
            signed = {site: signature.hex() for site, signature in one.signatures.items()}
            by_path.setdefault(path, {}).update(signed)
        for path, signatures in by_path.items():
            write_atomically(path, json.dumps(signatures).encode())

    def kept(self, run_id: str, purpose: Purpose, server_round: int) -> list[Group]:
        """The sums of this round that were about to be unmasked when the coordinator ended; none that is damaged."""
        found: list[Group] = []
        for path in sorted(self._folder.glob(f"{purpose}-*.json")):
            try:
                told = json.loads(path.read_bytes())
                attempts = [g["attempt"][1:4] for g in told["groups"]]
                if any(a != [run_id, purpose, server_round] for a in attempts):
                    continue
                totals = tensors.read(path.with_suffix(_SUMS), told["sha256"])
                signed: dict[str, str] = {}
                if (signatures := path.with_suffix(_SIGNATURES)).exists():
                    signed = json.loads(signatures.read_bytes())
                for i, one in enumerate(told["groups"]):
                    made = group.from_json(one, np.array(totals[f"group-{i}"]))
                    made.signatures = {
                        s: bytes.fromhex(signed[s]) for s in made.survivors if s in signed
                    }
                    found.append(made)
            except _DAMAGED as error:
                _log.warning("%s: a kept sum cannot be read (%s)", path.name, type(error).__name__)
        return found

    def drop(self) -> None:
        """Forget kept sums: what they gave is in the journal, or is lost."""
        patterns = ("*-*.json", f"*{_SUMS}", f"*{_SIGNATURES}")
        for path in (found for pattern in patterns for found in self._folder.glob(pattern)):
            path.unlink(missing_ok=True)
