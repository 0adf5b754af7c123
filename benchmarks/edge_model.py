"""The model of edge.py: ResNet-8 as ONNX and as a signed bundle, one request in each protocol, and its answer."""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
import torch
from tritonclient.grpc import service_pb2

sys.path.insert(0, str(Path(__file__).resolve().parent / "edge_peers"))

from session import open_session

from fedge.shared.bundle.bundle import write_bundle
from fedge.shared.bundle.manifest import Manifest
from fedge.shared.bundle.manifest_artefacts import ONNX_FP32, Artefact
from fedge.shared.compile.onnx_export import export_onnx, opset_of, parity
from fedge.shared.crypto.dsse import load_private, new_key
from fedge.shared.models.resnet import ResNet
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema

NAME: Final = "resnet-8"
SHAPE: Final = (3, 64, 64)
CLASSES: Final = 10
_SEED: Final = 0


def write(folder: Path) -> None:
    """Write all that the servers and clients read.

    model.onnx, model.fedge signed by key (key.pub beside it), input.npy ``(1, 3, 64, 64)``, logits.npy ``(1, 10)``
    as ONNX Runtime gives them, request.bin (a ModelInferRequest), response.bin (its ModelInferResponse) and
    request.json (LitServe's).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        network = ResNet(channels=SHAPE[0], classes=CLASSES)
    onnx = export_onnx(network, SHAPE)
    (folder / "model.onnx").write_bytes(onnx)
    sha256 = hashlib.sha256(onnx).hexdigest()
    manifest = Manifest(
        task=NAME,
        run="benchmark",
        strategy="FedAvg",
        rounds=1,
        sites=("a",),
        created="2026-01-01T00:00:00Z",
        fedge=version("fedge"),
        config_sha256=hashlib.sha256(b"").hexdigest(),
        model_sha256=sha256,
        artefacts=(Artefact("model.onnx", ONNX_FP32, sha256, len(onnx), opset_of(onnx)),),
        input=InputSchema(shape=SHAPE),
        output=OutputSchema(
            labels=tuple(f"class-{i}" for i in range(CLASSES)), activation="softmax"
        ),
        preprocessing=(),
        metrics={"pooled": {}, "site_mean": {}},
        parity=parity(network, onnx, SHAPE),
    )
    key = folder / "key"
    new_key(key)
    write_bundle(folder / "model.fedge", manifest, {"model.onnx": onnx}, load_private(key))
    x = np.random.default_rng(_SEED).standard_normal((1, *SHAPE)).astype(np.float32)
    (logits,) = open_session(str(folder / "model.onnx")).run(["logits"], {"input": x})
    np.save(folder / "input.npy", x)
    np.save(folder / "logits.npy", logits)
    (folder / "request.bin").write_bytes(_request(x))
    (folder / "response.bin").write_bytes(_response(logits))
    body = {"shape": list(x.shape), "data": base64.b64encode(x.tobytes()).decode()}
    (folder / "request.json").write_text(json.dumps(body))


def _request(x: np.ndarray) -> bytes:
    kinds = service_pb2.ModelInferRequest
    tensor = kinds.InferInputTensor(name="input", datatype="FP32", shape=x.shape)
    output = kinds.InferRequestedOutputTensor(name="logits")
    request = kinds(
        model_name=NAME, inputs=[tensor], outputs=[output], raw_input_contents=[x.tobytes()]
    )
    return bytes(request.SerializeToString())


def _response(logits: np.ndarray) -> bytes:
    kinds = service_pb2.ModelInferResponse
    tensor = kinds.InferOutputTensor(name="logits", datatype="FP32", shape=logits.shape)
    response = kinds(model_name=NAME, outputs=[tensor], raw_output_contents=[logits.tobytes()])
    return bytes(response.SerializeToString())
