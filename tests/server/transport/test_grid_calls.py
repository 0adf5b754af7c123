"""Calls of the grid: which failures are transient, and what happens while a call blocks."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import pytest

from fedge.server.transport.grid_calls import Clock, GridClient, Timeouts, is_transient, no_op
from fedge.shared.errors import RunError
from fedge.simulations.grid import InProcessGrid


def status(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://localhost/v1/runtime/pull-messages")
    return httpx.HTTPStatusError("no", request=request, response=httpx.Response(code))


@pytest.mark.parametrize(
    "error",
    [
        ConnectionRefusedError(), TimeoutError(), BrokenPipeError(), httpx.ReadError("reset"),
        httpx.ConnectTimeout("slow"), status(500), status(502), status(503), status(429),
    ],
)  # fmt: skip
def test_what_a_failing_connection_raises_is_transient(error: Exception):
    assert is_transient(error)


@pytest.mark.parametrize(
    "error",
    [
        status(401), status(403), status(404), status(400), ValueError(), TypeError(), AssertionError(),
        KeyboardInterrupt(), SystemExit(), RunError(501, "x"),
    ],
)  # fmt: skip
def test_what_is_refused_or_wrong_is_not(error: BaseException):
    assert not is_transient(error)


def test_a_grid_of_this_process_is_called_in_this_thread():
    grid_client = GridClient(InProcessGrid({}, None, 1))  # type: ignore[arg-type]
    assert grid_client.direct
    assert grid_client.call("x", threading.get_ident, 0.0, no_op) == threading.get_ident()


@pytest.mark.slow
def test_a_call_that_blocks_is_reported_and_ends_with_a_number(fake_time: Any, superlink: Any):
    grid_client = GridClient(
        superlink(fake_time, lambda m: None, [1]), Clock(fake_time.now), Timeouts(outage=30.0)
    )
    over, ticks = threading.Event(), []

    def tick() -> None:
        ticks.append(fake_time.now())
        fake_time.sleep(12.0)

    try:
        with pytest.raises(RunError, match="list the sites") as stopped:
            grid_client.call("list the sites", lambda: over.wait(30), fake_time.now() + 5.0, tick)
    finally:
        over.set()
    assert stopped.value.code == 501
    assert len(ticks) == 3
    assert grid_client.failing_since is not None


def test_an_outage_is_forgotten_when_it_is_over(fake_time: Any, superlink: Any):
    grid_client = GridClient(
        superlink(fake_time, lambda m: None, [1]), Clock(fake_time.now, fake_time.sleep)
    )
    tries: list[int] = []

    def third() -> int:
        tries.append(1)
        if len(tries) < 3:
            raise ConnectionResetError
        return 7

    assert grid_client.call("x", third, fake_time.now() + 60.0, no_op) == 7
    assert grid_client.failing_since is None
