from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from fedge.edge.backends.cuda import Driver, Gpu
from fedge.shared.errors import BundleError


def test_without_a_driver_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "libother.so").write_bytes(b"not a library")
    for library in ("libnowhere-cuda.so.1", str(tmp_path / "libother.so"), "libc.so.6"):
        with pytest.raises(BundleError) as error:
            Driver(library)
        assert (error.value.code, error.value.message) == (710, "device: has no CUDA driver")


def test_the_gpu_is_described(driver_library: Path) -> None:
    assert Driver(str(driver_library)).gpu() == Gpu("Stand-in GPU", 89)


def test_a_driver_without_a_gpu_is_refused(driver_library: Path) -> None:
    stub = ctypes.CDLL(str(driver_library))
    stub.stub_devices(0)
    try:
        with pytest.raises(BundleError, match="no GPU that CUDA sees"):
            Driver(str(driver_library))
    finally:
        stub.stub_devices(1)


def test_memory_goes_there_and_back_and_all_is_given_back(driver_library: Path) -> None:
    stub = ctypes.CDLL(str(driver_library))
    context = Driver(str(driver_library)).context()
    assert context.stream == 0xFEDCBA0987654321
    source, target = np.arange(1000, dtype=np.float32), np.zeros(1000, np.float32)
    with context.current():
        address = context.allocate(source.nbytes)
        assert address > 2**32  # a pointer of 64 bits came through whole
        context.to_device(address, source.ctypes.data, source.nbytes)
        context.to_host(target.ctypes.data, address, target.nbytes)
        context.synchronise()
        with pytest.raises(BundleError) as error:
            context.allocate(2**31)
        assert error.value.message == "CUDA: cuMemAlloc_v2 failed (CUDA_ERROR_OUT_OF_MEMORY)"
        context.free(address)
    np.testing.assert_array_equal(source, target)
    context.close()
    assert (stub.stub_held(), stub.stub_streams(), stub.stub_contexts()) == (0, 0, 0)
    assert stub.stub_current() == 0
