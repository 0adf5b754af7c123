import importlib.util
import sys
from pathlib import Path

import pytest

LOADED = (
    "published",
    "published_heart_dp",
    "published_mnist_dp",
    "published_pooled",
    "published_private",
)
SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "published.py"


@pytest.fixture(scope="module")
def published():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("published", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["published"] = module
    spec.loader.exec_module(module)
    yield module
    for name in LOADED:
        sys.modules.pop(name, None)
    sys.path[:] = before


def measured(published, **shifts):
    return {
        method: [[a + shifts.get(method, 0.0) for a in row.published] for _ in published.SEEDS]
        for method, row in published.FED_HEART.items()
    }


def test_the_published_values_pass(published):
    result = published.judge(measured(published))
    assert result["passed"]
    assert "MISSED" not in published.table(result)


@pytest.mark.parametrize("shift", [-0.03, 0.03])
def test_a_method_off_its_mean_is_missed(published, shift):
    result = published.judge(measured(published, pooled=shift))
    assert not result["passed"]
    assert [m for m, row in result["rows"].items() if not row["passed"]] == ["pooled"]
    assert "MISSED" in published.table(result)


def test_an_adaptive_method_too_near_to_fedavg_is_missed(published):
    # Each within its own tolerance, but not far enough apart.
    result = published.judge(measured(published, FedAdam=-0.015, FedAvg=0.005))
    assert all(row["passed"] for row in result["rows"].values())
    assert not result["above_fedavg"]["FedAdam"]["passed"]
    assert not result["passed"]


def test_a_missing_folder_is_one_line_and_exit_1(published, tmp_path, capsys):
    assert published.main(["fed-heart", "--data", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("FE-301 ")


@pytest.mark.soak
def test_pooled_row_is_reached(published, data_folder):
    row = published.FED_HEART[published.POOLED]
    found = published.central(published.configuration(row, 42, data_folder / "heart"))
    assert sum(found) / 4 == pytest.approx(row.published_mean, abs=published.TOLERANCE)


@pytest.mark.parametrize(("shift", "status"), [(0.0, 0), (0.03, 1)])
def test_the_exit_status_is_1_where_a_pass_mark_is_missed(
    published, shift, status, monkeypatch, tmp_path, capsys
):
    result = published.judge(measured(published, FedAvg=shift))
    monkeypatch.setattr(published, "fed_heart", lambda data, report: result)
    monkeypatch.setattr(published, "RESULTS", tmp_path)
    assert published.main(["fed-heart", "--data", str(tmp_path)]) == status
    assert ("MISSED" in capsys.readouterr().out) is bool(status)
    assert (tmp_path / "published-fed-heart.json").is_file()
