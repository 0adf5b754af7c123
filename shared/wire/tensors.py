"""Named arrays: their shapes, their bytes on disk, their digest.

Files are safetensors without metadata, so the same weights give the same bytes; loading one cannot execute code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedge.shared.errors import RunError

NDArrays: TypeAlias = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: str


def specs(arrays: Mapping[str, NDArray[Any]]) -> dict[str, Spec]:
    """The shape and type of each array."""
    return {name: Spec(tuple(a.shape), str(a.dtype)) for name, a in arrays.items()}


def encode(arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """Safetensors bytes, the same for the same names and values."""
    return bytes(
        save({name: np.ascontiguousarray(a).reshape(a.shape) for name, a in arrays.items()})
    )


def digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 (hex) of ``encode(arrays)``."""
    return hashlib.sha256(encode(arrays)).hexdigest()


def read(path: Path, sha256: str | None = None) -> NDArrays:
    """Read a safetensors file.

    Args:
        path: the file.
        sha256: expected SHA-256 of the file, hexadecimal; None to skip the check.

    Raises:
        RunError: 504, the file is missing, does not parse, or has another SHA-256.
    """
    try:
        data = path.read_bytes()
        if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
            raise RunError(504, f"{path.name}: must have the SHA-256 {sha256}, got another")
        loaded: NDArrays = load(data)
    except (OSError, SafetensorError, KeyError) as error:
        # KeyError: a type that numpy does not have, for example BF16.
        raise RunError(504, f"{path.name}: cannot be read ({error})") from None
    return loaded
