"""What the round loop's tests share: a small model, sites that drift, and a list of nodes as a Grid."""

from __future__ import annotations

import gc
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from flwr.serverapp import Grid

from fedge.server.results import Update
from fedge.simulations import flower_private


@pytest.fixture(autouse=True)
def flower_identity() -> None:
    """Messages of the tests are the server's, as within a ServerApp."""
    flower_private.identify(1, 0)


@pytest.fixture(autouse=True)
def heap_set_aside() -> Iterator[None]:
    """As in a run: some of Flower's strategies collect garbage at every tensor, and torch's heap is large."""
    gc.freeze()
    yield
    gc.unfreeze()


class Nodes(Grid):
    """A Grid that knows its nodes; whoever sends over it fails."""

    def __init__(self, count: int) -> None:
        self.count = count

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.count + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        raise NotImplementedError


@pytest.fixture
def nodes() -> Callable[[int], Grid]:
    return Nodes


@pytest.fixture
def model() -> dict[str, np.ndarray[Any, Any]]:
    """A matrix, a vector, a scalar, and a tensor of float64."""
    draw = np.random.default_rng(0)
    return {
        "fc.weight": draw.normal(size=(3, 4)).astype(np.float32),
        "fc.bias": draw.normal(size=3).astype(np.float32),
        "scale": np.asarray(0.75, dtype=np.float32),
        "wide": draw.normal(size=2),
    }


@pytest.fixture
def counted(model: dict[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
    """The model with an integer buffer, as a normalisation layer has."""
    return {**model, "batches": np.asarray(3, dtype=np.int64)}


Sites = Callable[..., tuple[Update, ...]]


@pytest.fixture
def sites() -> Sites:
    """What seven sites of unlike size bring in a round: they drift apart, and together."""

    def bring(
        server_round: int,
        arrays: dict[str, np.ndarray[Any, Any]],
        *,
        count: int = 7,
        control: Container[str] = (),
    ) -> tuple[Update, ...]:
        updates = []
        for i in range(count):
            draw = np.random.default_rng((server_round, i))
            own = {
                k: np.asarray(
                    a + draw.integers(0, 9)
                    if a.dtype.kind == "i"
                    else a + draw.normal(0.3 * server_round, 0.5, a.shape),
                    dtype=a.dtype,
                )
                for k, a in arrays.items()
            }
            own |= {
                f"control/{k}": draw.normal(0.1, 0.2, arrays[k].shape).astype(arrays[k].dtype)
                for k in arrays
                if k in control
            }
            updates.append(Update(f"site-{i + 1}", own, 10 + 7 * i, 0.2 + 0.1 * i))
        return tuple(updates)

    return bring
