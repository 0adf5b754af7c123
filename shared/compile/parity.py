"""Compares an exported graph with its network: ONNX Runtime against torch on generated inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedge.shared.bundle.manifest import GRAPH_INPUT, GRAPH_OUTPUT, Parity
from fedge.shared.bundle.onnx_session import load_onnxruntime
from fedge.shared.compile.graph_input import GraphInput
from fedge.shared.errors import ReleaseError

TOLERANCE: Final = 1e-4
#: Relative to the largest logit, where that is more: as with noise in the weights, of which float32 has no more digits.
RELATIVE: Final = 1e-5
BATCH_SIZES: Final = (1, 2, 7, 32)


def outputs_of(output: Any) -> dict[str, Tensor]:
    """A network's outputs by the names of the graph's outputs: fields of a named tuple, or ``"logits"``.

    Raises:
        TypeError: it is neither a tensor nor a named tuple of tensors.
    """
    if isinstance(output, Tensor):
        return {GRAPH_OUTPUT: output}
    names = getattr(output, "_fields", ())
    if names and all(isinstance(part, Tensor) for part in output):
        return dict(zip(names, output, strict=True))
    raise TypeError(f"output: must be a tensor or a named tuple of tensors, got {type(output)!r}")


def parity(
    network: nn.Module,
    onnx: bytes,
    shape: Sequence[int] | GraphInput,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    sizes: Sequence[Mapping[str, int]] = (),
    tolerance: float = TOLERANCE,
    seed: int = 0,
    examples: Callable[[int, int], NDArray[Any]] | None = None,
) -> Parity:
    """Compare ONNX Runtime with the eager network on generated inputs of several sizes.

    Args:
        network: the trained network.
        onnx: the exported graph.
        shape: of one float32 example as the network takes it, or another input.
        batch_sizes: to try.
        sizes: of the other open axes, by name, to try at each batch size besides the example's.
        tolerance: largest difference allowed, or ``RELATIVE`` of the output's largest number over all inputs
            where that is more; whole numbers, as of labels, must be equal.
        seed: of the generated inputs.
        examples: draws a batch of so many from a seed, for a network that takes not every number; standard normal
            numbers, or tokens, unless given.

    Returns:
        The largest difference, and the allowed one in the same unit.

    Raises:
        ReleaseError: 603, they differ by more than is allowed, in shape, or one is not finite.
    """
    graph_input = GraphInput.from_shape(shape)
    session = _session(onnx)
    network = copy.deepcopy(network).cpu().eval()
    generator = np.random.default_rng(seed)
    largest: dict[str, float] = {}
    worst: dict[str, tuple[float, str]] = {}
    for other in ({}, *sizes):
        for batch in batch_sizes:
            where = f"batch size {batch}" + "".join(f", {k} {v}" for k, v in other.items())
            if examples is not None and not other:
                x = examples(batch, int(generator.integers(2**31)))
            else:
                x = graph_input.sample(generator, batch, other)
            eager = _eager(network, x, where)
            exported = _run(session, x, list(eager), where)
            for name, expected in eager.items():
                difference = _difference(exported[name], expected, name, where)
                worst[name] = max(worst.get(name, (0.0, where)), (difference, where))
                largest[name] = max(largest.get(name, 0.0), float(np.max(np.abs(expected))))
    allowed = {name: max(tolerance, RELATIVE * value) for name, value in largest.items()}
    # Of several outputs, the one nearest to its limit is reported.
    name = max(worst, key=lambda name: worst[name][0] / allowed[name])
    difference, where = worst[name]
    if difference > allowed[name]:
        raise ReleaseError(
            603,
            f"model.onnx: must be within {allowed[name]:g} of the trained model, "
            f"got {difference:g} in {name} at {where}",
        )
    return Parity(difference, allowed[name], tuple(batch_sizes))


def _session(onnx: bytes) -> Any:
    onnxruntime = load_onnxruntime()
    onnxruntime.set_default_logger_severity(4)
    try:
        return onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ReleaseError(603, f"model.onnx: does not load ({first_line(error)})") from None


def _eager(network: nn.Module, x: NDArray[Any], where: str) -> dict[str, NDArray[Any]]:
    try:
        with torch.no_grad():
            return {k: v.numpy() for k, v in outputs_of(network(torch.from_numpy(x))).items()}
    except Exception as error:  # the user's code, which raises whatever it does
        words = f"{type(error).__name__}: {first_line(error)}"
        raise ReleaseError(603, f"the trained network: fails at {where} ({words})") from None


def _run(session: Any, x: NDArray[Any], names: list[str], where: str) -> dict[str, NDArray[Any]]:
    try:
        return dict(zip(names, session.run(names, {GRAPH_INPUT: x}), strict=True))
    except Exception as error:  # onnxruntime's exceptions share no base class
        message = f"model.onnx: fails at {where} ({first_line(error)})"
        raise ReleaseError(603, message) from None


def _difference(exported: NDArray[Any], eager: NDArray[Any], name: str, where: str) -> float:
    """The largest difference between two outputs.

    Raises:
        ReleaseError: 603, they cannot be compared, or are whole numbers and differ.
    """
    if exported.shape != eager.shape or exported.dtype != eager.dtype:
        raise ReleaseError(
            603,
            f"model.onnx: must give {name} of {eager.dtype} {list(eager.shape)}, "
            f"got {exported.dtype} {list(exported.shape)} at {where}",
        )
    if not (np.isfinite(eager).all() and np.isfinite(exported).all()):
        raise ReleaseError(603, f"model.onnx: must give finite {name}, got others at {where}")
    if not np.issubdtype(eager.dtype, np.floating):
        if not np.array_equal(exported, eager):
            raise ReleaseError(
                603, f"model.onnx: must give the trained model's {name}, got others at {where}"
            )
        return 0.0
    return float(np.max(np.abs(exported.astype(np.float64) - eager), initial=0.0))


def first_line(error: Any) -> str:
    """The message of an error of foreign code, in one line of at most 200 characters."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return str(lines[0])[:200]
