"""A bad line between one site and the server: progress or a typed error within 120 s, always.

Every scene has a federation of its own; as they wait more than they work, all are played at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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


#: Seconds between the beginnings of two scenes: their processes shall not all start at once.
APART = 20.0


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


def latency_of_2_s(deployment: Deployment) -> None:
    with FaultProxy(("127.0.0.1", deployment.port), latency=2.0) as proxy:
        told = submit(deployment, proxy, rounds=1, deadline=240)
        deployment.wait(told.over, 420, "the end of the run")
        assert told.state() == "finished", deployment.tails()
        assert [line["trained"] for line in told.rounds()] == [["far", "near"]]
        assert told.longest_silence() < SILENCE
        assert not any(e["phase"] == "superlink" for e in told.events("waiting"))


def a_reset_every_5_s(deployment: Deployment) -> None:
    with FaultProxy(("127.0.0.1", deployment.port), reset_every=5.0) as proxy:
        told = submit(deployment, proxy, rounds=3, deadline=240)
        deployment.wait(told.over, 420, "the end of the run")
        assert told.state() == "finished", deployment.tails()
        assert [line["trained"] for line in told.rounds()] == [["far", "near"]] * 3
        assert told.longest_silence() < SILENCE
        assert proxy.resets > 0


def narrow(deployment: Deployment) -> None:
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


def goes_silent(deployment: Deployment) -> None:
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


SCENES: dict[str, Callable[[Deployment], None]] = {
    "test_latency_of_2_s": latency_of_2_s,
    "test_4_mbit_a_second_and_a_model_of_9_mb": narrow,
    "test_a_line_that_goes_silent_is_told_within_75_s_and_the_round_closes": goes_silent,
    "test_a_reset_every_5_s": a_reset_every_5_s,
}


def play(scene: Callable[[Deployment], None], folder: Path, wait: float) -> None:
    time.sleep(wait)
    with Deployment(folder / "d", wide_task.write(folder / "packages")) as deployment:
        scene(deployment)


@pytest.fixture(scope="module")
def scenes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    """The scenes whose tests are to run, under way."""
    wanted = [name for name in SCENES if name in {item.name for item in request.session.items}]
    with ThreadPoolExecutor(len(SCENES)) as pool:
        yield {
            name: pool.submit(play, SCENES[name], tmp_path_factory.mktemp(name[:20]), i * APART)
            for i, name in enumerate(wanted)
        }


def test_latency_of_2_s(scenes: dict[str, Future[None]]) -> None:
    scenes["test_latency_of_2_s"].result()


def test_a_reset_every_5_s(scenes: dict[str, Future[None]]) -> None:
    scenes["test_a_reset_every_5_s"].result()


def test_4_mbit_a_second_and_a_model_of_9_mb(scenes: dict[str, Future[None]]) -> None:
    scenes["test_4_mbit_a_second_and_a_model_of_9_mb"].result()


def test_a_line_that_goes_silent_is_told_within_75_s_and_the_round_closes(
    scenes: dict[str, Future[None]],
) -> None:
    scenes["test_a_line_that_goes_silent_is_told_within_75_s_and_the_round_closes"].result()
