"""A trained network as ONNX: one file, the same bytes for the same weights, checked against the network."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from fedge.shared.errors import ReleaseError
from fedge.shared.manifest import GRAPH_BATCH, GRAPH_INPUT, GRAPH_OUTPUT, Parity
from fedge.shared.onnx_session import load_onnxruntime

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

TOLERANCE: Final = 1e-4
#: Of the largest logit, where that is more: as with noise in the weights, of which float32 has no more digits.
RELATIVE: Final = 1e-5
BATCH_SIZES: Final = (1, 2, 7, 32)
#: Protocol Buffers end at 2 GiB; a bundle's reader takes no more than this either.
MAX_BYTES: Final = 1536 * 2**20
#: A batch of one would be taken for a constant.
_EXAMPLE_BATCH: Final = 2


def export_onnx(network: nn.Module, shape: Sequence[int]) -> bytes:
    """Export a network; the graph's batch axis stays open.

    Args:
        network: from ``(b, *shape)`` of float32 to logits ``(b, k)``; left as it is.
        shape: of one example as the network takes it.

    Returns:
        The ONNX file, with its weights, without names of files or lines of code of this machine.

    Raises:
        ReleaseError: 607, the network cannot be exported, or is too large.
    """
    weights = sum(t.numel() * t.element_size() for t in network.state_dict().values())
    if weights > MAX_BYTES:
        raise ReleaseError(607, f"network: must be at most {MAX_BYTES} bytes, got {weights}")
    network = copy.deepcopy(network).cpu().eval()
    example = torch.zeros(_EXAMPLE_BATCH, *shape, dtype=torch.float32)
    model = _model(network, example)
    _strip(model)
    data: bytes = model.SerializeToString(deterministic=True)
    if len(data) > MAX_BYTES:
        raise ReleaseError(607, f"model.onnx: must be at most {MAX_BYTES} bytes, got {len(data)}")
    return data


def opset_of(onnx: bytes) -> int:
    """Version of ONNX's default operator set that a model asks for.

    Raises:
        ReleaseError: 607, it asks for none.
    """
    import onnx as onnx_package

    model = onnx_package.load_model_from_string(onnx)
    found = [int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if len(found) != 1:
        raise ReleaseError(607, f"model.onnx: must name one default operator set, got {len(found)}")
    return found[0]


def parity(
    network: nn.Module,
    onnx: bytes,
    shape: Sequence[int],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Parity:
    """Compare ONNX Runtime with the eager network on standard normal inputs of several batch sizes.

    Args:
        network: as it was trained.
        onnx: what was exported of it.
        shape: of one example as the network takes it.
        batch_sizes: to try.
        tolerance: largest difference allowed, or ``RELATIVE`` of the largest logit over all inputs where that is more.
        seed: of the inputs.

    Returns:
        The largest difference, and what was allowed in the same unit.

    Raises:
        ReleaseError: 603, they differ by more than is allowed, in shape, or one is not finite.
    """
    onnxruntime = load_onnxruntime()
    onnxruntime.set_default_logger_severity(4)
    network = copy.deepcopy(network).cpu().eval()
    try:
        session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions share no base class
        raise ReleaseError(603, f"model.onnx: does not load ({_first_line(error)})") from None
    generator = np.random.default_rng(seed)
    largest, differences = 0.0, []
    for size in batch_sizes:
        x = generator.standard_normal((size, *shape)).astype(np.float32)
        with torch.no_grad():
            eager = network(torch.from_numpy(x)).numpy()
        try:
            (found,) = session.run([GRAPH_OUTPUT], {GRAPH_INPUT: x})
        except Exception as error:  # onnxruntime's exceptions share no base class
            message = f"model.onnx: fails at batch size {size} ({_first_line(error)})"
            raise ReleaseError(603, message) from None
        if found.shape != eager.shape:
            raise ReleaseError(
                603, f"model.onnx: must give {list(eager.shape)}, got {list(found.shape)}"
            )
        if not (np.isfinite(eager).all() and np.isfinite(found).all()):
            raise ReleaseError(
                603, f"model.onnx: must give finite logits, got others at batch size {size}"
            )
        largest = max(largest, float(np.max(np.abs(eager))))
        differences.append(float(np.max(np.abs(found.astype(np.float64) - eager))))
    allowed = max(tolerance, RELATIVE * largest)
    worst, size = max(zip(differences, batch_sizes, strict=True))
    if worst > allowed:
        raise ReleaseError(
            603,
            f"model.onnx: must be within {allowed:g} of the trained model, "
            f"got {worst:g} at batch size {size}",
        )
    return Parity(worst, allowed, tuple(batch_sizes))


def _model(network: nn.Module, example: Tensor) -> ModelProto:
    # Named axes work where open ones fail, as for a bidirectional LSTM; otherwise the other way is tried.
    failure: Exception | None = None
    for axis in (GRAPH_BATCH, torch.export.Dim.DYNAMIC):
        try:
            with _quiet():
                program = torch.onnx.export(
                    network,
                    (example,),
                    dynamo=True,
                    input_names=[GRAPH_INPUT],
                    output_names=[GRAPH_OUTPUT],
                    dynamic_shapes=({0: axis},),
                    external_data=False,
                    verbose=False,
                )
            if program is None:
                raise ReleaseError(607, "network: must give a graph, got none")
            model: ModelProto = program.model_proto
            _check(model)
            return model
        except Exception as error:  # the exporter lets exceptions of every kind through
            failure = error
    if isinstance(failure, ReleaseError):
        raise failure
    message = f"network: cannot be exported ({type(failure).__name__}: {_first_line(failure)})"
    raise ReleaseError(607, message) from failure


def _check(model: ModelProto) -> None:
    """Hold the graph to one input and one output, each with an open batch axis."""
    for kind, values, name in (
        ("input", model.graph.input, GRAPH_INPUT),
        ("output", model.graph.output, GRAPH_OUTPUT),
    ):
        if [value.name for value in values] != [name]:
            raise ReleaseError(607, f"network: must have one {kind}, got {len(values)}")
        batch = values[0].type.tensor_type.shape.dim[0]
        if not batch.dim_param:
            raise ReleaseError(607, f"network: {kind} must keep its batch axis open")
        batch.dim_param = GRAPH_BATCH


def _strip(model: ModelProto) -> None:
    """Remove comments and metadata, which hold paths and source lines, and sort what has no order."""
    model.doc_string = ""
    del model.metadata_props[:]
    for function in model.functions:
        function.doc_string = ""
        del function.metadata_props[:]
        for node in function.node:
            _strip_node(node)
    _strip_graph(model.graph)


def _strip_graph(graph: GraphProto) -> None:
    graph.doc_string = ""
    del graph.metadata_props[:]
    # Shapes of intermediate results: the runtime infers them again.
    del graph.value_info[:]
    for value in [*graph.input, *graph.output]:
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    for node in graph.node:
        _strip_node(node)


def _strip_node(node: NodeProto) -> None:
    node.doc_string = ""
    del node.metadata_props[:]
    for attribute in node.attribute:
        attribute.doc_string = ""
        if attribute.HasField("g"):
            _strip_graph(attribute.g)
        if attribute.HasField("t"):
            attribute.t.doc_string = ""
            del attribute.t.metadata_props[:]
        for graph in attribute.graphs:
            _strip_graph(graph)


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


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return str(lines[0])[:200]
