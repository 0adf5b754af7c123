"""Rules for the parts of a manifest, so that a device can hold and run the model.

Each error names the part at fault; a manifest's own fields are checked in ``fedge.shared.bundle.manifest``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Final

from fedge.shared.errors import BundleError
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import OneHot, Reshape, Scale, Standardise, Step

PART: Final = "manifest.json"

#: Bounds on the sizes that a manifest may require of a device.
MAX_DIMENSIONS: Final = 8
MAX_VALUES: Final = 2**24
MAX_LABELS: Final = 100_000
MAX_TEXT: Final = 256


def network_shape(schema: InputSchema, steps: Sequence[Step]) -> tuple[int, ...]:
    """Shape of one preprocessed example, computed step by step.

    Args:
        schema: of one raw example.
        steps: the preprocessing.

    Raises:
        BundleError: 706, the schema is impossible, or a step does not match the shape before it.
    """
    _check_input(schema)
    shape = schema.shape
    for number, step in enumerate(steps):
        where = f"preprocessing: step {number}"
        match step:
            case Scale(factor=factor):
                require(math.isfinite(factor), where, "factor must be finite")
            case Standardise(mean=mean, std=std):
                require(
                    len(shape) == 1, where, f"standardise needs columns, got shape {list(shape)}"
                )
                require(
                    len(mean) == len(std) and len(mean) in (0, shape[0]),
                    where,
                    f"must hold {shape[0]} columns",
                )
                require(all(s >= 0 for s in std), where, "std must not be negative")
            case OneHot(columns=columns):
                require(len(shape) == 1, where, f"one-hot needs columns, got shape {list(shape)}")
                indices = [index for index, _ in columns]
                ascending = all(a < b for a, b in itertools.pairwise(indices))
                inside = all(0 <= index < shape[0] for index in indices)
                require(
                    ascending and inside, where, "columns must be ascending and within the input"
                )
                for index, categories in columns:
                    distinct = 0 < len(set(categories)) == len(categories)
                    require(distinct, where, f"column {index} must hold different categories")
                shape = (shape[0] - len(columns) + sum(len(c) - 1 for _, c in columns),)
            case Reshape(shape=new):
                _check_shape(new, where)
                require(
                    math.prod(new) == math.prod(shape),
                    where,
                    f"cannot make {list(new)} of {list(shape)}",
                )
                shape = new
        _check_shape(shape, where)
    return shape


def refused(message: str) -> BundleError:
    """The error of a manifest that is not accepted: 706, with the part's name in front."""
    return BundleError(706, f"{PART}: {message}")


def require(condition: bool, where: str, message: str) -> None:
    """Refuse the manifest where ``condition`` does not hold.

    Args:
        condition: that must hold.
        where: the key or part at fault.
        message: the rule that is broken.

    Raises:
        BundleError: 706.
    """
    if not condition:
        raise refused(f"{where}: {message}")


def _check_shape(shape: tuple[int, ...], where: str) -> None:
    possible = 1 <= len(shape) <= MAX_DIMENSIONS and all(1 <= n <= MAX_VALUES for n in shape)
    require(
        possible and math.prod(shape) <= MAX_VALUES,
        where,
        f"shape {list(shape)[:9]} is not possible",
    )


def _check_input(schema: InputSchema) -> None:
    _check_shape(schema.shape, "input")
    require(schema.dtype == "float32", "input", f"dtype must be float32, got {schema.dtype!r}")
    if schema.low is not None or schema.high is not None:
        low = math.nan if schema.low is None else schema.low
        high = math.nan if schema.high is None else schema.high
        possible = low < high and math.isfinite(low) and math.isfinite(high)
        require(possible, "input", "must have low below high, both or neither")
        require(not schema.features, "input", "must have low and high in its features alone")
    if schema.features:
        names = [feature.name for feature in schema.features]
        require(
            schema.shape == (len(names),),
            "input",
            f"must have one feature a column, got {len(names)}",
        )
        require(len(set(names)) == len(names), "input", "must have different features")
        require(
            all(name.strip() == name and name for name in names),
            "input",
            "must have named features",
        )


def check_output(schema: OutputSchema) -> None:
    """Refuse labels or a threshold that no logits can have.

    Raises:
        BundleError: 706.
    """
    count = len(schema.labels)
    require(2 <= count <= MAX_LABELS, "output", f"must have 2 to {MAX_LABELS} labels, got {count}")
    require(len(set(schema.labels)) == count, "output", "must have different labels")
    require(
        schema.activation == "softmax" or count == 2,
        "output",
        f"sigmoid needs two labels, got {count}",
    )
    require(
        0 < schema.threshold < 1,
        "output",
        f"threshold must be between 0 and 1, got {schema.threshold}",
    )


def check_values(value: Any, depth: int = 0) -> None:
    """Refuse text that could confuse a terminal, numbers out of range, and deep nesting.

    Args:
        value: any JSON value.
        depth: its depth of nesting.

    Raises:
        BundleError: 706.
    """
    if depth > MAX_DIMENSIONS:
        raise refused("is nested too deeply")
    match value:
        case dict():
            for key, item in value.items():
                check_values(key, depth + 1)
                check_values(item, depth + 1)
        case list():
            for item in value:
                check_values(item, depth + 1)
        case str():
            if len(value) > MAX_TEXT or not value.isprintable():
                raise refused(
                    f"text must be printable and at most {MAX_TEXT} characters, got {value[:32]!r}"
                )
        case bool():
            pass  # its type is checked when the manifest is written again and compared
        case int() | float():
            if not -1e300 < value < 1e300:
                raise refused("holds a number out of range")
