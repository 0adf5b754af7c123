from dataclasses import replace
from functools import partial

import builders
import numpy as np
import pytest
from builders import config

from fedge.client.data.dataset import own_examples, site_shares
from fedge.client.settings.site_config import OwnData
from fedge.shared.errors import DataError
from fedge.shared.tasks.registry import get_task
from fedge.shared.tasks.task import Table


def held_by(table, task):
    return replace(task, load=lambda path: table)


def test_digits_are_divided_without_overlap():
    shares = site_shares(config(), get_task("digits"))
    assert list(shares) == [f"site-{i}" for i in range(1, 6)]
    rows = [len(s.train_labels) + len(s.test_labels) for s in shares.values()]
    assert sum(rows) == 1797
    for share, count in zip(shares.values(), rows, strict=True):
        assert len(share.test_labels) == max(1, min(round(count * 0.25), count - 2))
        assert share.train_features.shape[1:] == (8, 8)
        assert share.train_features.dtype == np.float32
        assert share.train_labels.dtype == np.int64


def test_train_and_test_rows_are_disjoint(task):
    table = Table(np.arange(80, dtype=np.float32).reshape(40, 2), np.arange(40) % 2)
    shares = site_shares(
        config(data={"partition": "iid"}, sites={"count": 4}), held_by(table, task)
    )
    every = np.concatenate(
        [f for s in shares.values() for f in (s.train_features, s.test_features)]
    )
    assert sorted(every[:, 0].tolist()) == table.features[:, 0].tolist()


def test_seed_decides():
    first, same, other = (
        site_shares(config(run={"seed": seed}), get_task("digits"))["site-3"] for seed in (1, 1, 2)
    )
    assert np.array_equal(first.train_features, same.train_features)
    assert not np.array_equal(first.test_features, other.test_features)


def test_heart_keeps_its_own_split(data_folder):
    asked = config("heart", data={"partition": "natural", "path": str(data_folder / "heart")})
    shares = site_shares(asked, get_task("heart"))
    sizes = {site: (len(s.train_labels), len(s.test_labels)) for site, s in shares.items()}
    assert sizes == {
        "cleveland": (199, 104),
        "hungary": (172, 89),
        "switzerland": (30, 16),
        "va": (85, 45),
    }


def test_natural_partition_needs_natural_sites():
    with pytest.raises(DataError) as caught:
        site_shares(config(data={"partition": "natural"}), get_task("digits"))
    assert caught.value.code == 303


def test_heart_needs_a_folder():
    with pytest.raises(DataError, match=r"data\.path: must be the folder of .*, got nothing") as e:
        site_shares(config("heart", data={"partition": "natural"}), get_task("heart"))
    assert e.value.code == 301


def test_a_site_without_test_rows_is_refused(task):
    table = Table(
        np.zeros((6, 2), np.float32),
        np.zeros(6, np.int64),
        sites=np.array(["a", "a", "a", "b", "b", "b"]),
        test=np.array([True, False, False, False, False, False]),
    )
    with pytest.raises(DataError, match="b: must hold 2 rows .* got 3 and 0") as caught:
        site_shares(config(data={"partition": "natural"}), held_by(table, task))
    assert caught.value.code == 303


def test_a_natural_name_must_be_a_site_name(task):
    table = Table(np.zeros((4, 2), np.float32), np.zeros(4, np.int64), sites=np.array(["../x"] * 4))
    with pytest.raises(DataError, match="site name: must match") as caught:
        site_shares(config(data={"partition": "natural"}), held_by(table, task))
    assert caught.value.code == 302


def test_a_load_that_fails_is_told_as_the_tasks(task):
    def load(path):
        return len(None)

    with pytest.raises(DataError, match="task blobs: load failed: TypeError: object of type") as e:
        site_shares(config(), replace(task, load=load))
    assert e.value.code == 302


FEATURES, LABELS = np.zeros((40, 2), np.float32), np.arange(40) % 2


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (None, "load must give a Table, got NoneType"),
        (
            Table(FEATURES.astype(np.float64), LABELS),
            r"features must be float32 of shape \(40, 2\), got float64 of shape \(40, 2\)",
        ),
        (Table(FEATURES[:, :1], LABELS), r"features must be .*, got float32 of shape \(40, 1\)"),
        (Table(FEATURES[:9], LABELS), r"features must be .*, got float32 of shape \(9, 2\)"),
        (Table(FEATURES.tolist(), LABELS), "features must be .*, got list"),
        (Table(FEATURES, LABELS.astype(np.float64)), "labels must be int64 of shape .*float64"),
        (Table(FEATURES, LABELS.reshape(40, 1)), r"labels must be .* of shape \(40,\), got"),
        (Table(FEATURES, LABELS + 1), "row 1: the label must be 0 to 1, got 2"),
        (Table(FEATURES, LABELS - 1), "row 0: the label must be 0 to 1, got -1"),
    ],
)
def test_a_table_that_is_not_as_declared_is_refused(table, said, task):
    with pytest.raises(DataError, match=f"task blobs: {said}") as caught:
        site_shares(config(), held_by(table, task))
    assert caught.value.code == 302


def test_a_table_as_declared_passes(task):
    asked = config(sites={"count": 2}, data={"partition": "iid"})
    assert len(site_shares(asked, held_by(Table(FEATURES, LABELS), task))) == 2


# A site by itself


section = partial(builders.section, OwnData, test_fraction=0.25, seed=42)


@pytest.fixture
def named(task):
    features = np.arange(80, dtype=np.float32).reshape(40, 2)
    sites = np.array(["north", "south"])[np.arange(40) % 2]
    return Table(features, np.arange(40) // 2 % 2, sites=sites)


def test_a_site_that_the_data_name_holds_its_rows(task, named):
    found = own_examples(held_by(named, task), "south", section())
    rows = np.concatenate([found.train_features, found.test_features])
    assert sorted(rows[:, 0].tolist()) == named.features[1::2, 0].tolist()
    assert len(found.test_labels) == 5


def test_a_named_site_is_the_one_of_a_simulation(task, named):
    own = own_examples(held_by(named, task), "south", section(seed=7))
    conf = config(data={"partition": "natural"}, run={"seed": 7})
    share = site_shares(conf, held_by(named, task))["south"]
    assert np.array_equal(own.train_features, share.train_features)
    assert np.array_equal(own.test_labels, share.test_labels)


@pytest.mark.parametrize("sites", [True, False])
def test_any_other_site_holds_all_rows(task, named, sites):
    table = named if sites else replace(named, sites=None)
    found = own_examples(held_by(table, task), "east", section())
    assert len(found.train_labels) + len(found.test_labels) == 40


def test_the_datas_own_split_holds(task, named):
    table = replace(named, test=np.arange(40) < 10)
    found = own_examples(held_by(table, task), "east", section())
    assert np.array_equal(found.test_features, named.features[:10])


def test_too_few_rows_of_its_own_are_refused(task, named):
    table = replace(named, sites=np.array(["a"] * 2 + ["b"] * 38))
    with pytest.raises(DataError) as caught:
        own_examples(held_by(table, task), "a", section())
    assert caught.value.code == 303


def test_the_task_is_given_the_sites_path(task, named, tmp_path):
    seen = []
    reading = replace(task, load=lambda path: seen.append(path) or named)
    own_examples(reading, "east", section(path=tmp_path))
    assert seen == [tmp_path]
