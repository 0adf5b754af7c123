import numpy as np
import pytest

from fedge.client.training.control_variates import ControlStore
from fedge.shared.errors import RunError, SiteError
from fedge.shared.wire.tensors import specs

ONE = {"w": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)}
SPECS = specs(ONE)


@pytest.fixture
def store(tmp_path):
    return ControlStore(tmp_path / "control" / "r-1")


def times(factor):
    return {name: a * np.float32(factor) for name, a in ONE.items()}


def kept(store):
    return sorted(path.name for path in store.folder.iterdir())


def test_starts_from_zeros_and_reads_nothing(store):
    assert all((a == 0).all() for a in store.load(0, SPECS).values())
    assert not store.folder.exists()


def test_returns_what_was_saved(store):
    store.save(3, 0, times(7))
    found = store.load(3, SPECS)
    assert list(found) == list(SPECS)
    assert (found["w"] == 7).all()


def test_a_redone_round_starts_from_the_accepted_one(store):
    store.save(1, 0, times(1))
    store.save(2, 1, times(2))
    store.save(2, 1, times(3))
    assert (store.load(1, SPECS)["w"] == 1).all()
    assert (store.load(2, SPECS)["w"] == 3).all()


def test_prunes_what_nobody_can_ask_for(store):
    for server_round in range(1, 6):
        store.save(server_round, server_round - 1, times(server_round))
    assert kept(store) == ["000004.safetensors", "000005.safetensors"]


def test_refused_rounds_do_not_pile_up(store):
    for server_round in range(1, 20):
        store.save(server_round, min(server_round - 1, 2), times(1))
    assert kept(store) == ["000002.safetensors", "000019.safetensors"]


def test_a_replayed_old_request_deletes_no_later_state(store):
    for server_round in range(1, 6):
        store.save(server_round, server_round - 1, times(server_round))
    store.save(1, 0, times(9))
    assert (store.load(5, SPECS)["w"] == 5).all()


def test_a_lost_state_is_an_error_not_zeros(store):
    with pytest.raises(SiteError, match="must exist") as caught:
        store.load(2, SPECS)
    assert caught.value.code == 413


def test_another_models_state_is_refused(store):
    store.save(1, 0, {"w": np.ones((3, 2), np.float32), "b": ONE["b"]})
    with pytest.raises(SiteError, match="this model's tensors"):
        store.load(1, SPECS)


def test_a_damaged_file_is_named(store):
    store.save(1, 0, ONE)
    (store.folder / "000001.safetensors").write_bytes(b"\xff" * 40)
    with pytest.raises(RunError, match="000001.safetensors") as caught:
        store.load(1, SPECS)
    assert caught.value.code == 504
