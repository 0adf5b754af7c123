"""Checkpoints: the model and the strategy's state are restored bit for bit, or damage is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedge.server.runs import checkpoints
from fedge.server.runs.journal import Commit
from fedge.shared.errors import RunError
from fedge.shared.tasks.registry import get_task

Arrays = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def memory(model: Arrays) -> Arrays:
    return {f"m_t/{k}": a * 2 for k, a in model.items()}


def same(one: Arrays, other: Arrays) -> bool:
    return {k: (a.dtype, a.shape, a.tobytes()) for k, a in one.items()} == {
        k: (a.dtype, a.shape, a.tobytes()) for k, a in other.items()
    }


def test_initial_arrays_are_a_function_of_the_seed_alone():
    task = get_task("breast-cancer")
    torch.manual_seed(1)
    first = checkpoints.initial_arrays(task, 42)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = checkpoints.initial_arrays(task, 42)
    assert torch.equal(torch.get_rng_state(), before), "drawing must disturb nobody"
    assert list(first) == list(task.network().state_dict())
    assert same(first, second)
    assert not same(first, checkpoints.initial_arrays(task, 43))


def test_round_trip_in_the_models_order(model: Arrays, memory: Arrays, tmp_path: Path):
    commit = checkpoints.write(tmp_path / "checkpoints", 7, model, memory)
    assert commit.number == 7
    order = list(reversed(model))
    arrays, held = checkpoints.load(tmp_path / "checkpoints", commit, order)
    assert list(arrays) == order
    assert same(arrays, model)
    assert same(held, memory)


def test_the_same_state_gives_the_same_file(model: Arrays, memory: Arrays, tmp_path: Path):
    first = checkpoints.write(tmp_path, 1, model, memory)
    second = checkpoints.write(tmp_path, 1, model, dict(reversed(memory.items())))
    assert first == second


def test_a_tensor_may_be_called_like_memory(tmp_path: Path):
    arrays = {"memory/m_t/a": np.ones(2), "arrays/b": np.zeros(3)}
    commit = checkpoints.write(tmp_path, 0, arrays, {"m_t/a": np.full(4, 5.0)})
    loaded, held = checkpoints.load(tmp_path, commit, list(arrays))
    assert same(loaded, arrays)
    assert same(held, {"m_t/a": np.full(4, 5.0)})


@pytest.mark.parametrize("place", [0, 8, 60, -1])
def test_one_flipped_byte_is_refused(place: int, model: Arrays, memory: Arrays, tmp_path: Path):
    commit = checkpoints.write(tmp_path, 3, model, memory)
    path = tmp_path / commit.checkpoint
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(RunError, match=commit.checkpoint) as refused:
        checkpoints.load(tmp_path, commit, list(model))
    assert refused.value.code == 504


def test_a_missing_checkpoint_is_refused(model: Arrays, tmp_path: Path):
    with pytest.raises(RunError) as refused:
        checkpoints.load(tmp_path, Commit(1, "round-000001.safetensors", "0" * 64), list(model))
    assert refused.value.code == 504


def test_another_networks_checkpoint_is_refused(model: Arrays, tmp_path: Path):
    commit = checkpoints.write(tmp_path, 1, model, {})
    with pytest.raises(RunError, match=r"fc2\.weight") as refused:
        checkpoints.load(tmp_path, commit, [*model, "fc2.weight"])
    assert refused.value.code == 504


def test_prune_keeps_the_last_two(model: Arrays, tmp_path: Path):
    for server_round in range(6):
        checkpoints.write(tmp_path, server_round, model, {})
    checkpoints.prune(tmp_path, 4)
    kept = [f"round-{n:06d}.safetensors" for n in (3, 4)]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept, "round 5 was never committed"


def test_prune_removes_what_a_kill_left(model: Arrays, tmp_path: Path):
    checkpoints.write(tmp_path, 0, model, {})
    (tmp_path / ".round-000001.safetensors.tmp").write_bytes(b"half")
    checkpoints.prune(tmp_path, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["round-000000.safetensors"]


def test_prune_keeps_as_many_as_it_is_told(model: Arrays, tmp_path: Path):
    for server_round in range(4):
        checkpoints.write(tmp_path, server_round, model, {})
    checkpoints.prune(tmp_path, 3, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["round-000003.safetensors"]
