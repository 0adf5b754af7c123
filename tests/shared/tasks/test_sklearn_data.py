"""The data sets of scikit-learn, read without it: the same numbers as its own loaders give."""

import subprocess
import sys
from importlib.machinery import ModuleSpec

import numpy as np
import pytest

from fedge.shared.tasks import breast_cancer, digits, sklearn_data


def test_the_tables_are_scikit_learns():
    from sklearn.datasets import load_breast_cancer, load_digits

    for own, bunch, features in (
        (digits.load(), load_digits(), "images"),
        (breast_cancer.load(), load_breast_cancer(), "data"),
    ):
        assert own.features.dtype == np.float32
        assert own.features.flags.c_contiguous
        assert np.array_equal(own.features, bunch[features].astype(np.float32))
        assert own.labels.dtype == np.int64
        assert np.array_equal(own.labels, bunch.target)


def test_the_names_of_the_columns_and_labels_are_its_own():
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer()
    assert list(breast_cancer.LABELS) == list(bunch.target_names)
    assert [f.name for f in breast_cancer.FEATURES] == list(bunch.feature_names)


@pytest.mark.slow
def test_nothing_of_it_is_imported():
    code = (
        "import sys; from fedge.shared.tasks import breast_cancer, digits;"
        "breast_cancer.load(); digits.load();"
        "print([m for m in ('sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "[]"


def test_where_the_file_lies_elsewhere_its_loader_gives_the_same():
    for name, loader, header in (
        ("digits.csv.gz", "load_digits", 0),
        ("breast_cancer.csv", "load_breast_cancer", 1),
    ):
        found = sklearn_data.rows(name, loader, header)
        assert np.array_equal(sklearn_data.rows("moved", loader), found)


@pytest.mark.parametrize("found", [None, ModuleSpec("sklearn", None)])
def test_without_it_its_name_is_told(found, monkeypatch):
    monkeypatch.setattr(sklearn_data, "find_spec", lambda _: found)
    with pytest.raises(ModuleNotFoundError, match="scikit-learn: must be installed"):
        sklearn_data.rows("digits.csv.gz", "load_digits")
