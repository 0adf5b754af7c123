"""Reads the data sets that scikit-learn includes from its files.

Its own loaders import most of scikit-learn and scipy, over two seconds of processor time in each process of a site;
they are used where a release keeps its files elsewhere.
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
        name: of the file, such as ``digits.csv.gz``; it must hold numbers only.
        loader: name of scikit-learn's function for the same data, such as ``load_digits``.
        header: number of lines above the numbers.

    Returns:
        ``(rows, columns)``, float64; the last column holds the labels.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("scikit-learn: must be installed, got no such package")
    path = Path(package.origin).parent / "datasets" / "data" / name
    if path.is_file():
        return np.loadtxt(path, delimiter=",", skiprows=header)
    from sklearn import datasets

    bunch = getattr(datasets, loader)()
    return np.column_stack([bunch.data, bunch.target])
