"""A round's checkpoint: the global model and the strategy's memory, in one safetensors file."""

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
#: The newest is what counts; the one before it is kept against a disk that lies about a flush.
KEPT = 2


def initial_arrays(task: Task, seed: int) -> NDArrays:
    """The task's network as drawn from ``seed``, whatever was drawn before."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = task.network()
    return {
        name: tensor.detach().cpu().numpy().copy() for name, tensor in network.state_dict().items()
    }


def write(folder: Path, server_round: int, arrays: NDArrays, memory: NDArrays) -> Commit:
    """Write the round's file; it counts only when the journal has committed what this returns."""
    folder.mkdir(exist_ok=True)
    data = encode(
        {_ARRAYS + k: a for k, a in arrays.items()} | {_MEMORY + k: a for k, a in memory.items()}
    )
    name = f"round-{server_round:06d}.safetensors"
    write_atomically(folder / name, data, halfway=lambda: reach("mid-checkpoint", server_round))
    return Commit(server_round, name, hashlib.sha256(data).hexdigest())


def load(folder: Path, commit: Commit, order: list[str]) -> tuple[NDArrays, NDArrays]:
    """The arrays, in the model's order, and the strategy's memory.

    Raises:
        RunError: 504, the file is missing or not the one that was committed, or is of another network.
    """
    stored = read(folder / commit.checkpoint, commit.checkpoint_sha256)
    if missing := [name for name in order if _ARRAYS + name not in stored]:
        raise RunError(504, f"{commit.checkpoint}: must hold the task's {missing[0]}, got none")
    memory = {k.removeprefix(_MEMORY): a for k, a in stored.items() if k.startswith(_MEMORY)}
    return {name: stored[_ARRAYS + name] for name in order}, memory


def prune(folder: Path, newest: int, kept: int = KEPT) -> None:
    """Remove what is older than the last commits, two unless ``kept`` says otherwise, and what was never committed."""
    keep = {f"round-{n:06d}.safetensors" for n in range(max(newest - kept + 1, 0), newest + 1)}
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()


def checkpoints_kept(section: PrivacySection, rounds: int, done: int) -> int:
    """How many checkpoints to keep after a round.

    After the last one only its own, which holds no past noise: with that, the model's could be taken off.
    """
    return 1 if section.mechanism in CENTRAL and done == rounds else KEPT
