"""Converts the fp32 graph to lower precision: fp16, and two forms of INT8.

INT8 is written as pairs of QuantizeLinear and DequantizeLinear (QDQ), which every runtime fuses as it can.
Weights are quantised by channel (Jacob et al., CVPR 2018, https://arxiv.org/abs/1712.05877; Krishnamoorthi,
https://arxiv.org/abs/1806.08342), activations by ranges that were observed beforehand. Both forms quantise the
operators that hold nearly all multiplications, where their weights are constants, and leave the rest as it is:
normalisation and attention's own products lose more digits than time.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedge.shared.bundle.onnx_session import load_onnxruntime
from fedge.shared.compile.strip_metadata import sort_nodes, strip
from fedge.shared.errors import ReleaseError

if TYPE_CHECKING:
    from onnx import ModelProto

Ranges = Mapping[str, tuple[float, float]]

#: Sums of many terms, exponentials and what divides by them stay in float32, as torch.autocast has it: a variance
#: in half precision loses its digits, a sum its range.
_FLOAT32: Final = (
    "Exp", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax", "Pow",
    "RMSNormalization", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Softmax",
)  # fmt: skip
#: What CPUs multiply in eight bits. A Relu is taken into the operator before it.
_CPU: Final = ("Conv", "Gemm", "MatMul", "Relu")
#: What TensorRT multiplies in eight bits.
_TENSORRT: Final = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_WEIGHED: Final = frozenset((*_CPU, *_TENSORRT)) - {"Relu"}


def to_fp16(onnx: bytes) -> bytes:
    """Convert a graph to half precision.

    Args:
        onnx: float32 graph.

    Returns:
        A graph whose inputs and outputs keep their types, and whose sums, norms and exponentials stay in float32.
        The same bytes for the same graph.

    Raises:
        ReleaseError: 611, the graph cannot be converted.
    """
    import onnx as package

    load_onnxruntime()  # before its tools, as it says why
    from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16

    with _converting("fp16"):
        model = package.load_model_from_string(onnx)
        blocked = [*DEFAULT_OP_BLOCK_LIST, *_FLOAT32]
        model = convert_float_to_float16(model, keep_io_types=True, op_block_list=blocked)
        return _finished(model)


def activations(onnx: bytes) -> tuple[str, ...]:
    """Names of the tensors whose ranges ``quantise`` needs, for both of its forms, in the graph's order.

    They are the inputs of the operators that are quantised, and on the CPU the outputs of its convolutions.

    Raises:
        ReleaseError: 611, the graph cannot be converted, or holds nothing to quantise.
    """
    with _converting("int8"):
        model = _inferred(onnx)
        order = [
            *(v.name for v in model.graph.input),
            *(o for n in model.graph.node for o in n.output),
        ]
        anything = dict.fromkeys(order, (-1.0, 1.0))
        needed = {
            node.input[1].removesuffix("_scale")
            for symmetric in (False, True)
            for node in _quantised(_inferred(onnx), anything, symmetric).graph.node
            if node.op_type == "QuantizeLinear"
        }
    if not needed:
        listed = ", ".join(_TENSORRT)
        raise ReleaseError(611, f"int8: must hold {listed} with constant weights, got none")
    return tuple(name for name in order if name in needed)


def quantise(onnx: bytes, ranges: Ranges, *, symmetric: bool) -> bytes:
    """Quantise a graph to eight bits.

    Args:
        onnx: float32 graph whose ranges were observed.
        ranges: smallest and largest value of each tensor of ``activations``; others are ignored.
        symmetric: False for CPUs: unsigned activations, signed weights, quantised biases. True for TensorRT:
            all signed and around zero, biases as they are, no output quantised for its own sake.

    Returns:
        A graph whose inputs and outputs keep their types. The same bytes for the same graph and ranges.

    Raises:
        ReleaseError: 609, a tensor has no range; 611, the graph cannot be converted.
        ValueError: a range is not finite in float32, or ends before it begins.
    """
    names = activations(onnx)
    if missing := [name for name in names if name not in ranges]:
        raise ReleaseError(
            609, f"ranges: must hold {len(names)} tensors, got none of {missing[0]!r:.80} and "
            f"{len(missing) - 1} others"
        )  # fmt: skip
    used = {name: _checked(name, *ranges[name]) for name in names}
    with _converting("int8"):
        model = _quantised(_inferred(onnx), used, symmetric)
        if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
            listed = ", ".join(_TENSORRT if symmetric else _CPU[:-1])
            raise ReleaseError(611, f"int8: must hold {listed} with constant weights, got none")
        return _finished(model)


def _checked(name: str, low: float, high: float) -> tuple[float, float]:
    largest = float(np.finfo(np.float32).max)
    if not all(math.isfinite(v) and abs(v) <= largest for v in (low, high)) or low > high:
        raise ValueError(f"{name}: must have a finite range, got {low:g} to {high:g}")
    return low, high


def _quantised(model: ModelProto, ranges: Ranges, symmetric: bool) -> ModelProto:
    # As quantize_static does it, but in memory, and without its advice on the root logger.
    load_onnxruntime()
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    tensor_ranges = {
        name: TensorData(lowest=np.array(low, np.float32), highest=np.array(high, np.float32))
        for name, (low, high) in ranges.items()
    }
    for node in model.graph.node:
        # A Relu that is taken into the operator before it leaves one range for both.
        if node.op_type == "Relu" and node.output[0] in tensor_ranges:
            tensor_ranges.setdefault(node.input[0], tensor_ranges[node.output[0]])
    producer = model.producer_name, model.producer_version
    constants = {tensor.name for tensor in model.graph.initializer}
    variable = [
        node.name
        for node in model.graph.node
        if node.op_type in _WEIGHED and node.input[1] not in constants
    ]
    options: dict[str, Any] = {"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]}
    if symmetric:
        # TensorRT parses no biases of 32 bits, and no QDQ pair with two users.
        options = {
            "ActivationSymmetric": True,
            "DedicatedQDQPair": True,
            "OpTypesToExcludeOutputQuantization": list(_TENSORRT),
            "QuantizeBias": False,
        }
    # Eight bits of weights, not seven: only processors without VNNI saturate, and a device compares
    # with the fp32 graph before use.
    quantizer = QDQQuantizer(
        model,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8 if symmetric else QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, tensor_ranges),
        nodes_to_quantize=[],
        nodes_to_exclude=variable,
        op_types_to_quantize=list(_TENSORRT if symmetric else _CPU),
        extra_options=options,
    )
    quantizer.quantize_model()
    result: ModelProto = quantizer.model.model
    result.producer_name, result.producer_version = producer
    return result


def _inferred(onnx: bytes) -> ModelProto:
    """The model with the types of its intermediate results, and a name for each node."""
    import onnx as package

    model = package.shape_inference.infer_shapes(package.load_model_from_string(onnx))
    taken = {node.name for node in model.graph.node}
    for index, node in enumerate(model.graph.node):
        if not node.name:
            node.name = next(n for n in _names(f"node_{index}") if n not in taken)
            taken.add(node.name)
    return model


def _names(start: str) -> Iterator[str]:
    while True:
        yield start
        start += "_"


def _finished(model: ModelProto) -> bytes:
    import onnx as package

    strip(model)
    # Converters put what they add at the end.
    sort_nodes(model.graph)
    package.checker.check_model(model, full_check=True)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


@contextlib.contextmanager
def _converting(name: str) -> Iterator[None]:
    """Turn what a converter raises into 611, and keep it from setting up the process's log."""
    handler = logging.NullHandler()
    root = logging.getLogger()
    # The first message to a root logger without a handler would give it one that prints.
    root.addHandler(handler)
    try:
        yield
    except (ReleaseError, ImportError):
        raise
    except Exception as error:  # converters let exceptions of every kind through
        words = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ReleaseError(611, f"{name}: cannot be converted ({words[:200]})") from error
    finally:
        root.removeHandler(handler)
