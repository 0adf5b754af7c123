"""A trained network read from disk: that of a finished run, or of a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fedge.server.runs.directory import RunDirectory
from fedge.shared.bundle import generated_examples
from fedge.shared.bundle.manifest_checks import network_shape
from fedge.shared.errors import BundleError, ConfigError, RunError, UsageError
from fedge.shared.files import read_bounded, reason
from fedge.shared.preprocessing import steps as preprocessing
from fedge.shared.preprocessing.steps import Step
from fedge.shared.tasks.registry import get_task
from fedge.shared.wire import tensors
from fedge.shared.wire.tensors import NDArrays

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import nn

    from fedge.shared.tasks.task import Task

JSON_LIMIT: Final = 64 * 2**20
RUN: Final = "run.json"
#: In a checkpoint the weights stand beside the strategy's state.
_ARRAYS: Final = "arrays/"
#: What to do where it is not a run's file that is damaged.
_SOURCE: Final = "Give a finished run's directory, or a safetensors file in one."
_ALONE: Final = "Name with --task the task that these weights were trained for."
_IN_RUN: Final = (
    "Give a checkpoint of this run; move other weights elsewhere, and name their task with --task."
)


@dataclass(frozen=True)
class Trained:
    """A network with its weights and its preprocessing.

    Attributes:
        task: for which it was trained.
        network: in evaluation mode, on the CPU.
        steps: preprocessing, fitted.
        shape: of one example at the network's input, without the batch axis.
        sha256: of the weights as model.safetensors holds them, also where they were read from a checkpoint.
        run: run.json's values; empty for a checkpoint of no run.
        folder: the run's directory; None for a checkpoint of no run.
    """

    task: Task
    network: nn.Module
    steps: tuple[Step, ...]
    shape: tuple[int, ...]
    sha256: str
    run: dict[str, Any]
    folder: Path | None

    def examples(self, batch: int, seed: int) -> NDArray[Any]:
        """``(batch, *shape)`` float32 as the network takes them: drawn from the schema, and preprocessed.

        A network may have a domain, as an embedding or a logarithm: it is compared on inputs that can come.
        """
        steps = generated_examples.stand_in(self.task.input, self.steps)
        raw = generated_examples.example(self.task.input, batch, steps, seed=seed)
        return preprocessing.apply(steps, raw)


def from_run(run_dir: Path) -> Trained:
    """Load the model of a finished run.

    Raises:
        ConfigError: 209, not a run directory.
        RunError: 504, the run's files are damaged; 505, it is not finished.
    """
    directory = RunDirectory(run_dir)
    if not run_dir.is_dir() or not directory.run.is_file():
        raise ConfigError(209, f"{run_dir}: must be a run directory, got no {RUN} in it")
    run = read_json(directory.run)
    if run.get("state") != "finished":
        done, rounds = run.get("rounds_done"), run.get("rounds")
        raise RunError(505, f"{run_dir}: must be finished, got {done} of {rounds} rounds")
    weights = _weights(directory.model, str(run.get("model_sha256")))
    return _trained(str(run.get("task")), weights, run, run_dir)


def from_checkpoint(path: Path, task: str | None = None) -> Trained:
    """Load the network of a safetensors file: a run's model, one of its checkpoints, or bare weights.

    Args:
        path: the file; where it lies in a run's directory, that run names the task.
        task: name of the task, for a file that lies elsewhere.

    Raises:
        ConfigError: 209, no run is beside it and no task is named.
        UsageError: 102, the run beside it is of another task.
        DataError: 304, unknown task.
        RunError: 504, the file is damaged or not of the task's network, or the task standardises by statistics
            that the run alone knows.
    """
    path = path.absolute()
    if not path.is_file():
        raise RunError(504, f"{path.name}: cannot be read (no such file)", remedy=_SOURCE)
    for folder in (path.parent, path.parent.parent):
        if (folder / RUN).is_file():
            run = read_json(folder / RUN)
            name, weights = str(run.get("task")), _weights(path, None)
            if task not in (None, name):
                raise UsageError(
                    102,
                    f"--task: must be {name!r}, of which the run beside it is, or left out, got {task!r}",
                )
            return _trained(name, weights, run, folder, remedy=_IN_RUN)
    if task is None:
        raise ConfigError(
            209, f"{path}: must lie in a run directory, or come with --task, got neither"
        )
    return _trained(task, _weights(path, None), {}, None, remedy=_ALONE)


def _trained(
    name: str, weights: NDArrays, run: dict[str, Any], folder: Path | None, *, remedy: str = ""
) -> Trained:
    """Check the weights against the task; ``remedy`` is for weights of another network."""
    task = get_task(name)
    network = _network(task, weights, remedy=remedy)
    try:
        steps = preprocessing.from_json(run.get("preprocessing")) if run else task.preprocessing
        if not run and preprocessing.learns(steps):
            raise RunError(
                504,
                f"weights: must lie in their run's directory, as {name} standardises",
                remedy=_SOURCE,
            )
        shape = network_shape(task.input, steps)
    except BundleError as error:
        raise RunError(504, f"{RUN}: {error.message}") from None
    except (KeyError, TypeError) as error:
        raise RunError(504, f"{RUN}: does not parse ({error!r})") from error
    return Trained(task, network, steps, shape, tensors.digest(weights), run, folder)


def _weights(path: Path, sha256: str | None) -> NDArrays:
    """The weights of a safetensors file, without a checkpoint's other arrays."""
    loaded = tensors.read(path, sha256)
    checkpoint_arrays = {n: a for n, a in loaded.items() if n.startswith(_ARRAYS)}
    return {n.removeprefix(_ARRAYS): a for n, a in checkpoint_arrays.items()} or loaded


def load_network(path: Path, task: Task, sha256: str) -> nn.Module:
    """Load the weights of a safetensors file into the task's network.

    Args:
        path: the file.
        task: whose network is built.
        sha256: expected SHA-256 of the file, hexadecimal.

    Returns:
        The network in evaluation mode, on the CPU.

    Raises:
        RunError: 504, the file is damaged, or not that of the task's network.
    """
    return _network(task, _weights(path, sha256))


def _network(task: Task, weights: NDArrays, *, remedy: str = "") -> nn.Module:
    # Imported late: a directory that is no run is refused without torch.
    import torch

    with torch.random.fork_rng(devices=[]):
        network = task.network()
    expected = {name: (tuple(t.shape), t.numpy().dtype) for name, t in network.state_dict().items()}
    given = {name: (a.shape, a.dtype) for name, a in weights.items()}
    for name in sorted(expected.keys() | given.keys()):
        if expected.get(name) != given.get(name):
            raise RunError(
                504,
                f"weights: {name} must be {_tensor(expected.get(name))} for {task.name}, "
                f"got {_tensor(given.get(name))}",
                remedy=remedy,
            )
    network.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in weights.items()})
    return network.eval()


def read(path: Path) -> bytes:
    """Read a small file of a run.

    Raises:
        RunError: 504, it cannot be read.
    """
    try:
        return read_bounded(path, JSON_LIMIT)
    except OSError as error:
        raise RunError(504, f"{path.name}: cannot be read ({reason(error)})") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a run.

    Raises:
        RunError: 504, it cannot be read, or is no JSON object.
    """
    try:
        value = json.loads(read(path))
    except (ValueError, RecursionError):
        raise RunError(504, f"{path.name}: must be JSON") from None
    if not isinstance(value, dict):
        raise RunError(504, f"{path.name}: must be a JSON object")
    return value


def _tensor(described: tuple[tuple[int, ...], Any] | None) -> str:
    return "absent" if described is None else f"{described[1]} {list(described[0])}"
