"""Removes from an ONNX model what does not affect its results: comments, metadata, names of files."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto


def strip(model: ModelProto) -> None:
    """Remove comments and metadata, which hold paths and source lines, and shapes that a runtime infers again."""
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


def sort_nodes(graph: GraphProto) -> None:
    """Put every node behind those it takes its inputs from, and otherwise leave the order as it is.

    Raises:
        ValueError: there is no such order.
    """
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    waits = [{makers[name] for name in node.input if name in makers} for node in graph.node]
    followers: list[list[int]] = [[] for _ in graph.node]
    for index, before in enumerate(waits):
        for maker in before:
            followers[maker].append(index)
    ready = [index for index, before in enumerate(waits) if not before]
    order = []
    while ready:
        order.append(heapq.heappop(ready))
        for follower in followers[order[-1]]:
            waits[follower].discard(order[-1])
            if not waits[follower]:
                heapq.heappush(ready, follower)
    if len(order) != len(graph.node):
        raise ValueError("graph: must have no loops")
    nodes = [graph.node[index] for index in order]
    del graph.node[:]
    graph.node.extend(nodes)
