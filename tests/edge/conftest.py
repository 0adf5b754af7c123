"""Bundles for the tests of the edge: real ONNX graphs of a few nodes, signed."""

from __future__ import annotations

import hashlib
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from onnx import TensorProto, helper, numpy_helper

from fedge.edge.backends import trial
from fedge.edge.backends.cuda import Driver
from fedge.edge.runtime import reference_trial
from fedge.shared.bundle.bundle import write_bundle
from fedge.shared.bundle.manifest import Manifest, Parity
from fedge.shared.bundle.manifest_artefacts import Artefact, Engine, Latency, Qualification
from fedge.shared.bundle.manifest_checks import network_shape
from fedge.shared.bundle.onnx_session import load_onnxruntime
from fedge.shared.errors import BundleError
from fedge.shared.preprocessing.schema import Feature, InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import OneHot, Reshape, Scale, Standardise

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
IMAGE = InputSchema(shape=(2, 3))
TABLE = InputSchema(
    shape=(3,),
    features=(
        Feature("age", low=20, high=100, unit="years"),
        Feature("pain", low=1, high=3, categories=(1.0, 2.0, 3.0)),
        Feature("pulse", low=30, high=220),
    ),
)
ENCODE = OneHot(((1, (1.0, 2.0, 3.0)),))
STATISTICS = Standardise((50.0, 90.0, 0.25, 0.25), (10.0, 20.0, 0.5, 0.5))


