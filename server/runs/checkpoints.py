"""A round's checkpoint: the global model and the strategy's state, in one safetensors file."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from fedge.server.runs.journal import Commit
from fedge.shared.config.privacy import CENTRAL, PrivacySection
from fedge.shared.errors import RunError
from fedge.shared.failpoints import reach
from fedge.shared.files import write_atomically
from fedge.shared.wire.tensors import NDArrays, encode, read

if TYPE_CHECKING:
    from fedge.shared.tasks.task import Task

_ARRAYS, _MEMORY = "arrays/", "memory/"
#: Checkpoints that are kept: the newest counts, the one before it guards against a disk that lies about a flush.
CHECKPOINTS_KEPT = 2


def initial_arrays(task: Task, seed: int) -> NDArrays:
    """The task's initial weights, a function of ``seed`` alone.

    Args:
        task: the task whose network is initialised.
        seed: of torch's generator; its global state is left as it was.

    Returns:
        Arrays by the names of the network's state dict, in its order.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = task.network()
    return {
        name: tensor.detach().cpu().numpy().copy() for name, tensor in network.state_dict().items()
    }


def write(folder: Path, server_round: int, arrays: NDArrays, memory: NDArrays) -> Commit:
    """Write a round's checkpoint; it counts only when the journal has committed the returned record.

    Args:
        folder: of the checkpoints; made where missing.
        server_round: number of the round, 0 for the initial model.
        arrays: the global model.
        memory: state of the strategy.
    """
    folder.mkdir(exist_ok=True)
    data = encode(
        {_ARRAYS + k: a for k, a in arrays.items()} | {_MEMORY + k: a for k, a in memory.items()}
    )
    name = f"round-{server_round:06d}.safetensors"
    write_atomically(folder / name, data, halfway=lambda: reach("mid-checkpoint", server_round))
    return Commit(server_round, name, hashlib.sha256(data).hexdigest())


def load(folder: Path, commit: Commit, order: list[str]) -> tuple[NDArrays, NDArrays]:
    """Load a checkpoint: the model's arrays, in the order of ``order``, and the strategy's state.

    Args:
        folder: of the checkpoints.
        commit: as the journal has it; names the file and its SHA-256.
        order: names of the model's arrays.

    Raises:
        RunError: 504, the file is missing or not the one that was committed, or is of another network.
    """
    stored = read(folder / commit.checkpoint, commit.checkpoint_sha256)
    if missing := [name for name in order if _ARRAYS + name not in stored]:
        raise RunError(504, f"{commit.checkpoint}: must hold the task's {missing[0]}, got none")
    memory = {k.removeprefix(_MEMORY): a for k, a in stored.items() if k.startswith(_MEMORY)}
    return {name: stored[_ARRAYS + name] for name in order}, memory


def prune(folder: Path, newest: int, keep: int = CHECKPOINTS_KEPT) -> None:
    """Remove all checkpoints but those of the last ``keep`` committed rounds.

    Args:
        folder: of the checkpoints.
        newest: number of the last committed round.
        keep: how many checkpoints to keep.
    """
    names = {f"round-{n:06d}.safetensors" for n in range(max(newest - keep + 1, 0), newest + 1)}
    for path in folder.iterdir():
        if path.name not in names:
            path.unlink()


def checkpoints_to_keep(section: PrivacySection, rounds: int, done: int) -> int:
    """How many checkpoints to keep after round ``done`` of ``rounds``.

    With noise of the server's only the last one is kept at the end of a run: an earlier one holds past noise, which
    could be subtracted from the model.
    """
    return 1 if section.mechanism in CENTRAL and done == rounds else CHECKPOINTS_KEPT
