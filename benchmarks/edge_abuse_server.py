"""Targets of edge_abuse.py: bundles of a small network, and `fedge-edge serve` as a process."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import onnx
from edge_abuse_requests import INFER, MAX_BATCH, NAME, SERVICE, SHAPE
from onnx import TensorProto, helper, numpy_helper
from tritonclient.grpc import service_pb2

from fedge.shared.bundle.bundle import write_bundle
from fedge.shared.bundle.manifest import Manifest, Parity
from fedge.shared.bundle.manifest_artefacts import ONNX_FP32, ONNX_INT8, Artefact, Qualification
from fedge.shared.crypto.dsse import load_private
from fedge.shared.preprocessing.schema import InputSchema, OutputSchema

#: Bytes of one request that the server takes.
LIMIT: Final = 65_536
_LABELS: Final = tuple(f"class-{i}" for i in range(10))


def network(seed: int) -> bytes:
    """A perceptron of 64, 128 and 10 units as ONNX."""
    random = np.random.default_rng(seed)
    weights = [random.normal(size=s).astype(np.float32) / 8 for s in ((64, 128), (128, 10))]
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "w0"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "w1"], ["logits"]),
        ],
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(_LABELS)])],
        [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate(weights)],
    )
    found = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(found.SerializeToString())


def flipped(data: bytes) -> bytes:
    """The graph with the highest bit of one weight's exponent changed: 0.1 becomes 10^37."""
    weights = numpy_helper.to_array(onnx.load_from_string(data).graph.initializer[0])
    at = data.index(weights.tobytes()) + 4 * 1000 + 3
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def write(path: Path, key: Path, better: bytes | None = None, run: str = "abuse") -> str:
    """Sign a bundle; ``better`` is said to be an INT8 graph that has proved itself.

    Returns:
        The model's version as the server reports it.
    """
    contents = {"model.onnx": network(0)}
    artefacts = [_artefact("model.onnx", ONNX_FP32, contents["model.onnx"])]
    if better is not None:
        contents["model.int8.onnx"] = better
        proved = Qualification(True, "", 0.001, 0.1, 1.0)
        artefacts.append(_artefact("model.int8.onnx", ONNX_INT8, better, proved))
    model = hashlib.sha256(run.encode()).hexdigest()
    manifest = Manifest(
        task=NAME,
        run=run,
        strategy="FedAvg",
        rounds=1,
        sites=("a",),
        created="2026-01-01T00:00:00Z",
        fedge=version("fedge"),
        config_sha256=hashlib.sha256(b"").hexdigest(),
        model_sha256=model,
        artefacts=tuple(artefacts),
        input=InputSchema(shape=SHAPE),
        output=OutputSchema(labels=_LABELS, activation="softmax"),
        preprocessing=(),
        metrics={"pooled": {}, "site_mean": {}},
        parity=Parity(0.0, 1e-4, (1, 2)),
    )
    write_bundle(path, manifest, contents, load_private(key), replace=True)
    return model[:12]


def _artefact(
    name: str, kind: str, data: bytes, qualification: Qualification | None = None
) -> Artefact:
    sha256 = hashlib.sha256(data).hexdigest()
    return Artefact(name, kind, sha256, len(data), 18, qualification=qualification)


class Server:
    """`fedge-edge serve` as a process; what it logs goes to a file."""

    def __init__(self, bundle: Path, trust: Path, log: Path) -> None:
        self.log = log
        argv = [
            sys.executable,
            "-P",
            "-m",
            "fedge.edge",
            "serve",
            str(bundle),
            "--trust",
            str(trust),
        ]
        argv += ["--listen", "127.0.0.1:0", "--max-batch", str(MAX_BATCH)]
        argv += ["--max-request-bytes", str(LIMIT)]
        began = time.monotonic()
        with log.open("w") as file:
            self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=file, text=True)
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        self.start_s = time.monotonic() - began
        assert words[:2] == ["listening", "on"], log.read_text()
        self.port = int(words[2].rpartition(":")[2])
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.port}")

    def infer(self, data: bytes) -> Any:
        """The answer to one request."""
        answer = self.channel.unary_unary(INFER)(data, timeout=20)
        return service_pb2.ModelInferResponse.FromString(answer)

    def ready(self, model_version: str) -> bool:
        """Whether this version serves."""
        request = service_pb2.ModelReadyRequest(name=NAME, version=model_version)
        call = self.channel.unary_unary(f"{SERVICE}ModelReady")
        return call(request.SerializeToString(), timeout=20) == b"\x08\x01"

    def status(self, key: str) -> int:
        """A number of the kernel's: VmRSS in kB, Threads."""
        text = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(key))

    def rss_mb(self) -> float:
        """Resident memory in MB of 10^6 bytes."""
        return self.status("VmRSS:") * 1024 / 1e6

    def stop(self) -> int:
        """Its exit status."""
        self.channel.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(10)


@contextlib.contextmanager
def serving(bundle: Path, trust: Path, log: Path) -> Iterator[Server]:
    """A server that ends with the block."""
    server = Server(bundle, trust, log)
    try:
        yield server
    finally:
        server.stop()
