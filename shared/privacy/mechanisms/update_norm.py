"""The norm by which an update is clipped, for updates that have none too."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)


def finite_norm(update: NDArray[np.floating[Any]]) -> float:
    """The L2 norm of an update, which is set to zeros in place where it has none.

    A clipped update is C long at most; NaN and infinity have no norm that could be clipped. An error in place of the
    noised update would be a release without noise: with weights of its choice a server would learn from it whether a
    site holds a record over which they overflow.

    Args:
        update: ``(d,)``.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        norm = float(np.linalg.norm(update))
    if math.isfinite(norm):
        return norm
    log.warning("the update is not finite: it counts as zero")
    update[:] = 0
    return 0.0
