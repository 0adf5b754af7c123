"""A stand-in for NVIDIA's driver, in C: no GPU is at hand, but its functions are called for real."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

DRIVER = r"""
#include <stdlib.h>
#include <string.h>
typedef unsigned long long ptr;
static int held, streams, contexts, current, fails = -1;
static int device_count = 1;
int stub_held(void) { return held; }
int stub_streams(void) { return streams; }
int stub_contexts(void) { return contexts; }
int stub_current(void) { return current; }
void stub_devices(int n) { device_count = n; }
void stub_fail_after(int n) { fails = n; }
static int failing(void) { return fails >= 0 && fails-- == 0; }
int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuDeviceGetCount(int *n) { *n = device_count; return 0; }
int cuDeviceGet(int *device, int number) { *device = 40 + number; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    if (device != 40) return 101;
    strncpy(name, "Stand-in GPU", size); return 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (device != 40) return 101;
    *value = attribute == 75 ? 8 : attribute == 76 ? 9 : 0; return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (device != 40) return 101;
    *context = (void *)0x1234567890abcdefULL; contexts++; return 0;
}
int cuDevicePrimaryCtxRelease_v2(int device) { contexts--; return device == 40 ? 0 : 101; }
int cuCtxPushCurrent_v2(void *context) {
    if (context != (void *)0x1234567890abcdefULL) return 201;
    current++; return 0;
}
int cuCtxPopCurrent_v2(void **context) { *context = 0; current--; return 0; }
int cuStreamCreate(void **stream, unsigned flags) {
    if (flags != 1 || current < 1) return 1;
    *stream = (void *)0xfedcba0987654321ULL; streams++; return 0;
}
static int wrong(void *stream) { return stream != (void *)0xfedcba0987654321ULL || current < 1; }
int cuStreamSynchronize(void *stream) { return wrong(stream) ? 400 : failing() ? 719 : 0; }
int cuStreamDestroy_v2(void *stream) { if (wrong(stream)) return 400; streams--; return 0; }
int cuMemAlloc_v2(ptr *address, size_t size) {
    if (current < 1 || !size) return 1;
    if (size > (1UL << 30)) return 2;
    *address = (ptr)malloc(size); held++; return 0;
}
int cuMemFree_v2(ptr address) { if (current < 1) return 1; free((void *)address); held--; return 0; }
int cuMemcpyHtoDAsync_v2(ptr to, const void *from, size_t size, void *stream) {
    if (wrong(stream)) return 400;
    memcpy((void *)to, from, size); return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, ptr from, size_t size, void *stream) {
    if (wrong(stream)) return 400;
    memcpy(to, (void *)from, size); return 0;
}
int cuGetErrorName(int error, const char **name) {
    *name = error == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : 0;
    return *name ? 0 : 1;
}
"""


@pytest.fixture(scope="session")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled stand-in; its memory is the host's."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    path = folder / "libcuda.so.1"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", path, folder / "driver.c"], check=True, timeout=300
    )
    return path
