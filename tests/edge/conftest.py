"""Bundles for the tests of the edge: real ONNX graphs of a few nodes, signed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from onnx import TensorProto, helper, numpy_helper

from fedge.shared.bundle import write_bundle
from fedge.shared.manifest import Artefact, Latency, Manifest, Parity
from fedge.shared.manifest_rules import network_shape
from fedge.shared.preprocess import OneHot, Reshape, Scale, Standardise
from fedge.shared.schema import Feature, InputSchema, OutputSchema

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
