"""The data sets that scikit-learn brings along, read from its files.

Its own loaders import most of scikit-learn and scipy, over two seconds of processor time in each process of a site;
they are asked where a release keeps its files elsewhere.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def rows(name: str, loader: str, header: int = 0) -> NDArray[Any]:
    """The numbers of a file, as ``sklearn.datasets`` reads them.

    Args:
        name: ``digits.csv.gz`` or another of its files of numbers alone.
        loader: its own function for the same, such as ``load_digits``.
        header: lines above the numbers.

    Returns:
        ``(rows, columns)``, float64; the last column holds the labels.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("scikit-learn: must be installed, got no such package")
    path = Path(found.origin).parent / "datasets" / "data" / name
    if path.is_file():
        return np.loadtxt(path, delimiter=",", skiprows=header)
    from sklearn import datasets

    bunch = getattr(datasets, loader)()
    return np.column_stack([bunch.data, bunch.target])
