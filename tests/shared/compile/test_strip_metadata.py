import onnx
import pytest
from onnx import TensorProto, helper

from fedge.shared.compile.strip_metadata import sort_nodes, strip


def graph(*nodes):
    return helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )  # fmt: skip


def test_nodes_follow_those_they_wait_for_and_else_keep_their_order():
    model_bytes = graph(
        helper.make_node("Neg", ["b"], ["y"]),
        helper.make_node("Abs", ["x"], ["c"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Exp", ["x"], ["a"]),
    )
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(helper.make_model(model_bytes))
    sort_nodes(model_bytes)
    assert [node.op_type for node in model_bytes.node] == ["Abs", "Exp", "Relu", "Neg"]
    onnx.checker.check_model(helper.make_model(model_bytes))


def test_a_loop_has_no_order():
    with pytest.raises(ValueError, match="no loops"):
        sort_nodes(
            graph(helper.make_node("Neg", ["y"], ["a"]), helper.make_node("Neg", ["a"], ["y"]))
        )


def test_comments_go_at_every_depth():
    inner = graph(helper.make_node("Neg", ["x"], ["y"], doc_string="in /home/someone"))
    node = helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)
    model = helper.make_model(graph(node), doc_string="by someone")
    helper.set_model_props(model, {"path": "/home/someone"})
    strip(model)
    assert b"someone" not in model.SerializeToString()
