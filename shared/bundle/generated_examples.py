"""Examples that are made up: to compare an artefact with the fp32 graph by, and to time it; never to learn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.shared.bundle.manifest import Manifest
from fedge.shared.errors import InputError
from fedge.shared.preprocessing.schema import InputSchema
from fedge.shared.preprocessing.steps import Scale, Standardise, Step

Array: TypeAlias = NDArray[Any]

#: Examples by which a site's own statistics are stood in for.
_ENOUGH: Final = 32
MAX_BATCH_VALUES: Final = 2**26


def example(schema: InputSchema, batch: int, steps: Sequence[Step] = (), *, seed: int = 0) -> Array:
    """Raw examples ``(batch, *shape)`` of float32 that the schema allows.

    Columns are uniform within their ranges. What has no columns is uniform in [0, 1) once it has been scaled: of
    an image of 0 to 255, raw values below 1 would show the network next to nothing.

    Args:
        schema: of the raw examples.
        batch: number of them.
        steps: the model's preprocessing.
        seed: of the values.

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
    if not schema.features:
        factor = math.prod(step.factor for step in steps if isinstance(step, Scale))
        with np.errstate(all="ignore"):
            raw = x / np.float32(factor)
        # A factor of zero, or one too small, leaves nothing to undo.
        x = raw if np.isfinite(raw).all() else x
    return x


def stand_in(manifest: Manifest) -> tuple[Step, ...]:
    """The manifest's steps; where a site's own statistics belong, those of made-up examples.

    Good enough to compare two artefacts of one network by, and to time them; not to predict by.
    """
    steps = manifest.preprocessing
    if not manifest.site_statistics:
        return steps
    x = example(manifest.input, _ENOUGH, steps)
    found: list[Step] = []
    for step in steps:
        if isinstance(step, Standardise) and not step.mean:
            step = Standardise(tuple(x.mean(axis=0).tolist()), tuple(x.std(axis=0).tolist()))
        x = step.apply(x)
        found.append(step)
    return tuple(found)
