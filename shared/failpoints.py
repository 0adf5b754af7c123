"""Named places at which a test may kill the process, so that recovery is shown and not assumed.

Set ``FEDGE_FAIL_POINT=after-dispatch:3`` and the process receives SIGKILL when round 3 reaches that point. Unset,
a point costs one dictionary look-up. The idea is aktualizr's: a named fail point at every write.
"""

from __future__ import annotations

import os
import signal
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


def reach(point: str, server_round: int) -> None:
    """Die here if the environment asks for it; otherwise do nothing."""
    if os.environ.get(VARIABLE) == f"{point}:{server_round}":
        os.kill(os.getpid(), signal.SIGKILL)
