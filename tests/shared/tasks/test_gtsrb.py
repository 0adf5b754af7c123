import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fedge.shared.config.reader import load as load_config
from fedge.shared.errors import DataError
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.tasks import npz
from fedge.shared.tasks.dry_run import check
from fedge.shared.tasks.gtsrb import FILE, LABELS, SITES, TASK, divided, load

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "gtsrb.toml"


@pytest.fixture(scope="module")
def table(data_folder):
    started = time.process_time()
    found = load(data_folder / "gtsrb")
    assert time.process_time() - started < 5
    return found


def arrays(rows=12):
    """Arrays as in the file: three tracks of class 0."""
    return {
        "x": np.zeros((rows, 32, 32, 3), np.uint8),
        "y": np.zeros(rows, np.int16),
        "track": np.arange(rows, dtype=np.int16) // 4,
    }


def refusal(path):
    with pytest.raises(DataError) as caught:
        load(path)
    return caught.value.code, str(caught.value)


def test_what_the_file_holds(table):
    assert table.features.shape == (8880, 3, 32, 32) and table.features.dtype == np.float32
    assert (table.features.min(), table.features.max()) == (0, 255)
    assert np.bincount(table.labels).tolist()[:3] == [50, 500, 500] and len(LABELS) == 43
    assert 0.2 < table.test.mean() < 0.25


def test_images_are_channels_first(table, data_folder):
    with np.load(data_folder / "gtsrb" / FILE, allow_pickle=False) as file:
        pixel = file["x"][4321, 7, 11]
    assert table.features[4321, :, 7, 11].tolist() == pixel.tolist()


def test_a_track_is_never_divided(table, data_folder):
    with np.load(data_folder / "gtsrb" / FILE, allow_pickle=False) as file:
        tracks = file["track"].astype(int)
    sign = table.labels * 1000 + tracks
    assert len(np.unique(sign)) == 888
    for part in (table.test, table.sites):
        assert len({*zip(sign.tolist(), part.tolist(), strict=True)}) == 888
    # By frame, as one should not, nearly every sign would be on both sides.
    by_frame = np.random.default_rng(0).random(len(sign)) < 0.25
    assert len({*zip(sign.tolist(), by_frame.tolist(), strict=True)}) > 1700


def test_vehicles_are_unlike_and_can_test_what_they_train(table):
    assert len(np.unique(table.sites)) == SITES
    for site in np.unique(table.sites):
        own = table.sites == site
        train, test = (set(table.labels[own & part]) for part in (~table.test, table.test))
        assert test < train and len(train) < 35
        assert 700 < (own & ~table.test).sum() < 1000
    assert len(set(table.labels[table.test])) == len(LABELS)


def test_tracks_are_dealt_by_fours_in_order():
    labels = np.repeat([0, 1], 12)
    sites, test = divided(labels, np.tile(np.arange(12)[::-1], 2))
    assert sites[:12].tolist() == ["vehicle-3"] * 4 + ["vehicle-2"] * 4 + ["vehicle-1"] * 4
    assert sites[12:16].tolist() == ["vehicle-4"] * 4
    assert np.flatnonzero(test[:12]).tolist() == [0, 4, 8]


def test_the_task_fits_together():
    check(TASK)


def test_the_file_itself_may_be_named(tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays(), other=np.array(["not", "read"], dtype=object))
    table = load(tmp_path / "mine.npz")
    assert len(table.labels) == 12 and not table.test.any()


@pytest.mark.parametrize("path", [None, "nowhere", "."])
def test_the_file_must_be_there(path, tmp_path):
    code, message = refusal(tmp_path / path if path else None)
    assert code == 301 and ("data.path" in message if path is None else "readable" in message)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": np.zeros((12, 32, 32), np.uint8)}, r"array x: must be u1 of shape \(n, 32, 32, 3\)"),
        ({"x": np.zeros((12, 32, 32, 3), np.float32)}, r"array x: must be u1"),
        ({"x": np.zeros((0, 32, 32, 3), np.uint8)}, r"array x: must have 1 to 60000 rows, got 0"),
        ({"x": np.zeros((13, 32, 32, 3), np.uint8)}, r"as many rows each"),
        ({"x": np.asfortranarray(np.zeros((12, 32, 32, 3), np.uint8))}, r"array x: .* C order"),
        ({"y": np.full(12, 43)}, r"array y, row 0: must be a class 0 to 42, got 43"),
        ({"y": np.full(12, -1)}, r"array y, row 0: .*got -1"),
        ({"track": np.array([{}] * 12, dtype=object)}, r"array track: must be one plain array"),
        ({"track": None}, r"array track: must be there"),
    ],
)
def test_a_bad_array_is_named(tmp_path, change, named):
    kept = {name: array for name, array in (arrays() | change).items() if array is not None}
    np.savez(tmp_path / FILE, **kept)
    with pytest.raises(DataError, match=named) as caught:
        load(tmp_path)
    assert caught.value.code == 302


@pytest.mark.parametrize("damage", ["text", "cut", "flipped"])
def test_a_damaged_file_is_refused(tmp_path, damage):
    file = tmp_path / FILE
    np.savez_compressed(file, **{**arrays(), "x": np.random.default_rng(0).integers(
        0, 256, (12, 32, 32, 3), dtype=np.uint8)})  # fmt: skip
    data = bytearray(file.read_bytes())
    if damage == "text":
        data = bytearray(b"x,y,track\n")
    elif damage == "cut":
        del data[-200:]
    else:
        data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    assert refusal(file)[0] == 302


def test_a_header_that_promises_more_than_there_is(tmp_path):
    np.savez(tmp_path / FILE, **{**arrays(), "x": np.zeros((10, 32, 32, 3), np.uint8)})
    file = tmp_path / FILE
    data = file.read_bytes().replace(b"'shape': (10, 32, 32, 3)", b"'shape': (90, 32, 32, 3)")
    file.write_bytes(data)
    # The archive's own checksum is of the member's end, so the length is what betrays it.
    code, message = refusal(file)
    assert code == 302 and ("must hold 276480 bytes" in message or "BadZipFile" in message)


def test_size_is_bounded(tmp_path, monkeypatch):
    np.savez(tmp_path / FILE, **arrays())
    monkeypatch.setattr(npz, "MAX_FILE_BYTES", 1000)
    assert refusal(tmp_path)[0] == 302


def test_the_example_names_the_task():
    config = load_config(EXAMPLE, ["secure-aggregation.enabled=true"])
    assert config.task.name == TASK.name and config.data.partition == "natural"


@pytest.mark.soak
def test_the_network_learns(table):
    torch.manual_seed(0)
    # Six frequent signs are a question that seconds can answer.
    frequent = np.isin(table.labels, np.argsort(np.bincount(table.labels))[-6:])
    x = torch.from_numpy(preprocessing.apply(TASK.preprocessing, table.features))
    y = torch.from_numpy(table.labels)
    train, test = (
        torch.from_numpy(np.flatnonzero(frequent & p)) for p in (~table.test, table.test)
    )
    network = TASK.network()
    steps = torch.optim.Adam(network.parameters(), 0.001)
    for rows in train[torch.randperm(len(train))].split(32):
        steps.zero_grad()
        TASK.loss(network(x[rows]), y[rows]).backward()
        steps.step()
    with torch.no_grad():
        found = TASK.values(TASK.counters(network(x[test]), y[test]))
    # Chance is 1/6.
    assert found["accuracy"] > 0.4, found
