"""A server in this process on a real bundle, and requests of the published protocol's own client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

from fedge.edge.runtime.model import EdgeModel
from fedge.edge.serving.credentials import Address
from fedge.edge.serving.loaded_model import Limits, Served
from fedge.edge.serving.server import InferenceServer
from fedge.edge.serving.service import Service
from fedge.edge.serving.usage_counters import Counts
from fedge.shared.bundle.bundle import open_bundle
from fedge.shared.crypto.dsse import load_public

INFER = "/inference.GRPCInferenceService/ModelInfer"


def request(x: np.ndarray[Any, Any], name: str = "image", **changes: Any) -> Any:
    """A ModelInferRequest with raw contents."""
    kinds = service_pb2.ModelInferRequest
    tensor = kinds.InferInputTensor(name="input", datatype="FP32", shape=x.shape)
    found = kinds(model_name=name, inputs=[tensor], raw_input_contents=[x.tobytes()])
    for key, value in changes.items():
        setattr(found, key, value)
    return found


def images(n: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).normal(size=(n, 2, 3)).astype(np.float32)


class SlowModel(EdgeModel):
    """The same model, which takes its time, and waits at a gate."""

    seconds = 0.0
    gate: threading.Event
    runs: list[int]

    def logits(self, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        self.runs.append(len(x))
        assert self.gate.wait(60)
        time.sleep(self.seconds)
        return super().logits(x)


class Running:
    """A server and what is in it; ``held`` lets no run end until ``gate`` is set."""

    def __init__(
        self, bundle: Path, trust: Path, seconds: float = 0.0, held: bool = False, **limits: Any
    ) -> None:
        self.bundle, self.trust, self.seconds = bundle, trust, seconds
        self.gate = threading.Event()
        if not held:
            self.gate.set()
        self.limits = Limits(**limits)
        self.counts = Counts()
        self.runs: list[int] = []
        self.service = Service(self.load(), self.limits.deadline, self.counts)
        self.server = InferenceServer(
            self.service,
            Address("127.0.0.1", 0),
            None,
            max_bytes=self.service.served.max_bytes,
            in_flight=self.limits.in_flight,
        )
        self.address = str(self.server.address)

    def load(self, *, rehearsed: bool = False) -> Served:
        bundle = open_bundle(self.bundle, load_public(self.trust))
        model = SlowModel.from_bundle(bundle, rehearsed=rehearsed)
        assert isinstance(model, SlowModel)
        model.seconds, model.gate, model.runs = self.seconds, self.gate, self.runs
        return Served(model, self.limits, self.counts, bundle.parts[1].sha256)

    def channel(self) -> grpc.Channel:
        """A connection of its own."""
        return grpc.insecure_channel(self.address, options=[("grpc.use_local_subchannel_pool", 1)])

    def raw(self, data: bytes, method: str = INFER, **options: Any) -> bytes:
        """Send bytes, get bytes."""
        with self.channel() as channel:
            return bytes(channel.unary_unary(method)(data, **{"timeout": 60, **options}))

    def refused(self, data: bytes, method: str = INFER) -> tuple[Any, str]:
        """Status and text of a refusal."""
        with pytest.raises(grpc.RpcError) as caught:
            self.raw(data, method)
        return caught.value.code(), caught.value.details()


@pytest.fixture(scope="session")
def request_of() -> Callable[..., Any]:
    """Makes requests: see ``request``."""
    return request


@pytest.fixture(scope="session")
def images_of() -> Callable[..., Any]:
    """Makes inputs: see ``images``."""
    return images


@pytest.fixture
def running(trust: Path) -> Iterator[Callable[..., Running]]:
    """Starts servers; they end with the test."""
    started: list[Running] = []

    def start(bundle: Path, **limits: Any) -> Running:
        started.append(Running(bundle, trust, **limits))
        return started[-1]

    yield start
    for one in started:
        one.gate.set()
        one.server.stop(5.0)


@pytest.fixture
def image_server(running: Callable[..., Running], image_bundle: Path) -> Running:
    return running(image_bundle)


@pytest.fixture
def client(image_server: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(image_server.address) as found:
        yield found
