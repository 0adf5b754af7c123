"""What a site was asked of its ranges in a run, on disk: once, and the same again, but nothing beside it.

Two sets of ranges that differ by one example tell of that example alone, and weights can be chosen so that a range is
one feature of one example.
"""

from __future__ import annotations

from pathlib import Path

from fedge.client import requests
from fedge.shared.files import write_atomically


def require_same(home: Path, run_id: str, job: bytes) -> None:
    """Hold a request for ranges against the first one of its run; note it where it is the first.

    Noted before anything is looked at: whatever is killed afterwards, no other request is answered.

    Args:
        home: folder of this site alone.
        run_id: a checked one.
        job: SHA-256 of all that is asked of every site alike, weights and settings.

    Raises:
        SiteError: 414, the run asked for others.
    """
    path = home / "data" / f"{run_id}.calibrated"
    try:
        before = path.read_bytes()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, job.hex().encode())
        return
    if before != job.hex().encode():
        wanted = f"asked for with the weights and settings of run {run_id}'s first request"
        raise requests.refuse("ranges", wanted, "others")
