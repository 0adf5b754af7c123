"""A graph whose output is the extremes of its activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

#: The one output: ``(1, 2 * tensors)``, the smallest value of each, then the largest of each.
EXTREMES: Final = "extremes"
#: From it on, reductions cover all axes if none is named.
_MIN_OPSET: Final = 11


def observed(onnx: bytes, tensors: Sequence[str]) -> bytes:
    """The graph with the extremes of some tensors as its only output.

    Run it on one example at a time: the result then does not depend on the number of examples or on the batches, and
    merges to the same ranges over any division into sites.

    Args:
        onnx: the graph.
        tensors: names of floating-point ones in it.

    Raises:
        ValueError: a tensor is not in the graph, or there is none.
    """
    import onnx as package
    from onnx import TensorProto, helper

    model = package.load_model_from_string(onnx)
    graph = model.graph
    present = {name for node in graph.node for name in node.output} | {i.name for i in graph.input}
    if not tensors or not set(tensors) <= present:
        raise ValueError(f"tensors: must be of the graph, got {sorted(set(tensors) - present)[:3]}")
    version = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    if version < _MIN_OPSET:
        raise ValueError(f"graph: must have opset {_MIN_OPSET} or newer, got {version}")
    column, row = f"{EXTREMES}/column", f"{EXTREMES}/row"
    graph.initializer.append(helper.make_tensor(column, TensorProto.INT64, [1], [1]))
    graph.initializer.append(helper.make_tensor(row, TensorProto.INT64, [2], [1, -1]))
    flattened = []
    for kind in ("ReduceMin", "ReduceMax"):
        for i, name in enumerate(tensors):
            reduced, flat = f"{EXTREMES}/{kind}/{i}", f"{EXTREMES}/{kind}/{i}/flat"
            # ONNX Runtime keeps the axes, as it cannot reduce all of them away where one is empty.
            graph.node.append(helper.make_node(kind, [name], [reduced], keepdims=1))
            graph.node.append(helper.make_node("Reshape", [reduced, column], [flat]))
            flattened.append(flat)
    all_ = f"{EXTREMES}/all"
    graph.node.append(helper.make_node("Concat", flattened, [all_], axis=0))
    graph.node.append(helper.make_node("Reshape", [all_, row], [EXTREMES]))
    del graph.output[:]
    output = helper.make_tensor_value_info(EXTREMES, TensorProto.FLOAT, [1, 2 * len(tensors)])
    graph.output.append(output)
    data: bytes = model.SerializeToString()
    return data
