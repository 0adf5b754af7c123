"""Checks a task's parts on two examples, before a run reads the data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedge.shared.errors import DataError, brief
from fedge.shared.preprocessing.steps import OneHot, Standardise
from fedge.shared.tasks.task import Task

#: Examples of the dry run; with one a missing batch axis would not be noticed.
BATCH: Final = 2

_T = TypeVar("_T")


def check(task: Task) -> None:
    """Check that a task's parts are compatible.

    Two zero examples (the first category, where a column has categories) go through preprocessing,
    network, loss and counters. Torch's global generator is left as it was.

    Raises:
        DataError: 305, a part fails or is incompatible with the next one.
    """
    x = preprocessed(task, np.zeros((BATCH, *task.input.shape), np.float32))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = _tried(task, "network failed", task.network)
        if not isinstance(network, nn.Module):
            raise _misfit(task, f"network must build a Module, got {type(network).__name__}")
        _check_state(task, network)
        failed = f"network failed on shape {tuple(x.shape)}"
        logits = _tried(task, failed, lambda: network(torch.from_numpy(x)))
        _check_logits(task, logits)
        labels = torch.tensor([0, len(task.output.labels) - 1])
        loss = _tried(task, "loss failed", lambda: task.loss(logits, labels))
        _check_loss(task, loss)
        counters = _tried(task, "counters failed", lambda: task.counters(logits, labels))
    _check_counters(task, counters)


def preprocessed(task: Task, x: NDArray[Any]) -> NDArray[Any]:
    """Preprocess examples for the network, with mean 0 and standard deviation 1 where nothing is fitted yet.

    Args:
        task: whose steps are applied.
        x: ``(b, *input.shape)``, float32; columns with categories get the first one.

    Raises:
        DataError: 305, a step fails.
    """
    for step in task.preprocessing:
        name, shape = type(step).__name__, x.shape

        def applied(step: Any = step, x: NDArray[Any] = x) -> NDArray[Any]:
            match step:
                case OneHot(columns):
                    x = x.copy()
                    for index, categories in columns:
                        x[:, index] = categories[0]
                case Standardise(mean=()):
                    step = Standardise((0.0,) * x.shape[1], (1.0,) * x.shape[1])
            return np.asarray(step.apply(x))

        x = _tried(task, f"preprocessing step {name} failed on shape {shape}", applied)
    return x


def _check_state(task: Task, network: nn.Module) -> None:
    """Everything in the network can be sent as an array, and the network be copied."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise _misfit(
                task,
                f"{name} must have its shape when the network is built, as it is sent before any example is seen,"
                " got a lazy one",
            )
        try:
            tensor.detach().numpy()
        except TypeError:
            raise _misfit(
                task, f"{name} must be of a type that arrays have, as float32, got {_kind(tensor)}"
            ) from None
    for path, module in network.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                name = f"{path}.{key}".lstrip(".")
                raise _misfit(
                    task,
                    f"{name} must be a parameter or a buffer, got a tensor that is computed from others and cannot be"
                    " copied; torch.nn.utils.parametrizations has weight_norm without one",
                )


def _check_logits(task: Task, logits: Any) -> None:
    output = task.output
    expected = (BATCH, len(output.labels) if output.activation == "softmax" else 1)
    labels = ", ".join(output.labels[:10]) + (", …" if len(output.labels) > 10 else "")
    requirement = f"network must give {expected} logits for labels {labels}"
    if not isinstance(logits, Tensor):
        raise _misfit(task, f"{requirement}, got {type(logits).__name__}")
    if tuple(logits.shape) != expected:
        raise _misfit(task, f"{requirement}, got {tuple(logits.shape)}")
    if logits.dtype != torch.float32:
        raise _misfit(task, f"network must give float32 logits, got {_kind(logits)}")
    if not torch.isfinite(logits).all():
        raise _misfit(task, "network must give finite logits, got NaN or infinity")


def _check_loss(task: Task, loss: Any) -> None:
    if not isinstance(loss, Tensor) or loss.shape != ():
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise _misfit(task, f"loss must give one number as a Tensor, got {got}")
    if not loss.is_floating_point() or not torch.isfinite(loss):
        raise _misfit(task, f"loss must be finite, got {loss.item()}")
    if not loss.requires_grad:
        raise _misfit(task, "loss must follow from the network's weights, got no gradient")


def _check_counters(task: Task, counters: Any) -> None:
    if not isinstance(counters, Mapping):
        raise _misfit(task, f"counters must give a dict, got {type(counters).__name__}")
    for name in sorted({"examples", "loss-sum", *task.counter_names}):
        if name not in counters:
            raise _misfit(task, f"counters must hold {name}, got none")
    for name, value in counters.items():
        if not isinstance(value, int | float) or not math.isfinite(value):
            got = value if isinstance(value, float) else type(value).__name__
            raise _misfit(task, f"counter {name}: must be a finite number, got {got}")
        if name == "examples" and value != BATCH:
            raise _misfit(task, f"counter examples: must be {BATCH} of {BATCH}, got {value}")
        if name != "loss-sum" and not 0 <= value <= BATCH:
            raise _misfit(task, f"counter {name}: must be 0 to {BATCH} of {BATCH}, got {value}")


def _tried(task: Task, failed: str, part: Callable[[], _T]) -> _T:
    try:
        return part()
    except Exception as error:
        raise _misfit(task, f"{failed}: {brief(error)}") from error


def _misfit(task: Task, text: str) -> DataError:
    return DataError(305, f"task {task.name}: {text}")


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
