"""Heart disease: 740 patients of four hospitals, read from the UCI repository's processed files.

Heart Disease, UCI Machine Learning Repository, https://doi.org/10.24432/C52P4X (Janosi, Steinbrunn,
Pfisterer, Detrano), with the selection, split and encoding of Fed-Heart-Disease (FLamby, NeurIPS
2022, https://arxiv.org/abs/2210.04620): slope, ca and thal are left out as mostly missing, then
every patient with a missing value; the label is any narrowing above 50 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedge.shared.errors import DataError
from fedge.shared.files import open_regular, reason
from fedge.shared.models.logistic import LogisticRegression
from fedge.shared.preprocessing.schema import Feature, InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import OneHot, Standardise
from fedge.shared.tasks.classification import (
    ACCURACY,
    LOSS,
    SENSITIVITY,
    SPECIFICITY,
    sigmoid_counters,
    sigmoid_loss,
)
from fedge.shared.tasks.task import Table, Task

#: Each site and its file, in the order of the repository.
FILES: Final = {
    "cleveland": "processed.cleveland.data",
    "hungary": "processed.hungarian.data",
    "switzerland": "processed.switzerland.data",
    "va": "processed.va.data",
}
COLUMNS: Final = 14
USED_COLUMNS: Final = range(10)
DIAGNOSIS: Final = 13
DIAGNOSES: Final = (0.0, 1.0, 2.0, 3.0, 4.0)
MAX_FILE_BYTES: Final = 1 << 20
TRAIN_SHARE: Final = 0.66
SPLIT_SEED: Final = 43

FEATURES: Final = (
    Feature("age", low=18, high=100, unit="years"),
    Feature("sex", low=0, high=1),
    Feature("cp", low=1, high=4, categories=(1.0, 2.0, 3.0, 4.0)),
    # Two hospitals wrote 0 for what they did not measure: one blood pressure, many cholesterols.
    Feature("trestbps", low=0, high=220, unit="mm Hg"),
    Feature("chol", low=0, high=700, unit="mg/dl"),
    Feature("fbs", low=0, high=1),
    Feature("restecg", low=0, high=2, categories=(0.0, 1.0, 2.0)),
    Feature("thalach", low=60, high=220, unit="1/min"),
    Feature("exang", low=0, high=1),
    Feature("oldpeak", low=-3, high=7, unit="mm"),
)
ENCODED: Final = tuple((i, f.categories) for i, f in enumerate(FEATURES) if f.categories)


def load(path: Path | None = None) -> Table:
    """Read the four files of the folder ``path``.

    Raises:
        DataError: 301, the folder or a file is missing; 302, a row does not follow the format.
    """
    if path is None:
        raise DataError(
            301, "data.path: must be the folder of the UCI heart disease files, got nothing"
        )
    if not path.is_dir():
        raise DataError(
            301, f"data.path: must be the folder of the UCI heart disease files, got {path}"
        )
    features, labels, sites, tests = [], [], [], []
    for site, name in FILES.items():
        rows = np.asarray(list(_rows(path / name)), dtype=np.float64).reshape(
            -1, len(USED_COLUMNS) + 1
        )
        positive = (rows[:, -1] > 0).astype(np.int64)
        features.append(rows[:, :-1].astype(np.float32))
        labels.append(positive)
        sites.append(np.full(len(rows), site))
        tests.append(_held_out(positive, name))
    return Table(
        features=np.concatenate(features),
        labels=np.concatenate(labels),
        sites=np.concatenate(sites),
        test=np.concatenate(tests),
    )


def _rows(file: Path) -> Iterator[list[float]]:
    """Complete rows of a file: the kept columns, then the diagnosis 0 to 4."""
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{file.name} line {number}"
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != COLUMNS:
            raise DataError(302, f"{where}: must hold {COLUMNS} columns, got {len(cells)}")
        needed = [(index, cells[index]) for index in (*USED_COLUMNS, DIAGNOSIS)]
        if any(cell == "?" for _, cell in needed):
            continue
        values = [_number(cell, f"{where}, column {index + 1}") for index, cell in needed]
        for index, categories in ENCODED:
            if values[index] not in categories:
                raise DataError(
                    302,
                    f"{where}, column {index + 1}: must be one of {list(categories)},"
                    f" got {values[index]}",
                )
        if values[-1] not in DIAGNOSES:
            raise DataError(
                302, f"{where}, column {COLUMNS}: must be a diagnosis 0 to 4, got {values[-1]}"
            )
        yield values


def _text(file: Path) -> str:
    try:
        stream, _ = open_regular(file)
        with stream:
            data = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise DataError(301, f"{file}: must be a readable file, got {reason(error)}") from None
    if len(data) > MAX_FILE_BYTES:
        raise DataError(302, f"{file.name}: must be at most {MAX_FILE_BYTES} bytes, got more")
    try:
        return data.decode("ascii")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            302, f"{file.name} line {line}: must be ASCII text, got other bytes"
        ) from None


def _number(cell: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(302, f"{where}: must be a finite number or ?, got {cell[:20]!r}")
    return value


def _held_out(labels: NDArray[Any], name: str) -> NDArray[Any]:
    """The protocol's test rows of a hospital, stratified where both labels have three rows or more."""
    from sklearn.model_selection import (
        train_test_split,
    )  # slow to import, and servers never call this

    counts = np.bincount(labels, minlength=2)
    if len(labels) < 3:
        raise DataError(302, f"{name}: must hold 3 complete rows or more, got {len(labels)}")
    _, test = train_test_split(
        np.arange(len(labels)),
        train_size=TRAIN_SHARE,
        random_state=SPLIT_SEED,
        stratify=labels if counts.min() > 2 else None,
    )
    mask = np.zeros(len(labels), dtype=np.bool_)
    mask[test] = True
    return mask


def network() -> nn.Module:
    """Logistic regression on the encoded columns."""
    added = sum(len(categories) - 1 for _, categories in ENCODED)
    return LogisticRegression(len(FEATURES) - len(ENCODED) + added)


TASK = Task(
    name="heart",
    summary="heart disease in the patients of four hospitals (UCI's files in data.path)",
    input=InputSchema(shape=(len(FEATURES),), features=FEATURES),
    output=OutputSchema(labels=("no disease", "disease"), activation="sigmoid"),
    preprocessing=(OneHot(ENCODED), Standardise()),
    network=network,
    loss=sigmoid_loss,
    counters=sigmoid_counters(positive=1),
    metrics=(ACCURACY, SENSITIVITY, SPECIFICITY, LOSS),
    load=load,
)
