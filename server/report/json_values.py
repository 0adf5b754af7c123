"""Lenient parsing of JSON values: a value of an unexpected type counts as missing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def number(value: Any) -> float | None:
    """The value as a finite float, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        converted = float(value)
    except OverflowError:
        return None
    return converted if math.isfinite(converted) else None


def whole(value: Any) -> int | None:
    """The value as an int, or None."""
    parsed = number(value)
    return None if parsed is None else int(parsed)


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def sequence(value: Any) -> list[Any]:
    """The value where it is an array, else an empty one."""
    return value if isinstance(value, list) else []


def text(value: Any) -> str:
    """The value where it is a string, else an empty one."""
    return value if isinstance(value, str) else ""


def numbers(value: Any) -> dict[str, float]:
    """The finite members of an object."""
    parsed = ((name, number(v)) for name, v in mapping(value).items())
    return {name: v for name, v in parsed if v is not None}
