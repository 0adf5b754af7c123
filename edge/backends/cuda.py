"""The few functions of NVIDIA's driver that an engine needs, by ctypes: no CUDA toolkit, no further package.

Names and arguments are those of the CUDA driver API (cuda.h); a ``_v2`` is what the header's plain name
stands for. Checked against a stand-in library of the same functions, not on a GPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from dataclasses import dataclass
from typing import Any, Final

from fedge.shared.errors import BundleError

LIBRARY: Final = "libcuda.so.1"
_NON_BLOCKING: Final = 1
_MAJOR: Final = 75  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_MINOR: Final = 76
_NAME_BYTES: Final = 128

_ARGUMENTS: Final[dict[str, tuple[Any, ...]]] = {
    "cuInit": (c_uint,),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (POINTER(c_void_p),),
    "cuStreamCreate": (POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}


@dataclass(frozen=True)
class Gpu:
    """A GPU of this device.

    Attributes:
        name: as its driver calls it.
        capability: compute capability, for example 89 for 8.9.
    """

    name: str
    capability: int


class Driver:
    """The initialised CUDA driver.

    Args:
        library: name or path of the shared library.

    Raises:
        BundleError: 710, there is none, it is too old, or it finds no GPU.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
            for name, arguments in _ARGUMENTS.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, c_int
        except (OSError, AttributeError):
            raise BundleError(710, "device: has no CUDA driver") from None
        self.call("cuInit", 0)
        count = c_int()
        self.call("cuDeviceGetCount", byref(count))
        if count.value < 1:
            raise BundleError(710, "device: has no GPU that CUDA sees")
        self._device = c_int()
        # The first one; CUDA_VISIBLE_DEVICES chooses another.
        self.call("cuDeviceGet", byref(self._device), 0)

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            BundleError: 710, it failed; with the driver's name of the error.
        """
        status = getattr(self._library, name)(*arguments)
        if status:
            text = c_char_p()
            self._library.cuGetErrorName(status, byref(text))
            reason = text.value.decode("ascii", "replace") if text.value else f"error {status}"
            raise BundleError(710, f"CUDA: {name} failed ({reason[:60]})")

    def gpu(self) -> Gpu:
        """Name and capability of the GPU."""
        name = ctypes.create_string_buffer(_NAME_BYTES)
        self.call("cuDeviceGetName", name, _NAME_BYTES - 1, self._device)
        major, minor = c_int(), c_int()
        self.call("cuDeviceGetAttribute", byref(major), _MAJOR, self._device)
        self.call("cuDeviceGetAttribute", byref(minor), _MINOR, self._device)
        text = name.value.decode("ascii", "replace")
        return Gpu(
            "".join(c for c in text if c.isprintable()) or "GPU", 10 * major.value + minor.value
        )

    def context(self) -> Context:
        """The GPU's primary context, with a stream of its own."""
        return Context(self, self._device)


class Context:
    """The GPU's primary context, which the process shares, with a stream and memory of its own."""

    def __init__(self, driver: Driver, device: c_int) -> None:
        self._driver, self._device = driver, device
        self._handle, self._stream = c_void_p(), c_void_p()
        driver.call("cuDevicePrimaryCtxRetain", byref(self._handle), device)
        try:
            with self.current():
                driver.call("cuStreamCreate", byref(self._stream), _NON_BLOCKING)
        except BundleError:
            driver.call("cuDevicePrimaryCtxRelease_v2", device)
            raise

    @property
    def stream(self) -> int:
        """The stream's handle, as TensorRT takes it."""
        return self._stream.value or 0

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make it the calling thread's context; the previous one is restored at the end."""
        self._driver.call("cuCtxPushCurrent_v2", self._handle)
        try:
            yield
        finally:
            self._driver.call("cuCtxPopCurrent_v2", byref(c_void_p()))

    def allocate(self, size: int) -> int:
        """Allocate ``size`` bytes on the GPU and return their address."""
        address = c_uint64()
        self._driver.call("cuMemAlloc_v2", byref(address), size)
        return address.value

    def free(self, address: int) -> None:
        """Free the memory at an address."""
        self._driver.call("cuMemFree_v2", address)

    def to_device(self, address: int, source: int, size: int) -> None:
        """Copy ``size`` bytes of the host to the GPU, in the stream's order."""
        self._driver.call("cuMemcpyHtoDAsync_v2", address, source, size, self._stream)

    def to_host(self, target: int, address: int, size: int) -> None:
        """Copy ``size`` bytes of the GPU to the host, in the stream's order."""
        self._driver.call("cuMemcpyDtoHAsync_v2", target, address, size, self._stream)

    def synchronise(self) -> None:
        """Wait until the stream has finished its queued work."""
        self._driver.call("cuStreamSynchronize", self._stream)

    def close(self) -> None:
        """Release the stream and the context; neither may be used afterwards."""
        with self.current():
            self._driver.call("cuStreamDestroy_v2", self._stream)
        self._driver.call("cuDevicePrimaryCtxRelease_v2", self._device)
