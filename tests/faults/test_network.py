"""A bad line between one site and the server: progress or a typed error within 120 s, always."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from . import wide_task
from .deployment import LOST, SILENCE, Deployment, Told
from .proxy import FaultProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONFIG = """
[task]
name = "{task}"
[run]
rounds = {rounds}
evaluate-every = 1000
[data]
partition = "iid"
[sites]
count = 2
[train]
local-steps = 3
batch-size = 32
[round]
deadline = {deadline}
min-sites = 1
max-skipped = 1000
"""
#: How a site that is connected may miss a deadline.
NOT_COMPLETE = ("connected, but its reply was not complete", "connected, but no reply within")


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path / "d", wide_task.write(tmp_path / "packages")) as found:
        yield found


def submit(
    deployment: Deployment,
    proxy: FaultProxy,
    *,
    rounds: int,
    deadline: float,
    task: str = "breast-cancer",
) -> Told:
    """A run over a site near by, and one behind the proxy."""
    deployment.admit("near", task=task)
    deployment.admit("far", dial=proxy.port, task=task)
    deployment.start("server", "near", "far")
    return Told(
        deployment.submit(CONFIG.format(task=task, rounds=rounds, deadline=deadline)),
    )


def test_latency_of_2_s(deployment: Deployment) -> None:
    with FaultProxy(("127.0.0.1", deployment.port), latency=2.0) as proxy:
        told = submit(deployment, proxy, rounds=1, deadline=240)
        deployment.wait(told.over, 420, "the end of the run")
        assert told.state() == "finished", deployment.tails()
        assert [line["trained"] for line in told.rounds()] == [["far", "near"]]
        assert told.longest_silence() < SILENCE
        assert not any(e["phase"] == "superlink" for e in told.events("waiting"))


def test_a_reset_every_5_s(deployment: Deployment) -> None:
    with FaultProxy(("127.0.0.1", deployment.port), reset_every=5.0) as proxy:
        told = submit(deployment, proxy, rounds=3, deadline=240)
        deployment.wait(told.over, 420, "the end of the run")
        assert told.state() == "finished", deployment.tails()
        assert [line["trained"] for line in told.rounds()] == [["far", "near"]] * 3
        assert told.longest_silence() < SILENCE
        assert proxy.resets > 0


def test_4_mbit_a_second_and_a_model_of_9_mb(deployment: Deployment) -> None:
    with FaultProxy(("127.0.0.1", deployment.port), bandwidth=4e6) as proxy:
        told = submit(deployment, proxy, rounds=1, deadline=300, task="wide")
        deployment.wait(told.over, 420, "the end of the run")
        assert told.state() == "finished", deployment.tails()
        assert [line["trained"] for line in told.rounds()] == [["far", "near"]]
        assert told.longest_silence() < SILENCE
        size = 4 * wide_task.PARAMETERS
        assert proxy.delivered["up"] > size
        assert proxy.delivered["down"] > 2 * size
        # Large requests go out one by one, and each is told.
        sent = [(e["done"], e["total"]) for e in told.events("sent", "")]
        assert sent == [(1, 2), (2, 2)] * 2


def test_a_line_that_goes_silent_is_told_within_75_s_and_the_round_closes(
    deployment: Deployment,
) -> None:
    with FaultProxy(("127.0.0.1", deployment.port)) as proxy:
        told = submit(deployment, proxy, rounds=1000, deadline=80)
        deployment.wait(lambda: len(told.rounds()) >= 1, 120, "round 1")
        proxy.half_open = True
        since = told.events()[-1]["at"]
        deployment.wait(lambda: told.events("lost", "far"), 100, "the word that the site is lost")
        assert told.events("lost", "far")[0]["at"] - since <= LOST

        def without() -> list[str]:
            return [r["reason"] for line in told.rounds() for r in told.refused(line, "far")]

        deployment.wait(without, 100, "a round without the site")
        assert without()[0].startswith("not connected for ")
        proxy.half_open = False
        proxy.reset()
        before = len(told.rounds())
        deployment.wait(
            lambda: any("far" in line["trained"] for line in told.rounds()[before:]),
            100,
            "the site's return",
        )
        assert told.longest_silence() < SILENCE
