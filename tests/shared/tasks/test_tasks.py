"""What every task that is installed with fedge must hold to."""

import numpy as np
import pytest
import torch

from fedge.edge.inputs.row_rules import RowRules
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema
from fedge.shared.tasks.registry import get_task

NAMES = ["breast-cancer", "digits", "gtsrb", "heart", "hmp-adl"]
#: Folders of the tasks that read files.
FOLDERS = {"gtsrb": "gtsrb", "heart": "heart", "hmp-adl": "hmp_adl"}


@pytest.fixture(params=NAMES)
def task(request):
    return get_task(request.param)


@pytest.fixture
def table(task, request):
    if task.name not in FOLDERS:
        return task.load(None)
    return task.load(request.getfixturevalue("data_folder") / FOLDERS[task.name])


def ready(task, x):
    steps = task.preprocessing
    if preprocessing.learns(steps):
        steps = preprocessing.fitted(steps, preprocessing.statistics(steps, x).standardise())
    return torch.from_numpy(preprocessing.apply(steps, x))


def test_examples_follow_the_schema(task, table):
    assert table.features.shape[1:] == task.input.shape
    assert str(table.features.dtype) == task.input.dtype == "float32"
    assert table.labels.dtype == np.int64
    assert set(table.labels.tolist()) == set(range(len(task.output.labels)))
    assert np.isfinite(table.features).all()


def test_means_lie_in_the_declared_ranges(task, table):
    if len(task.input.shape) > 1:
        assert task.input.features == ()
        return
    assert len(task.input.features) == task.input.shape[0]
    groups = [table.features]
    if table.sites is not None:
        groups += [table.features[table.sites == site] for site in np.unique(table.sites)]
    for group in groups:
        for feature, mean in zip(task.input.features, group.mean(0), strict=True):
            assert feature.low <= mean <= feature.high, feature.name


def test_every_row_lies_in_the_declared_ranges(task, table):
    rules = RowRules.from_schema(task.input, task.preprocessing)
    assert set(rules.outside(rules.checked(table.features.reshape(len(table.labels), -1), 0))) == {
        ()
    }


def test_network_takes_what_preprocessing_gives(task, table):
    torch.manual_seed(0)
    logits = task.network()(ready(task, table.features[:64]))
    expected = len(task.output.labels) if task.output.activation == "softmax" else 1
    assert logits.shape == (64, expected)
    labels = torch.from_numpy(table.labels[:64])
    loss = task.loss(logits, labels)
    assert torch.isfinite(loss)
    found = task.counters(logits, labels)
    assert found["loss-sum"] / found["examples"] == pytest.approx(loss.item(), rel=1e-5)
    assert set(task.counter_names) <= set(found)
    assert all(0 <= v <= 64 for name, v in found.items() if name != "loss-sum")


def test_seed_decides_the_weights(task):
    def build(seed):
        torch.manual_seed(seed)
        return task.network().state_dict()

    first, same, other = build(1), build(1), build(2)
    assert all(torch.equal(first[k], same[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_declaration_survives_the_manifest(task):
    assert InputSchema.from_json(task.input.to_json()) == task.input
    assert OutputSchema.from_json(task.output.to_json()) == task.output
    steps = [step.to_json() for step in task.preprocessing]
    assert preprocessing.from_json(steps) == task.preprocessing
