"""The compute capability of this machine's GPU, by its driver."""

from __future__ import annotations

import ctypes
from typing import Final

LIBRARY: Final = "libcuda.so.1"
# CUDA driver API, CUdevice_attribute.
_MAJOR: Final = 75
_MINOR: Final = 76


def capability(library: str = LIBRARY) -> int | None:
    """Compute capability of the first GPU, for example 87 for 8.7; None without a driver or a GPU.

    Args:
        library: name or path of the CUDA driver.
    """
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    )
    return None if failed else 10 * major.value + minor.value
