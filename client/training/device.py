"""Where a site computes: its policy's device, bounded memory, mixed precision, and what may go wrong there.

Memory that runs out and a device that fails end a task with a number of their own; the worker lives on
after the first and starts anew after the second, as a CUDA context that failed once stays failed.
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
DEVICE_GONE: Final = 417

#: What the memory bound must leave beyond the worker's own start, in GiB.
MIN_ROOM: Final = 0.25
_GIB: Final = 2**30
_DTYPES: Final = {"bfloat16": torch.bfloat16, "float16": torch.float16}
# Torch reports these as RuntimeError, told apart by their text alone.
_SAYS_OUT_OF_MEMORY: Final = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "ALLOC_FAILED",
)
_SAYS_DEVICE_GONE: Final = ("CUDA error", "CUDA driver", "CUBLAS_STATUS_", "cuDNN", "CUDNN_STATUS_")


def choose(wanted: str) -> torch.device:
    """The device that a policy names.

    Args:
        wanted: "cpu", "auto" (CUDA where torch sees one), "cuda" or "cuda:N".

    Raises:
        SiteError: 417, there is no such device.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return CPU
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(wanted.partition(":")[2] or 0) if wanted != "auto" else 0
    if number >= count:
        raise SiteError(
            DEVICE_GONE, f"device: must be one of {count} CUDA devices or cpu, got {wanted}"
        )
    # The same request gives the same weights on one GPU as far as its kernels allow.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", number)


def bound(device: torch.device, memory_gib: float | None, gpu_fraction: float) -> None:
    """Bound the memory that this process may take from now on.

    Args:
        device: as chosen.
        memory_gib: of the process's data, in GiB; None for no bound. Not with a GPU, whose driver maps far more
            than it takes.
        gpu_fraction: share of a GPU's memory.

    Raises:
        ConfigError: 201, the bound leaves no room beside what the process already holds, or is given with a GPU.
    """
    if device.type == "cuda":
        if memory_gib is not None:
            raise ConfigError(
                201, f"policy.toml: memory-gib: must be left out with a GPU, got {memory_gib:g}"
            )
        torch.cuda.set_per_process_memory_fraction(gpu_fraction, device)
    elif memory_gib is not None:
        least = _held_gib() + MIN_ROOM
        if memory_gib < least:
            raise ConfigError(
                201, f"policy.memory-gib: must be at least {least:.2f}, got {memory_gib:g}"
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
    """Make sure that the device can compute as the configuration asks.

    Raises:
        SiteError: 414, float16 without CUDA.
    """
    if settings.mixed_precision == "float16" and device.type != "cuda":
        raise SiteError(
            414,
            f"train.mixed-precision: must be off or bfloat16 on {device.type}, got float16",
        )


def autocast(settings: TrainSection, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass; with "off" it does nothing at all."""
    if settings.mixed_precision == "off":
        return nullcontext()
    return torch.autocast(device.type, dtype=_DTYPES[settings.mixed_precision])


def scaler(settings: TrainSection, device: torch.device) -> torch.amp.GradScaler | None:
    """What keeps small gradients of float16 from vanishing; fresh in every round."""
    if settings.mixed_precision != "float16":
        return None
    return torch.amp.GradScaler(device.type)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators seeded within, and as before after."""
    with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
        # torch.manual_seed seeds every kind of device, and keeps a stack trace for each that is never used.
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def number_of(error: BaseException) -> int | None:
    """Which failure of memory or device an exception means: 416, 417, or None for neither."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    if not isinstance(error, RuntimeError):
        return None
    text = str(error)
    if any(part in text for part in _SAYS_OUT_OF_MEMORY):
        return OUT_OF_MEMORY
    if isinstance(error, torch.AcceleratorError) or any(p in text for p in _SAYS_DEVICE_GONE):
        return DEVICE_GONE
    return None


def free() -> None:
    """Give back what nothing holds any more, caches of the GPU included."""
    gc.collect()
    torch.cuda.empty_cache()
