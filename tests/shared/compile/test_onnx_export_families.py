"""Every family of networks: exported, equal at other sizes than the example's, in half precision, and as engines."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fedge.shared.bundle.manifest import GRAPH_INPUT
from fedge.shared.bundle.onnx_session import load_onnxruntime
from fedge.shared.compile.graph_input import GraphInput
from fedge.shared.compile.onnx_export import export_onnx, parity
from fedge.shared.compile.quantisation import activations, quantise, to_fp16
from fedge.shared.compile.tensorrt import around, build_in_child
from fedge.shared.errors import ReleaseError
from fedge.shared.models.recurrent import RecurrentClassifier

BATCHES = (1, 2, 5)
TOLERANCE = 1e-4
#: Of the largest output: half precision has 11 bits, and some hundred steps lose some of them.
HALF = 5e-3
LAYERS = 2
GPUS = (86, 89, 120)


@pytest.fixture(scope="module")
def exported(family):
    torch.manual_seed(0)
    network = family.build().eval()
    return network, export_onnx(network, family.given)


def axes(value):
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.slow
def test_onnx_is_the_network_at_every_size(family, exported):
    network, data = exported
    graph = onnx.load_model_from_string(data).graph
    wanted = [family.given.names.get(i, size) for i, size in enumerate((2, *family.given.shape))]
    assert axes(graph.input[0]) == wanted
    assert {axes(output)[0] for output in graph.output} == {"batch"}
    assert all(str(a).isidentifier() or a > 0 for output in graph.output for a in axes(output))
    recurrences = [n.op_type for n in graph.node if n.op_type in ("LSTM", "GRU")]
    if isinstance(network, RecurrentClassifier):
        # Unrolled, the graph would hold one length only.
        assert recurrences == [type(network.recurrence).__name__] * LAYERS
    found = parity(network, data, family.given, batch_sizes=BATCHES, sizes=family.others)
    assert found.max_abs_difference <= TOLERANCE


def run(data, x):
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    # At ORT_ENABLE_ALL onnxruntime 1.31 crashes on a Transformer in half precision.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return session.run(None, {GRAPH_INPUT: x})


@pytest.mark.slow
def test_half_precision_is_near(family, exported):
    _, data = exported
    half = to_fp16(data)
    assert to_fp16(data) == half
    for sizes in ({}, *family.others):
        x = family.given.sample(np.random.default_rng(0), 3, sizes)
        for found, expected in zip(run(half, x), run(data, x), strict=True):
            assert found.dtype == expected.dtype
            if np.issubdtype(found.dtype, np.floating):
                np.testing.assert_allclose(
                    found, expected, atol=HALF * np.abs(expected).max(), rtol=0
                )


def sizes_of(family):
    # Positions of the small Transformers end at 30.
    return {name: (low, best, min(high, 30)) for name, (low, best, high) in around(family.given.sizes).items()} \
        if family.given.tokens else around(family.given.sizes)  # fmt: skip


@pytest.mark.slow
def test_one_engine_for_three_generations_in_each_precision(family, exported):
    _, data = exported
    int8 = quantise(data, dict.fromkeys(activations(data), (-2.0, 2.0)), symmetric=True)
    for graph in (data, to_fp16(data), int8):
        built = build_in_child(
            graph, runtime="tensorrt-rtx", capabilities=GPUS, sizes=sizes_of(family), deadline=600
        )
        assert built.capabilities == GPUS
        assert len(built.engine) > 10_000


class Forgets(nn.Module):
    """A network that takes its length for a constant: what the exporter must not let through."""

    def forward(self, x):
        return x.sum(dim=1) / len(x.unbind(1))


@pytest.mark.slow
def test_a_fixed_length_is_refused():
    with pytest.raises(ReleaseError, match="FE-607 network"):
        export_onnx(Forgets(), GraphInput((4, 3), open={1: "length"}))
