"""Which rounds a site has answered for good, on disk: it signs the survivors of none twice, whatever is killed."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Final

from fedge.shared.errors import SiteError
from fedge.shared.files import write_atomically

ANSWERED, TOO_FEW = 423, 424
#: Purposes of which a run has one sum: of two, over other sites each, the difference tells of one site.
ONCE: Final = ("calibrate", "qualify")


class ReplayGuard:
    """The highest round of each run and purpose of which this site has signed the survivors.

    Args:
        folder: of this site alone; made when first written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def require_new(self, run_id: str, purpose: str, server_round: int) -> None:
        """Refuse a round that was answered, or one before it; of what is summed once in a run, any round.

        Raises:
            SiteError: 423.
        """
        last = self._read(run_id).get(purpose, -1)
        if purpose in ONCE and last >= 0:
            raise SiteError(ANSWERED, f"{purpose}: must be asked once in a run, got it again")
        if server_round <= last:
            raise SiteError(
                ANSWERED,
                f"{purpose} round {server_round}: must be later than {last}, which was answered",
            )

    def note(self, run_id: str, purpose: str, server_round: int) -> None:
        """Write down that a round is answered, before the answer leaves."""
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._read(run_id) | {purpose: server_round}, sort_keys=True)
        write_atomically(self._path(run_id), text.encode())

    def note_evaluated(self, run_id: str, sites: Collection[str]) -> None:
        """Write down over which sites the run's last evaluation is."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self._evaluated(run_id), json.dumps(sorted(sites)).encode())

    def require_no_single_site(self, run_id: str, sites: Collection[str], min_sites: int) -> None:
        """Refuse exact scores over other sites than the last evaluation's, whose difference would tell of a few.

        Both count the same held-out examples of the same model.

        Raises:
            SiteError: 424, the sites are neither those of the evaluation nor fewer of them by ``min_sites`` or more;
                423, what is written down of them is damaged.
        """
        path = self._evaluated(run_id)
        try:
            before = set(map(str, json.loads(path.read_bytes())))
        except FileNotFoundError:
            # This site has added to no evaluation of the run.
            return
        except (OSError, ValueError, TypeError):
            raise SiteError(ANSWERED, f"{path.name}: must name sites, is damaged") from None
        now = set(sites)
        if now == before or (now < before and len(before - now) >= min_sites):
            return
        raise SiteError(
            TOO_FEW,
            f"sites: must be those of the last evaluation, or fewer of them by {min_sites} or more,"
            f" got {len(now - before)} others and {len(before - now)} fewer",
        )

    def _evaluated(self, run_id: str) -> Path:
        return self._folder / f"{run_id}.evaluated"

    def forget(self) -> None:
        """Forget all runs; only for a simulation, whose sites die with their server, secrets and shares alike."""
        for path in self._folder.glob("*.json"):
            path.unlink()

    def _path(self, run_id: str) -> Path:
        return self._folder / f"{run_id}.json"

    def _read(self, run_id: str) -> dict[str, int]:
        try:
            found = json.loads(self._path(run_id).read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or not all(type(v) is int for v in found.values()):
            # Without it nobody knows what was answered, so nothing more is.
            raise SiteError(
                ANSWERED, f"{run_id}.json: must say which rounds were answered, is damaged"
            )
        return found
