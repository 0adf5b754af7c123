from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedge.edge.runtime.model import EdgeModel, decide
from fedge.shared.bundle.bundle import open_bundle
from fedge.shared.crypto.dsse import load_public
from fedge.shared.errors import BundleError, InputError
from fedge.shared.preprocessing import steps
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Standardise

Load = Callable[..., EdgeModel]
SIGMOID = OutputSchema(labels=("no", "yes"), activation="sigmoid", threshold=0.25)


@pytest.fixture
def load(trust: Path) -> Load:
    def from_path(path: Path, **arguments: Any) -> EdgeModel:
        return EdgeModel.from_bundle(open_bundle(path, load_public(trust)), **arguments)

    return from_path


def test_predictions_are_those_of_the_arithmetic(load: Load, image_bundle: Path) -> None:
    model = load(image_bundle, threads=2)
    x = np.random.default_rng(0).random((5, 2, 3)).astype(np.float32)
    weights = np.arange(18).reshape(6, 3) / 6
    logits = x.reshape(5, 6) * 0.5 @ weights
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = model.predict(x)
    np.testing.assert_allclose(found.probabilities, expected, rtol=1e-5)
    np.testing.assert_array_equal(found.indices, expected.argmax(axis=1))


def test_every_batch_size_gives_the_same(load: Load, table_bundle: Path) -> None:
    model = load(table_bundle)
    x = np.asarray([[50, 1, 90], [60, 2, 110], [20, 3, 30]], np.float32)
    together = model.predict(x)
    for row in range(3):
        alone = model.predict(x[row : row + 1])
        np.testing.assert_array_equal(alone.probabilities[0], together.probabilities[row])


def test_sigmoid_decides_at_the_threshold_and_never_overflows() -> None:
    logits = np.asarray([[-1e4], [np.log(0.25 / 0.75) - 1e-6], [np.log(0.25 / 0.75) + 1e-6], [1e4]])
    found = decide(logits, SIGMOID)
    assert found.indices.tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(found.probabilities[:, 1], [0, 0.25, 0.25, 1], atol=1e-6)
    np.testing.assert_allclose(found.probabilities.sum(axis=1), 1)


def test_softmax_of_large_logits_is_finite() -> None:
    found = decide(
        np.asarray([[1e30, -1e30, 0]], np.float32), OutputSchema(("a", "b", "c"), "softmax")
    )
    np.testing.assert_array_equal(found.probabilities, [[1, 0, 0]])


def test_a_site_brings_its_own_statistics(
    load: Load, site_bundle: Path, table_bundle: Path
) -> None:
    x = np.asarray([[50, 2, 100]], np.float32)
    with pytest.raises(InputError) as error:
        load(site_bundle)
    assert error.value.code == 807
    own = Standardise((40.0, 80.0, 0.5, 0.5), (5.0, 10.0, 0.5, 0.5))
    model = load(site_bundle, statistics=own)
    ready = steps.apply((model.steps[0], own), x)
    np.testing.assert_array_equal(model.logits(ready), model.logits(steps.apply(model.steps, x)))
    with pytest.raises(InputError) as error:
        load(site_bundle, statistics=Standardise((1.0,), (1.0,)))
    assert error.value.code == 807


def test_statistics_are_refused_where_the_model_takes_none(load: Load, image_bundle: Path) -> None:
    with pytest.raises(InputError) as error:
        load(image_bundle, statistics=Standardise((1.0,), (1.0,)))
    assert error.value.code == 807


def test_statistics_do_not_replace_those_that_are_signed(load: Load, table_bundle: Path) -> None:
    own = Standardise((40.0, 80.0, 0.5, 0.5), (5.0, 10.0, 0.5, 0.5))
    with pytest.raises(InputError) as error:
        load(table_bundle, statistics=own)
    assert error.value.code == 807
    assert error.value.message == (
        "this model was trained with one mean and standard deviation for all sites, which the manifest"
        " holds: leave --statistics out"
    )


