"""The device on which a site computes: choice, memory bound, mixed precision, and failures.

Out of memory and a failed device have error numbers of their own; the worker continues after the first
and restarts after the second, as a CUDA context that failed once stays failed.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Final

import torch

from fedge.shared.config.sections import TrainSection
from fedge.shared.errors import ConfigError, SiteError

CPU: Final = torch.device("cpu")
OUT_OF_MEMORY: Final = 416
DEVICE_FAILED: Final = 417

#: What the memory bound must leave beyond the worker's own start, in GiB.
MIN_ROOM: Final = 0.25
_GIB: Final = 2**30
_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Torch reports these as RuntimeError, distinguished by their text only.
_SAYS_OUT_OF_MEMORY: Final = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "ALLOC_FAILED",
)
_SAYS_DEVICE_FAILED: Final = (
    "CUDA error",
    "CUDA driver",
    "CUBLAS_STATUS_",
    "cuDNN",
    "CUDNN_STATUS_",
)


def choose(name: str) -> torch.device:
    """The device that a policy names.

    Args:
        name: "cpu", "auto" (CUDA where torch sees one), "cuda" or "cuda:N".

    Raises:
        SiteError: 417, there is no such device.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(name.partition(":")[2] or 0) if name != "auto" else 0
    if number >= count:
        raise SiteError(
            DEVICE_FAILED, f"device: must be one of {count} CUDA devices or cpu, got {name}"
        )
    # The same request gives the same weights on one GPU as far as its kernels allow.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", number)


def bound(device: torch.device, memory_gib: float | None, gpu_fraction: float) -> None:
    """Bound the memory that this process may take from now on.

    Args:
        device: as ``choose`` gave it.
        memory_gib: bound of the process's data, in GiB; None for no bound. Not with a GPU, whose driver maps far more
            than it uses.
        gpu_fraction: share of a GPU's memory.

    Raises:
        ConfigError: 201, the bound is less than the process already uses and ``MIN_ROOM``, or is given with a GPU.
    """
    if device.type == "cuda":
        if memory_gib is not None:
            raise ConfigError(
                201, f"policy.toml: memory-gib: must be left out with a GPU, got {memory_gib:g}"
            )
        torch.cuda.set_per_process_memory_fraction(gpu_fraction, device)
    elif memory_gib is not None:
        minimum = _held_gib() + MIN_ROOM
        if memory_gib < minimum:
            raise ConfigError(
                201, f"policy.memory-gib: must be at least {minimum:.2f}, got {memory_gib:g}"
            )
        limit = int(memory_gib * _GIB)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        if hard != resource.RLIM_INFINITY:
            limit = min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _held_gib() -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmData:"):
            return int(line.split()[1]) / 2**20
    return 0.0


def require(settings: TrainSection, device: torch.device) -> None:
    """Check that the device supports the configured precision.

    Raises:
        SiteError: 414, float16 without CUDA.
    """
    if settings.mixed_precision == "float16" and device.type != "cuda":
        raise SiteError(
            414,
            f"train.mixed-precision: must be off or bfloat16 on {device.type}, got float16",
        )


def autocast(settings: TrainSection, device: torch.device) -> AbstractContextManager[object]:
    """The autocast context of a forward pass; with "off" it does nothing."""
    if settings.mixed_precision == "off":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[settings.mixed_precision])


def scaler(settings: TrainSection, device: torch.device) -> torch.amp.GradScaler | None:
    """A new gradient scaler for float16, so that small gradients do not underflow; None for other precisions."""
    if settings.mixed_precision != "float16":
        return None
    return torch.amp.GradScaler(device.type)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's generators within the context, and restore them afterwards."""
    with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
        # torch.manual_seed seeds every kind of device, and keeps a stack trace for each that is never used.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def error_code(error: BaseException) -> int | None:
    """The error number of an exception: 416 out of memory, 417 device failed, or None for neither."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if any(part in text for part in _SAYS_OUT_OF_MEMORY):
        return OUT_OF_MEMORY
    if isinstance(error, torch.AcceleratorError) or any(p in text for p in _SAYS_DEVICE_FAILED):
        return DEVICE_FAILED
    return None


def free() -> None:
    """Collect garbage and release the GPU's cached memory."""
    gc.collect()
    torch.cuda.empty_cache()
