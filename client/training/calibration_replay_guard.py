"""Replay guard of calibration: a run may repeat its request for ranges, but not make a different one.

Two sets of ranges that differ by one example reveal that example, and weights can be chosen so that a range is
one feature of one example.
"""

from __future__ import annotations

from pathlib import Path

from fedge.client import requests
from fedge.shared.files import write_atomically


def require_same(home: Path, run_id: str, digest: bytes) -> None:
    """Check that a request for ranges is the first one of its run, or the same again; record the first.

    It is recorded before anything is computed: even after a kill no other request is answered.

    Args:
        home: folder of this site alone.
        run_id: validated.
        digest: SHA-256 of the request's parts that are the same for all sites: weights and settings.

    Raises:
        SiteError: 414, the run requested others before.
    """
    path = home / "data" / f"{run_id}.calibrated"
    try:
        before = path.read_bytes()
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, digest.hex().encode())
        return
    if before != digest.hex().encode():
        expected = f"asked for with the weights and settings of run {run_id}'s first request"
        raise requests.refuse("ranges", expected, "others")
