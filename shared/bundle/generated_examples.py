"""Generated examples for comparing an artefact with the fp32 graph and for timing it, never for training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.shared.errors import InputError
from fedge.shared.preprocessing.schema import InputSchema
from fedge.shared.preprocessing.steps import Scale, Standardise, Step

Array: TypeAlias = NDArray[Any]

#: Generated examples from which placeholder statistics are computed.
_ENOUGH: Final = 32
MAX_BATCH_VALUES: Final = 2**26


def example(schema: InputSchema, batch: int, steps: Sequence[Step] = (), *, seed: int = 0) -> Array:
    """Generate raw examples ``(batch, *shape)`` of float32 that the schema allows.

    Columns are uniform within their ranges, and inputs without columns within theirs. Where no range is known they are
    uniform in [0, 1) after scaling: for an image of 0 to 255, raw values below 1 would be nearly black.

    Args:
        schema: of the raw examples.
        batch: number of examples.
        steps: the model's preprocessing.
        seed: of the random values.

    Raises:
        InputError: 805, the batch is too large to hold.
    """
    if batch * math.prod(schema.shape) > MAX_BATCH_VALUES:
        raise InputError(
            805, f"--batch: must be at most {MAX_BATCH_VALUES // math.prod(schema.shape)}"
        )
    generator = np.random.default_rng(seed)
    x = generator.random((batch, *schema.shape)).astype(np.float32)
    for index, feature in enumerate(schema.features):
        if feature.categories:
            x[:, index] = generator.choice(feature.categories, size=batch)
        else:
            x[:, index] = feature.low + (feature.high - feature.low) * x[:, index]
    if schema.low is not None and schema.high is not None:
        x = np.float32(schema.low) + np.float32(schema.high - schema.low) * x
    elif not schema.features:
        factor = math.prod(step.factor for step in steps if isinstance(step, Scale))
        with np.errstate(all="ignore"):
            raw = x / np.float32(factor)
        # A factor of zero, or one too small, leaves nothing to undo.
        x = raw if np.isfinite(raw).all() else x
    return x


def stand_in(schema: InputSchema, steps: Sequence[Step]) -> tuple[Step, ...]:
    """A model's steps, with statistics of generated examples in place of a site's own.

    Good enough for comparing and timing artefacts of one network, not for predictions.
    """
    if not any(isinstance(step, Standardise) and not step.mean for step in steps):
        return tuple(steps)
    x = example(schema, _ENOUGH, steps)
    complete: list[Step] = []
    for step in steps:
        if isinstance(step, Standardise) and not step.mean:
            step = Standardise(tuple(x.mean(axis=0).tolist()), tuple(x.std(axis=0).tolist()))
        x = step.apply(x)
        complete.append(step)
    return tuple(complete)
