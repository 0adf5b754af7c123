"""Handwritten digits: 1,797 grey images of 8x8 pixels in ten classes, bundled with scikit-learn.

Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from fedge.shared.models.cnn import CNN
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Reshape, Scale
from fedge.shared.tasks import sklearn_data
from fedge.shared.tasks.classification import ACCURACY, LOSS, softmax_counters, softmax_loss
from fedge.shared.tasks.task import Table, Task

SIDE = 8
GREY_LEVELS = 16


def load(path: Path | None = None) -> Table:  # noqa: ARG001 - the signature is every task's
    """All images, grey levels 0 to 16; needs no file."""
    rows = sklearn_data.rows("digits.csv.gz", "load_digits")
    return Table(
        features=rows[:, :-1].reshape(-1, SIDE, SIDE).astype(np.float32),
        labels=rows[:, -1].astype(np.int64),
    )


def network() -> nn.Module:
    """A CNN from one 8x8 channel to ten logits."""
    return CNN(channels=1, side=SIDE, classes=10)


TASK = Task(
    name="digits",
    summary="handwritten digits, 8x8 pixels, 10 classes (scikit-learn's; no file needed)",
    input=InputSchema(shape=(SIDE, SIDE)),
    output=OutputSchema(labels=tuple("0123456789"), activation="softmax"),
    preprocessing=(Scale(1 / GREY_LEVELS), Reshape((1, SIDE, SIDE))),
    network=network,
    loss=softmax_loss,
    counters=softmax_counters,
    metrics=(ACCURACY, LOSS),
    load=load,
)
