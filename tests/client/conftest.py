"""Requests as a server writes them, and a small real task to ask about."""

import hashlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, Metadata, RecordDict

from fedge.client.data.dataset import SiteData
from fedge.client.privacy import charging
from fedge.client.worker.handlers import SiteWorker
from fedge.shared import protocol
from fedge.shared.errors import SiteError
from fedge.shared.models.fnn import FNN
from fedge.shared.preprocessing.schema import Feature, InputSchema, OutputSchema
from fedge.shared.preprocessing.steps import Standardise
from fedge.shared.privacy.mechanisms.csprng import Entropy
from fedge.shared.tasks.classification import ACCURACY, LOSS, softmax_counters, softmax_loss
from fedge.shared.tasks.task import Table, Task

Ask = Callable[..., Message]
Tell = Callable[[SiteWorker, Message], RecordDict | SiteError]


def _no_files(path: Path | None) -> Table:
    raise NotImplementedError


@pytest.fixture(autouse=True)
def noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites' noise is the same each time that a test runs: the first has the key 1, the next 2."""
    keys = itertools.count(1)
    monkeypatch.setattr(charging, "Entropy", lambda: Entropy(key=next(keys).to_bytes(32, "big")))


@pytest.fixture
def task() -> Task:
    """Two blobs in the plane."""
    return Task(
        name="blobs",
        summary="two blobs",
        input=InputSchema((2,), features=(Feature("x", -9, 9), Feature("y", -9, 9))),
        output=OutputSchema(("left", "right"), "softmax"),
        preprocessing=(Standardise(),),
        network=lambda: FNN((2, 4, 2)),
        loss=softmax_loss,
        counters=softmax_counters,
        metrics=(ACCURACY, LOSS),
        load=_no_files,
    )


@pytest.fixture
def data() -> SiteData:
    draw = np.random.default_rng(0)
    labels = np.arange(50) % 2
    features = (draw.normal(size=(50, 2)) + 3.0 * labels[:, None]).astype(np.float32)
    return SiteData(features[:37], labels[:37], features[37:], labels[37:])


@pytest.fixture
def worker(task: Task, data: SiteData, tmp_path: Path) -> SiteWorker:
    return SiteWorker("site-1", task, data, tmp_path / "site-1")


@pytest.fixture
def tell() -> Tell:
    """Pass a message's kind and content to a worker; its error is returned, as it would travel."""

    def deliver(worker: SiteWorker, message: Message) -> RecordDict | SiteError:
        try:
            return worker.answer(message.metadata.message_type, message.content)
        except SiteError as error:
            return error

    return deliver


@pytest.fixture
def weights(task: Task) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {k: t.numpy() for k, t in task.network().state_dict().items()}


@pytest.fixture
def ask() -> Ask:
    """A request; keywords replace the usual configuration (with _ for -), None removes a key."""

    def build(
        kind: str, arrays: Mapping[str, Any] | None = None, drop: str = "", **changes: Any
    ) -> Message:
        values: dict[str, Any] = {
            protocol.RUN_ID: "r-1",
            protocol.SERVER_ROUND: 0 if kind == protocol.REGISTER else 1,
            protocol.TASK: "blobs",
            protocol.STANDARDISE: "federated",
        }
        if kind != protocol.REGISTER:
            values |= {
                protocol.SEED: 42,
                protocol.THREADS: 1,
                protocol.FEATURE_MEAN: [1.5, 1.5],
                protocol.FEATURE_STD: [1.5, 2.0],
            }
        if kind == protocol.TRAIN:
            values[protocol.SETTINGS] = '{"learning-rate": 0.1, "batch-size": 8}'
        values |= {key.replace("_", "-"): value for key, value in changes.items()}
        content = RecordDict(
            {protocol.CONFIG: ConfigRecord({k: v for k, v in values.items() if v is not None})}
        )
        if arrays is not None:
            content[protocol.ARRAYS] = ArrayRecord(
                {k: a if isinstance(a, Array) else Array(a) for k, a in arrays.items()}
            )
        if drop:
            del content[drop]
        metadata = Metadata(
            run_id=1,
            message_id="m",
            src_node_id=0,
            dst_node_id=1,
            reply_to_message_id="",
            group_id="",
            created_at=time.time(),
            ttl=600.0,
            message_type=kind,
        )
        return Message(content, metadata=metadata)

    return build


@pytest.fixture
def graph(task: Task, weights: dict[str, Any]) -> bytes:
    """The network with the weights, in fp32."""
    # Only here, as onnx takes a while to import.
    from fedge.shared.compile import candidates

    return candidates.fp32(task, weights, (2,))


@pytest.fixture
def about(ask: Ask, weights: dict[str, Any], graph: bytes) -> Ask:
    """A request about the final model; keywords as of ``ask``."""

    def build(kind: str, **changes: Any) -> Message:
        section = changes.pop("section", {})
        return ask(
            kind,
            weights,
            **{
                "calibration": json.dumps({"enabled": True, **section}),
                "graph_sha256": hashlib.sha256(graph).hexdigest(),
                **changes,
            },
        )

    return build


@pytest.fixture
def scores(about: Ask, graph: bytes) -> Ask:
    """A request to qualify candidates by plain ranges."""
    from fedge.shared.bundle.manifest_artefacts import ONNX_KINDS
    from fedge.shared.compile import candidates

    def build(kinds: Sequence[str] = ONNX_KINDS, **changes: Any) -> Message:
        names = candidates.tensors(graph)
        known = dict.fromkeys(names, (-8.0, 8.0))
        made = [candidates.derived(kind, graph, known) for kind in kinds]
        return about(
            protocol.QUALIFY,
            **{
                "candidates": list(kinds),
                "candidate_sha256": [hashlib.sha256(data).hexdigest() for data in made],
                "range_low": [-8.0] * len(names),
                "range_high": [8.0] * len(names),
                **changes,
            },
        )

    return build
