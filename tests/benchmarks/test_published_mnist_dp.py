"""mnist-dp: Opacus' network and settings, through the product, and each pass mark can be missed."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fedge.client.privacy.noise_calibration import Noise, release_of
from fedge.shared.errors import DataError
from fedge.shared.privacy.accounting import epsilon as accounting
from fedge.shared.tasks.dry_run import check
from fedge.shared.tasks.registry import get_task, task_names

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
LOADED = (
    "published",
    "published_heart_dp",
    "published_mnist_dp",
    "published_pooled",
    "published_private",
)


@pytest.fixture(scope="module")
def published():
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    for name in LOADED:
        sys.modules.pop(name, None)
    yield importlib.import_module("published")
    for name in LOADED:
        sys.modules.pop(name, None)
    sys.path[:] = before


@pytest.fixture(scope="module")
def mnist(published):
    return published.published_mnist_dp


@pytest.fixture
def images(tmp_path):
    """A folder of the data's format: 480 images to train on, 20 to test on."""
    draw = np.random.default_rng(0)
    np.savez(
        tmp_path / "mnist.npz",
        x_train=draw.integers(0, 256, (480, 28, 28), dtype=np.uint8),
        y_train=draw.integers(0, 10, 480, dtype=np.uint8),
        x_test=np.full((20, 28, 28), 255, dtype=np.uint8),
        y_test=np.zeros(20, dtype=np.uint8),
    )
    return tmp_path


def one(mnist, accuracy=0.9486, epsilon=0.8336, accountant="PLD"):
    private = sys.modules["published_private"]
    account = private.Account(epsilon, accountant, 15, 3750, 0.004, 1.3, epsilon, 1e-5)
    by_round = [{"site-1": 0.9}, {"site-1": accuracy}]
    return [private.Run({"site-1": accuracy}, by_round, {"site-1": account})]


def test_the_network_is_the_examples(mnist):
    network = mnist.ExampleCNN()
    assert sum(p.numel() for p in network.parameters()) == 26_010
    assert network(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    check(mnist.TASK)


def test_pixels_are_standardised_by_the_published_constants(mnist, images):
    table = mnist.load(images)
    assert table.features.dtype == np.float32 and table.labels.dtype == np.int64
    assert table.test.tolist() == [False] * 480 + [True] * 20
    assert table.features[-1].max() == pytest.approx((1 - 0.1307) / 0.3081)
    raw = np.load(images / "mnist.npz")["x_train"]
    assert np.allclose(table.features[:480], (raw / 255 - 0.1307) / 0.3081, rtol=0, atol=1e-6)


def test_the_task_is_installed_for_as_long_as_it_is_used(mnist):
    with mnist.installed():
        assert get_task("published-mnist") is mnist.TASK
    assert "published-mnist" not in task_names()
    with pytest.raises(DataError, match="task.name: must be one of"):
        get_task("published-mnist")


@pytest.mark.soak
def test_the_settings_are_the_examples_and_cost_less_than_1(mnist, tmp_path):
    config = mnist.configuration(42, tmp_path)
    noise = Noise(config.privacy.noise_multiplier, config.privacy.clipping_bound)
    assert noise == Noise(1.3, 1.5)
    release = release_of(noise, config.train, 60_000)
    assert (release.sampling_rate, release.steps) == (0.004, 250)
    assert (config.run.rounds, config.train.learning_rate) == (15, 0.25)
    spent = accounting.epsilon([release] * 15, mnist.DELTA)
    assert spent == pytest.approx(0.8336, abs=1e-3)
    assert accounting.accountant([release] * 15) == "PLD"
    # A noise multiplier of 1, as it is often set, would cost more than the mark.
    less = release_of(Noise(1.0, 1.5), config.train, 60_000)
    assert accounting.epsilon([less] * 15, mnist.DELTA) > mnist.MAX_EPSILON


@pytest.mark.soak
def test_a_run_of_single_steps_goes_through_the_engine(mnist, images):
    private = sys.modules["published_private"]
    reported = []
    with mnist.installed():
        config = mnist.configuration(42, images, rounds=2, steps=1, threads=1)
        found = private.run(config, mnist.DELTA, mnist._EpochReporter("seed 42", reported.append))
    account = found.accounts["site-1"]
    assert (account.charges, account.steps, account.sampling_rate) == (2, 2, 0.5)
    assert account.noise_multiplier == 1.3
    assert len(found.by_round) == 2 and 0 <= found.accuracy["site-1"] <= 1
    assert [line.split(":")[0] for line in reported] == ["seed 42, epoch 1", "seed 42, epoch 2"]


def test_the_published_value_passes(mnist):
    result = mnist.judge(one(mnist))
    assert result["passed"] and result["seeds"] == 1
    assert result["per_seed"]["42"]["by_epoch"] == [0.9, 0.9486]
    assert "MISSED" not in mnist.table(result) and "1 seed," in mnist.table(result)


@pytest.mark.parametrize(
    ("change", "missed"),
    [
        ({"accuracy": 0.9399}, "accuracy"),
        ({"epsilon": 1.0001}, "epsilon"),
        ({"accountant": "RDP"}, "epsilon"),
    ],
)
def test_each_mark_can_be_missed(mnist, change, missed):
    result = mnist.judge(one(mnist, **change))
    assert [name for name, mark in result["marks"].items() if not mark["passed"]] == [missed]
    assert not result["passed"]
    assert mnist.table(result).count("MISSED") == 1


@pytest.mark.parametrize(("accuracy", "status"), [(0.94, 0), (0.93, 1)])
def test_the_command_writes_the_table_and_reports_missed_marks(
    published, mnist, accuracy, status, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(mnist, "mnist_dp", lambda data, report: one(mnist, accuracy))
    monkeypatch.setattr(published, "RESULTS", tmp_path)
    assert published.main(["mnist-dp", "--data", str(tmp_path)]) == status
    assert ("MISSED" in capsys.readouterr().out) is bool(status)
    assert (tmp_path / "published-mnist-dp.json").is_file()


def test_a_missing_file_is_one_line_and_exit_1(published, tmp_path, capsys):
    assert published.main(["mnist-dp", "--data", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("FE-301 data.path: must be the folder of mnist.npz")