def test_statistics_fill_only_the_step_that_has_none(
    load: Load, bundle_of: Callable[..., Path]
) -> None:
    signed = Standardise((1.0, 2.0, 3.0), (4.0, 5.0, 6.0))
    own = Standardise((7.0, 8.0, 9.0), (1.0, 1.0, 1.0))
    path = bundle_of(input=InputSchema(shape=(3,)), preprocessing=(signed, Standardise()))
    assert load(path, statistics=own).steps == (signed, own)


WEIGHTS = np.ones((6, 3))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"shape": (1, 3, 2), "weights": WEIGHTS}, "input must have shape"),
        ({"shape": (6,), "weights": WEIGHTS}, "input must have shape"),
        ({"shape": (1, 2, 3), "weights": np.ones((6, 2))}, "output must have shape"),
        ({"shape": (1, 2, 3), "weights": WEIGHTS, "batch": 4}, "input must have shape"),
        ({"shape": (1, 2, 3), "weights": WEIGHTS, "names": ("x", "logits")}, "named 'input'"),
        ({"shape": (1, 2, 3), "weights": WEIGHTS, "names": ("input", "y")}, "named 'logits'"),
        ({"shape": (1, 2, 3), "weights": WEIGHTS, "kind": TensorProto.DOUBLE}, "must be float32"),
    ],
)
def test_a_graph_that_is_not_the_manifests_is_refused(
    load: Load,
    bundle_of: Callable[..., Path],
    graph_of: Callable[..., bytes],
    arguments: dict[str, Any],
    named: str,
) -> None:
    with pytest.raises(BundleError) as error:
        load(bundle_of(graph_of(**arguments)))
    assert error.value.code == 708
    assert error.value.message.startswith("model.onnx: ")
    assert named in error.value.message


@pytest.mark.parametrize("data", [b"\x00", b"not a model", b"\x08\x0a"])
def test_what_is_no_model_is_refused(
    load: Load, bundle_of: Callable[..., Path], data: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(BundleError) as error:
        load(bundle_of(data))
    assert error.value.code == 708
    assert "\n" not in error.value.message
    assert capfd.readouterr() == ("", "")


def test_weights_outside_the_bundle_are_refused(
    load: Load, bundle_of: Callable[..., Path], graph_of: Callable[..., bytes], tmp_path: Path
) -> None:
    model = onnx.load_model_from_string(graph_of((1, 2, 3), WEIGHTS))
    onnx.save_model(
        model, tmp_path / "m", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    assert (tmp_path / "weights.bin").stat().st_size == 18 * 4
    with pytest.raises(BundleError) as error:
        load(bundle_of((tmp_path / "m").read_bytes()))
    assert error.value.code == 706


def test_a_row_that_the_model_cannot_judge_is_named(
    load: Load, bundle_of: Callable[..., Path]
) -> None:
    shape = [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 2, 3])]
    out = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])]
    weights = numpy_helper.from_array(np.full((6, 3), 3e38, np.float32), "w")
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["logits"]),
    ]
    graph = helper.make_graph(nodes, "g", shape, out, [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    loaded = load(bundle_of(model.SerializeToString()))
    x = np.zeros((3, 2, 3), np.float32)
    assert loaded.predict(x).probabilities.shape == (3, 3)
    x[1] = 100
    with pytest.raises(BundleError) as error:
        loaded.predict(x, first_row=40)
    assert error.value.code == 709
    assert error.value.message.startswith("row 41: ")


def test_overflow_in_preprocessing_is_named(load: Load, site_bundle: Path) -> None:
    tiny = Standardise((0.0, 0.0, 0.0, 0.0), (0.0, 1.0, 1.0, 1.0))
    with pytest.raises(InputError) as error:
        load(site_bundle, statistics=tiny).predict(np.asarray([[3e38, 1, 1]], np.float32))
    assert (error.value.code, error.value.message[:6]) == (804, "row 0:")
