"""A trained network as ONNX: one file, the same bytes for the same weights."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedge.shared.bundle import generated_examples
from fedge.shared.bundle.manifest import GRAPH_BATCH, GRAPH_INPUT
from fedge.shared.bundle.onnx_session import load_onnxruntime
from fedge.shared.compile.graph_input import GraphInput
from fedge.shared.compile.parity import TOLERANCE, first_line, outputs_of, parity
from fedge.shared.compile.strip_metadata import strip
from fedge.shared.errors import DataError, ReleaseError
from fedge.shared.tasks.dry_run import preprocessed
from fedge.shared.tasks.registry import is_shipped

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

    from fedge.shared.tasks.task import Task

#: Protocol Buffers end at 2 GiB; devices read no larger artefact either.
MAX_BYTES: Final = 1536 * 2**20
#: A batch of one would be taken for a constant.
_EXAMPLE_BATCH: Final = 2
#: Colour codes in the exporter's messages.
_ESCAPES: Final = re.compile(r"\x1b\[[0-9;]*m")


def builder_versions() -> dict[str, str]:
    """Versions of the packages that make and run the graphs, by package."""
    import onnx

    return {
        "torch": str(torch.__version__),
        "onnx": str(onnx.__version__),
        "onnxscript": version("onnxscript"),
        # Not by its package, of which there are several.
        "onnxruntime": str(load_onnxruntime().__version__),
    }


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
    try:
        network = copy.deepcopy(network).cpu().eval()
    except RuntimeError as error:
        # As of a tensor that is computed from others, which the old weight_norm keeps.
        raise ReleaseError(607, f"network: cannot be copied ({first_line(error)})") from None
    dtype = torch.int64 if graph_input.tokens else torch.float32
    model = _model(
        network, torch.zeros(_EXAMPLE_BATCH, *graph_input.shape, dtype=dtype), graph_input
    )
    strip(model)
    data: bytes = model.SerializeToString(deterministic=True)
    if len(data) > MAX_BYTES:
        raise ReleaseError(607, f"model.onnx: must be at most {MAX_BYTES} bytes, got {len(data)}")
    return data


def require_exportable(task: Task) -> None:
    """Export a task's network untrained, and compare it: what a release would refuse is said before training.

    Nothing is done for the tasks of fedge itself, which its tests export, and where the converters are not installed.

    Raises:
        DataError: 305, it cannot be exported, with the line of its code where there is one, or the graph is not the
            network.
    """
    if is_shipped(task.name) or find_spec("onnx") is None or find_spec("onnxscript") is None:
        return

    def examples(batch: int, seed: int) -> NDArray[Any]:
        return preprocessed(
            task, generated_examples.example(task.input, batch, task.preprocessing, seed=seed)
        )

    shape = examples(1, 0).shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = task.network()
    try:
        parity(network, export_onnx(network, shape), shape, batch_sizes=(1, 3), examples=examples)
    except ReleaseError as error:
        raise DataError(305, f"task {task.name}: {error.message}") from None


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
    where = _line_of(network, failure)
    cause: BaseException | None = failure
    while cause is not None and (cause.__cause__ or cause.__context__):
        # The exporter's own words are about its steps.
        cause = cause.__cause__ or cause.__context__
    words = _ESCAPES.sub("", first_line(cause))
    message = f"network: cannot be exported{where} ({type(cause).__name__}: {words})"
    raise ReleaseError(607, message) from failure


def _line_of(network: nn.Module, failure: BaseException | None) -> str:
    """The line of the network's own code in which it failed; empty where no traceback has one."""
    own = {
        inspect.getfile(type(module))
        for module in network.modules()
        if type(module).__module__.partition(".")[0] not in ("torch", "builtins")
    }
    found = ""
    while failure is not None:
        for frame in traceback.extract_tb(failure.__traceback__):
            if frame.filename in own:
                found = f" at {Path(frame.filename).name}:{frame.lineno}, `{frame.line}`"
        failure = failure.__cause__ or failure.__context__
    return found


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
    """Keep the exporter's progress, its dumps of a graph and its advice to its own developers off the terminal."""
    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.")]
    # Children of this one that have no level of their own, and those that will be made.
    loggers = [logging.getLogger(name) for name in ("torch", *names)]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            for category in (FutureWarning, DeprecationWarning, UserWarning):
                warnings.filterwarnings("ignore", category=category)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


__all__ = ["MAX_BYTES", "TOLERANCE", "GraphInput", "export_onnx", "opset_of", "parity"]
