"""Loads ONNX Runtime, with its telemetry off."""

from __future__ import annotations

import os
from types import ModuleType


def load_onnxruntime() -> ModuleType:
    """Import onnxruntime with its telemetry off.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    # Read once, while the library loads: otherwise it keeps a device's number and a queue of events
    # in the user's cache folder, and reports to its maker. A later call only stops part of it.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime  # slow to load, and `fedge-edge verify` works without it

    module: ModuleType = onnxruntime
    return module
