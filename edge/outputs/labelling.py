"""From logits to labels and probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedge.shared.preprocessing.schema import OutputSchema

Array: TypeAlias = NDArray[Any]


@dataclass(frozen=True)
class Prediction:
    """Predictions for ``n`` examples.

    Attributes:
        indices: ``(n,)`` of int64, the chosen labels.
        probabilities: ``(n, labels)`` of float64, rows sum to 1.
    """

    indices: Array
    probabilities: Array


def decide(logits: Array, output: OutputSchema) -> Prediction:
    """Labels and probabilities of finite logits ``(n, k)``.

    Args:
        logits: ``(n, k)``, finite; k is 1 for sigmoid, else the number of labels.
        output: activation, threshold and labels of the model.
    """
    logits = logits.astype(np.float64)
    if output.activation == "sigmoid":
        # exp(-|z|) cannot overflow.
        small = np.exp(-np.abs(logits[:, 0]))
        second = np.where(logits[:, 0] >= 0, 1.0, small) / (1.0 + small)
        probabilities = np.stack([1.0 - second, second], axis=1)
        return Prediction((second >= output.threshold).astype(np.int64), probabilities)
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    return Prediction(probabilities.argmax(axis=1), probabilities)
