"""A bad line between one site and the server: progress or a typed error within 120 s, always.

Every scene has a federation of its own; as they wait more than they work, all are played at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from . import wide_task
from .deployment import LOST, SILENCE, Deployment, Told
from .proxy import FaultProxy
from .scenes import playing

pytestmark = [pytest.mark.realtime, pytest.mark.timeout(1800)]

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


SCENES = {
    "latency of 2 s": latency_of_2_s,
    "4 Mbit a second and a model of 9 MB": narrow,
    "goes silent, is told within 75 s, and the round closes": goes_silent,
    "a reset every 5 s": a_reset_every_5_s,
}


@pytest.fixture(scope="module")
def scenes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    with playing(request, SCENES, tmp_path_factory.mktemp, wide_task.write) as found:
        yield found


# What people meet most; the others take minutes.
@pytest.mark.parametrize(
    "scene",
    [
        pytest.param(name, marks=() if scene is a_reset_every_5_s else pytest.mark.soak)
        for name, scene in SCENES.items()
    ],
)
def test_a_bad_line(scenes: dict[str, Future[None]], scene: str) -> None:
    scenes[scene].result()
