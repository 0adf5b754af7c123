"""A trained network as ONNX: one file, the same bytes for the same weights."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor, nn

from fedge.shared.bundle.manifest import GRAPH_BATCH, GRAPH_INPUT
from fedge.shared.compile.graph_input import GraphInput
from fedge.shared.compile.parity import TOLERANCE, first_line, outputs_of, parity
from fedge.shared.compile.strip_metadata import strip
from fedge.shared.errors import ReleaseError

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

#: Protocol Buffers end at 2 GiB; devices read no larger artefact either.
MAX_BYTES: Final = 1536 * 2**20
#: A batch of one would be taken for a constant.
_EXAMPLE_BATCH: Final = 2
#: Colour codes in the exporter's messages.
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;]*m")


def export_onnx(network: nn.Module, shape: Sequence[int] | GraphInput) -> bytes:
    """Export a network; the graph's batch axis stays open, and those that the input names.

    Args:
        network: from ``(b, *shape)`` to logits ``(b, ...)``, or to a named tuple of tensors whose first
            axis is the batch; left as it is.
        shape: of one float32 example as the network takes it, or another input.

    Returns:
        The ONNX file, with its weights, without names of files or lines of code of this machine. Its
        outputs are named ``"logits"``, or as the tuple's fields. An open axis of an output has the name
        of the input's axis where it is that axis, and its own where its size is computed.

    Raises:
        ReleaseError: 607, the network cannot be exported, or is too large.
    """
    graph_input = GraphInput.from_shape(shape)
    weights = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    if weights > MAX_BYTES:
        raise ReleaseError(607, f"network: must be at most {MAX_BYTES} bytes, got {weights}")
    network = copy.deepcopy(network).cpu().eval()
    dtype = torch.int64 if graph_input.tokens else torch.float32
    model = _model(
        network, torch.zeros(_EXAMPLE_BATCH, *graph_input.shape, dtype=dtype), graph_input
    )
    strip(model)
    data: bytes = model.SerializeToString(deterministic=True)
    if len(data) > MAX_BYTES:
        raise ReleaseError(607, f"model.onnx: must be at most {MAX_BYTES} bytes, got {len(data)}")
    return data


def opset_of(onnx: bytes) -> int:
    """Version of ONNX's default operator set that a model uses.

    Raises:
        ReleaseError: 607, it names none or several.
    """
    import onnx as onnx_package

    model = onnx_package.load_model_from_string(onnx)
    versions = [
        int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")
    ]
    if len(versions) != 1:
        raise ReleaseError(
            607, f"model.onnx: must name one default operator set, got {len(versions)}"
        )
    return versions[0]


def _model(network: nn.Module, example: Tensor, graph_input: GraphInput) -> ModelProto:
    # Named axes work where open ones fail, as for a bidirectional LSTM; otherwise the other way is tried.
    failure: Exception | None = None
    for axes in (graph_input.names, dict.fromkeys(graph_input.names, torch.export.Dim.DYNAMIC)):
        try:
            with torch.no_grad():
                outputs = list(outputs_of(network(example)))
            with _quiet():
                program = torch.onnx.export(
                    network,
                    (example,),
                    dynamo=True,
                    input_names=[GRAPH_INPUT],
                    output_names=outputs,
                    dynamic_shapes=(axes,),
                    external_data=False,
                    verbose=False,
                )
            if program is None:
                raise ReleaseError(607, "network: must give a graph, got none")
            model: ModelProto = program.model_proto
            _check(model, graph_input, outputs)
            return model
        except Exception as error:  # the exporter lets exceptions of every kind through
            _pass_interrupt(error)
            failure = error
    if isinstance(failure, ReleaseError):
        raise failure
    words = _ESCAPES.sub("", first_line(failure))
    message = f"network: cannot be exported ({type(failure).__name__}: {words})"
    raise ReleaseError(607, message) from failure


def _pass_interrupt(error: BaseException) -> None:
    """Let Ctrl-C through, which the exporter wraps as if the network were at fault.

    Raises:
        KeyboardInterrupt: it is among the causes.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, KeyboardInterrupt):
            raise cause
        cause = cause.__cause__ or cause.__context__


def _check(model: ModelProto, graph_input: GraphInput, outputs: Sequence[str]) -> None:
    """Check the graph's inputs, outputs and open axes, and name the axes."""
    for kind, values, names in (
        ("inputs", model.graph.input, [GRAPH_INPUT]),
        ("outputs", model.graph.output, outputs),
    ):
        actual = [value.name for value in values]
        if actual != names:
            raise ReleaseError(607, f"network: must have the {kind} {names}, got {actual}")
    symbols: dict[str, str] = {}
    for axis, name in graph_input.names.items():
        symbol = _open(model.graph.input[0], axis, name)
        if symbols.setdefault(symbol, name) != name:
            raise ReleaseError(607, f"network: {name} must be of any size, got {symbols[symbol]}'s")
    for value in [*model.graph.input, *model.graph.output]:
        _open(value, 0, GRAPH_BATCH)
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param:
                # A size that is computed has an expression for its name, which runtimes only print.
                name = symbols.get(dim.dim_param, f"{value.name}_{axis}")
                dim.dim_param = name if axis else GRAPH_BATCH


def _open(value: ValueInfoProto, axis: int, name: str) -> str:
    dims = value.type.tensor_type.shape.dim
    symbol: str = dims[axis].dim_param if axis < len(dims) else ""
    if not symbol:
        raise ReleaseError(607, f"network: {value.name} must keep its {name} axis open")
    return symbol


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress and its advice to its own developers off the terminal."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.filterwarnings("ignore", category=category)
            yield
    finally:
        logger.setLevel(level)


__all__ = ["MAX_BYTES", "TOLERANCE", "GraphInput", "export_onnx", "opset_of", "parity"]
