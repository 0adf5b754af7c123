"""Breast tumours: 569 fine-needle aspirates, 30 measures of cell nuclei, bundled with scikit-learn.

Breast Cancer Wisconsin (Diagnostic), UCI Machine Learning Repository,
https://doi.org/10.24432/C5DW2B.

The labels keep scikit-learn's order (0 malignant, 1 benign), so the logit is that of *benign*. The
positive finding is nevertheless the malignant one: sensitivity is the share of malignant tumours
that were classified so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import nn

from fedge.shared.models.fnn import FNN
from fedge.shared.preprocessing.schema import Feature, InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Standardise
from fedge.shared.tasks import sklearn_data
from fedge.shared.tasks.classification import (
    ACCURACY,
    LOSS,
    SENSITIVITY,
    SPECIFICITY,
    sigmoid_counters,
    sigmoid_loss,
)
from fedge.shared.tasks.task import Table, Task

LABELS = ("malignant", "benign")
MALIGNANT = 0

#: Upper end of each measure's mean, its standard error, and its worst (mean of the three largest
#: nuclei). None of the measures can be negative.
_UPPER = {
    "radius": (60, 6, 80),
    "texture": (80, 10, 100),
    "perimeter": (400, 45, 500),
    "area": (5000, 1100, 8500),
    "smoothness": (0.4, 0.1, 0.5),
    "compactness": (0.7, 0.3, 2.2),
    "concavity": (0.9, 0.8, 2.5),
    "concave points": (0.5, 0.2, 0.6),
    "symmetry": (0.7, 0.2, 1.4),
    "fractal dimension": (0.2, 0.1, 0.5),
}

FEATURES = tuple(
    Feature(name.format(measure), low=0.0, high=float(upper[column]))
    for column, name in enumerate(("mean {}", "{} error", "worst {}"))
    for measure, upper in _UPPER.items()
)


def load(path: Path | None = None) -> Table:  # noqa: ARG001 - the signature is every task's
    """All tumours; needs no file."""
    rows = sklearn_data.rows("breast_cancer.csv", "load_breast_cancer", header=1)
    return Table(features=rows[:, :-1].astype(np.float32), labels=rows[:, -1].astype(np.int64))


def network() -> nn.Module:
    """A feed-forward network from 30 measures to one logit."""
    return FNN((len(FEATURES), 32, 16, 1))


TASK = Task(
    name="breast-cancer",
    summary="malignant or benign from 30 measures of cell nuclei (scikit-learn's; no file needed)",
    input=InputSchema(shape=(len(FEATURES),), features=FEATURES),
    output=OutputSchema(labels=LABELS, activation="sigmoid"),
    preprocessing=(Standardise(),),
    network=network,
    loss=sigmoid_loss,
    counters=sigmoid_counters(MALIGNANT),
    metrics=(ACCURACY, SENSITIVITY, SPECIFICITY, LOSS),
    load=load,
)
