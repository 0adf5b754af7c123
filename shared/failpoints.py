"""Named places at which a test may kill a process, so that recovery is tested.

Set ``FEDGE_FAIL_POINT=after-dispatch:3`` and the process receives SIGKILL when round 3 reaches that point; with
``after-dispatch:3@/srv/fedge/status.json#superlink`` the daemon's service of that name receives it instead. Unset, a
point costs one dictionary look-up. The idea is aktualizr's: a named fail point at every write.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Final

VARIABLE: Final = "FEDGE_FAIL_POINT"

#: The coordinator's points, in the order in which a round passes them.
COORDINATOR: Final = (
    "before-dispatch",
    "after-dispatch",
    "one-received",
    "all-received",
    "mid-aggregate",
    "mid-checkpoint",
    "after-commit",
    "before-export",
)
#: Two more under secure aggregation, between "all-received" and "mid-aggregate", before each of the last two exchanges.
MASKED: Final = ("before-commit", "before-unmask")
#: One more where the model is calibrated: ranges are in the journal, and no site has been asked for scores.
BETWEEN: Final = "before-qualify"


def reach(point: str, server_round: int) -> None:
    """Kill the process if the environment names this point; otherwise do nothing.

    Args:
        point: one of the names above.
        server_round: number of the round.
    """
    setting = os.environ.get(VARIABLE)
    if not setting:
        return
    place, _, victim = setting.partition("@")
    if place == f"{point}:{server_round}":
        os.kill(_process(victim) if victim else os.getpid(), signal.SIGKILL)


def _process(victim: str) -> int:
    status, _, service = victim.rpartition("#")
    return int(json.loads(Path(status).read_text(encoding="utf-8"))["services"][service]["pid"])