def linear(
    shape: tuple[int, ...],
    weights: np.ndarray[Any, Any],
    *,
    batch: str | int = "batch",
    names: tuple[str, str] = ("input", "logits"),
    kind: int = TensorProto.FLOAT,
) -> bytes:
    """Logits = flattened input times ``weights`` (values, k), as ONNX."""
    nodes = [
        helper.make_node("Flatten", [names[0]], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "weights"], [names[1]]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(names[0], kind, [batch, *shape])],
        [helper.make_tensor_value_info(names[1], kind, [batch, weights.shape[1]])],
        [numpy_helper.from_array(weights.astype(helper.tensor_dtype_to_np_dtype(kind)), "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def manifest(**changes: Any) -> Manifest:
    """An image task; ``changes`` replace fields."""
    base = Manifest(
        task="image",
        run="r-1",
        strategy="FedAvg",
        rounds=3,
        sites=("a", "b"),
        created="2026-01-31T12:00:00Z",
        fedge="0.1.0",
        config_sha256="a" * 64,
        model_sha256="b" * 64,
        artefacts=(),
        input=IMAGE,
        output=OutputSchema(labels=("x", "y", "z"), activation="softmax"),
        preprocessing=(Scale(0.5), Reshape((1, 2, 3))),
        metrics={"pooled": {"accuracy": 0.9}, "site_mean": {"accuracy": 0.8}},
        parity=Parity(1e-7, 1e-4, (1, 2)),
        latency=Latency(0.1, 0.2, 1, 1, "cpu"),
    )
    return replace(base, **changes)


@pytest.fixture(scope="session")
def trust(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "k.pub"
    path.write_bytes(KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path


@pytest.fixture
def bundle_of(tmp_path: Path) -> Callable[..., Path]:
    """Sign a graph with a manifest made of ``changes``; the graph defaults to one that fits."""

    def make(onnx_bytes: bytes | None = None, **changes: Any) -> Path:
        found = manifest(**changes)
        if onnx_bytes is None:
            shape = network_shape(found.input, found.preprocessing)
            k = 1 if found.output.activation == "sigmoid" else len(found.output.labels)
            values = int(np.prod(shape))
            onnx_bytes = linear(shape, np.arange(values * k).reshape(values, k) / values)
        sha256 = hashlib.sha256(onnx_bytes).hexdigest()
        artefact = Artefact("model.onnx", "onnx-fp32", sha256, len(onnx_bytes), 18)
        path = tmp_path / f"{found.task}.fedge"
        write_bundle(
            path,
            replace(found, artefacts=(artefact,)),
            {"model.onnx": onnx_bytes},
            KEY,
            replace=True,
        )
        return path

    return make


EXECUTED = Qualification(True, max_abs_difference=0.01, tolerance=0.1, agreement=1.0)


@dataclass(frozen=True)
class Extra:
    """An artefact beside the fp32 graph, as a test writes it down."""

    name: str
    kind: str
    data: bytes
    qualification: Qualification | None = EXECUTED
    engine: Engine | None = None

    @property
    def artefact(self) -> Artefact:
        digest = hashlib.sha256(self.data).hexdigest()
        return Artefact(
            self.name, self.kind, digest, len(self.data), 18, self.engine, self.qualification
        )


@pytest.fixture
def compiled(tmp_path: Path) -> Callable[..., Path]:
    """Sign the small network with further artefacts; ``changes`` replace fields of the manifest."""

    def make(*extras: Extra, graph: bytes | None = None, **changes: Any) -> Path:
        fp32 = Extra("model.onnx", "onnx-fp32", graph or network(), None)
        every = [fp32, *extras]
        found = manifest(task="compiled", artefacts=tuple(e.artefact for e in every), **changes)
        path = tmp_path / "compiled.fedge"
        write_bundle(path, found, {e.name: e.data for e in every}, KEY, replace=True)
        return path

    return make


@lru_cache
def network(width: int = 64) -> bytes:
    """Two layers, 2x3 images to three logits, as ONNX."""
    generator = np.random.default_rng(7)
    weights = [generator.standard_normal((6, width)) / 3, generator.standard_normal((width, 3)) / 8]
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "w0"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("MatMul", ["active", "w1"], ["logits"]),
    ]
    return _model(
        nodes,
        [numpy_helper.from_array(w.astype(np.float32), f"w{n}") for n, w in enumerate(weights)],
    )


@lru_cache
def quantised() -> bytes:
    """The same in INT8, by the ranges of its own made-up inputs."""
    load_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            x = np.random.default_rng(0).random((64, 1, 2, 3)).astype(np.float32)
            self.left = iter([{"input": x}])

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "int8.onnx"
        model = onnx.load_model_from_string(network())
        quantize_static(model, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True)
        return path.read_bytes()


@lru_cache
def halved() -> bytes:
    """The same in half precision, with float32 at both ends."""
    load_onnxruntime()
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load_model_from_string(network())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        half = convert_float_to_float16(model, keep_io_types=True)
    return bytes(half.SerializeToString())


@lru_cache
def killer() -> bytes:
    """Divides the least whole number of 64 bits by -1: x86 processors trap, and nothing catches it (SIGFPE)."""
    least = np.array(np.iinfo(np.int64).min)
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
        helper.make_node("Mul", ["y", "zero"], ["zeros"]),
        helper.make_node("Cast", ["zeros"], ["whole"], to=TensorProto.INT64),
        helper.make_node("Add", ["whole", "least"], ["lowest"]),
        helper.make_node("Div", ["lowest", "minus"], ["too-large"]),
        helper.make_node("Cast", ["too-large"], ["logits"], to=TensorProto.FLOAT),
    ]
    return _model(
        nodes,
        [
            numpy_helper.from_array(np.ones((6, 3), np.float32), "w"),
            numpy_helper.from_array(np.float32(0), "zero"),
            numpy_helper.from_array(least, "least"),
            numpy_helper.from_array(np.array(-1, np.int64), "minus"),
        ],
    )


@lru_cache
def endless() -> bytes:
    """A loop of 2^62 steps."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Sin", ["v"], ["out"])],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("out", TensorProto.FLOAT, None),
        ],
    )
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], axis=1),
        helper.make_node("MatMul", ["flat", "w"], ["y"]),
        helper.make_node("Loop", ["steps", "yes", "y"], ["logits"], body=body),
    ]
    constants = [
        numpy_helper.from_array(np.ones((6, 3), np.float32), "w"),
        numpy_helper.from_array(np.asarray(2**62), "steps"),
        numpy_helper.from_array(np.asarray(True), "yes"),
    ]
    return _model(nodes, constants)


def nonsense() -> bytes:
    """A well-formed file with an unknown operator."""
    return _model([helper.make_node("Nonsense", ["input"], ["logits"])], [])


def fragile() -> bytes:
    """The network, but with a Reshape that only works for batches of up to four."""
    model = onnx.load_model_from_string(network())
    graph = model.graph
    for node in graph.node:
        if list(node.output) == ["logits"]:
            node.output[0] = "y"
    shape = helper.make_node("Shape", ["y"], ["shape"])
    first = helper.make_node("Gather", ["shape", "zero"], ["n"])
    picked = helper.make_node("Gather", ["allowed", "n"], ["nothing"])  # refuses a higher index
    total = helper.make_node("Add", ["y", "nothing"], ["logits"])
    graph.node.extend([shape, first, picked, total])
    graph.initializer.append(numpy_helper.from_array(np.asarray(0), "zero"))
    graph.initializer.append(numpy_helper.from_array(np.zeros(5, np.float32), "allowed"))
    return bytes(model.SerializeToString())


def _model(nodes: list[Any], constants: list[Any], **more: Any) -> bytes:
    """A model from 2x3 images with a channel to three logits."""
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, 2, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        constants,
    )
    more = {"opset_imports": [helper.make_opsetid("", 18)], **more}
    return bytes(helper.make_model(graph, ir_version=10, **more).SerializeToString())


@pytest.fixture
def graphs() -> dict[str, bytes]:
    """The small network in several forms, and some that misbehave."""
    return {
        "fp32": network(),
        "int8": quantised(),
        "fp16": halved(),
        "killer": killer(),
        "endless": endless(),
        "fragile": fragile(),
        "nonsense": nonsense(),
        "garbage": b"\x08\x0a garbage",
    }


@pytest.fixture
def extra() -> type[Extra]:
    """Describes an artefact beside the fp32 graph."""
    return Extra


@pytest.fixture
def no_gpu() -> None:
    """For tests of what a device without a GPU says."""
    try:
        Driver()
    except BundleError:
        return
    pytest.skip("there is a GPU")


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials may take longer than on a device, as the machine may be busy with other tests."""
    monkeypatch.setattr(trial, "DEADLINE", 120.0)
    monkeypatch.setattr(reference_trial, "DEADLINE", 120.0)


@pytest.fixture
def image_bundle(bundle_of: Callable[..., Path]) -> Path:
    """2x3 images, softmax over x, y, z."""
    return bundle_of()


@pytest.fixture
def table_bundle(bundle_of: Callable[..., Path]) -> Path:
    """Three columns, one of categories, standardised; sigmoid."""
    return bundle_of(
        task="table",
        input=TABLE,
        output=OutputSchema(labels=("no", "yes"), activation="sigmoid", threshold=0.25),
        preprocessing=(ENCODE, STATISTICS),
    )


@pytest.fixture
def site_bundle(bundle_of: Callable[..., Path]) -> Path:
    """The same, standardised by each site's own statistics."""
    return bundle_of(
        task="site",
        input=TABLE,
        output=OutputSchema(labels=("no", "yes"), activation="sigmoid"),
        preprocessing=(ENCODE, Standardise()),
    )


@pytest.fixture
def graph_of() -> Callable[..., bytes]:
    """Makes graphs: see ``linear``."""
    return linear
