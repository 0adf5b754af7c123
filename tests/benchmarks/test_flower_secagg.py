"""The benchmark of Flower's own SecAgg+: that it times a round which is right, and counts what travels."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def flower():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("flower_secagg", FOLDER / "flower_secagg.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["flower_secagg"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before
    for name in ("flower_secagg", "flower_secagg_peers"):
        del sys.modules[name]


@pytest.mark.soak
def test_a_client_uploads_eight_bytes_a_parameter(flower):
    small, large = (flower.client_once(5, 4, d) for d in (1000, 3000))
    assert large.upload_bytes - small.upload_bytes == 2000 * 8
    assert list(small.parts) == ["setup", "share", "mask", "unmask"]
    assert small.seconds == pytest.approx(sum(small.parts.values()))


@pytest.mark.soak
@pytest.mark.parametrize(
    ("n", "degree", "dropped"), [(5, 4, 0.0), (8, 7, 0.25), (9, 4, 0.0), (10, 4, 0.1)]
)
def test_the_server_finds_the_mean(flower, n, degree, dropped):
    timing = flower.server_once(n, degree, 500, dropped)
    assert list(timing.parts) == ["add", "unmask"]
    assert timing.upload_bytes == 0


@pytest.mark.soak
def test_too_many_drops_end_the_round(flower):
    with pytest.raises(RuntimeError, match="must find a sum, got none"):
        flower.server_once(6, 5, 500, dropped=0.5)


@pytest.mark.soak
def test_a_wrong_mean_is_reported(flower):
    work = flower.prepare_server(5, 4, 500, 0.0, 1)
    work.mean[7] += 0.001
    with pytest.raises(RuntimeError, match="must find the mean to 1.5e-05"):
        flower.server_run(work)


def test_the_ring(flower):
    around = sys.modules["flower_secagg_peers"].neighbours
    assert around(1, 10, 4) == {9, 10, 1, 2, 3}
    assert around(3, 5, 4) == {1, 2, 3, 4, 5}
    assert all(len(around(a, 100, 30)) == 31 for a in range(1, 101))
