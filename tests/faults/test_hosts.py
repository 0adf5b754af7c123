"""A site's whole host dies, the SuperLink is away, a line is too slow for Flower: all in words, nothing for ever.

Every scene has a federation of its own; as they wait more than they work, all are played at once.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from .deployment import LOST, SILENCE, Deployment, Told
from .proxy import FaultProxy
from .scenes import playing

pytestmark = [pytest.mark.soak, pytest.mark.realtime, pytest.mark.timeout(1800)]

CONFIG = """
[task]
name = "breast-cancer"
[run]
rounds = {rounds}
evaluate-every = 1000
[data]
partition = "iid"
[sites]
count = {sites}
[train]
local-steps = 3
[round]
deadline = {deadline}
min-sites = 1
max-skipped = 1000
"""


def host_dies(deployment: Deployment) -> None:
    for name in ("one", "two"):
        deployment.admit(name)
    deployment.start("server", "one", "two")
    deadline = 80.0
    told = Told(deployment.submit(CONFIG.format(rounds=1000, sites=2, deadline=deadline)))
    deployment.wait(lambda: len(told.rounds()) >= 1, 120, "round 1")
    killed = deployment.kill_host("two")
    deployment.wait(lambda: told.events("lost", "two"), 100, "the word that the host is lost")
    assert told.events("lost", "two")[0]["at"] - killed <= LOST

    def closed() -> list[dict[str, object]]:
        return [line for line in told.rounds() if told.refused(line, "two")]

    deployment.wait(lambda: len(closed()) >= 2, 60 + deadline, "two rounds without the host")
    first, second = closed()[:2]
    (why,) = told.refused(first, "two")
    assert (why["code"], why["outcome"]) == ("FE-409", "absent")
    assert why["reason"].startswith("not connected for ")
    assert first["trained"] == ["one"]
    assert float(str(first["seconds"])) < deadline + 15
    assert second["invited"] == ["one"], "who let a deadline pass and is away is not waited for"
    assert float(str(second["seconds"])) < 30
    assert "not invited" in told.refused(second, "two")[0]["reason"]

    before = len(told.rounds())
    deployment.start("two")
    deployment.wait(
        lambda: any("two" in line["trained"] for line in told.rounds()[before:]),
        90,
        "the host's return",
    )
    assert told.events("back", "two")
    assert told.longest_silence() < SILENCE


def superlink_is_away(deployment: Deployment) -> None:
    deployment.admit("one")
    deployment.start("server", "one")
    told = Told(deployment.submit(CONFIG.format(rounds=1000, sites=1, deadline=120)))
    deployment.wait(lambda: len(told.rounds()) >= 1, 120, "round 1")
    # Its supervisor sleeps, so nobody starts it again. Flower may count the coordinator as dead by then and stop its
    # Flower run: then another continues the same run of fedge.
    deployment.daemons["server"].send_signal(signal.SIGSTOP)
    try:
        os.kill(deployment.pids("server")["superlink"], signal.SIGKILL)
        time.sleep(40)
    finally:
        deployment.daemons["server"].send_signal(signal.SIGCONT)
    back, before = time.time(), len(told.rounds())
    assert any(e["phase"] == "superlink" for e in told.events("waiting"))
    deployment.wait(lambda: len(told.rounds()) >= before + 2, 90, "further rounds")
    assert told.rounds()[-1]["trained"] == ["one"]
    assert told.longest_silence() < SILENCE
    assert time.time() - back < 90


def latency_of_20_s(deployment: Deployment) -> None:
    """TLS alone takes 40 s there and Flower's client waits for 30: such a site never connects."""
    with FaultProxy(("127.0.0.1", deployment.port), latency=20.0) as proxy:
        deployment.admit("near")
        deployment.admit("far", dial=proxy.port)
        deployment.start("server", "near", "far")
        told = Told(deployment.submit(CONFIG.format(rounds=1, sites=2, deadline=45)))
        deployment.wait(told.over, 240, "the end of the run")
        assert told.state() == "finished", deployment.tails()
        (line,) = told.rounds()
        assert line["trained"] == ["near"]
        assert told.longest_silence() < SILENCE
        assert proxy.connections > 0
        assert "fedge" in (deployment.folder / "far.log").read_text(encoding="utf-8")


SCENES = {
    "a host that dies is told within 75 s, is not waited for, and takes part again": host_dies,
    "a superlink that is away for 40 s is told, and the run goes on": superlink_is_away,
    "20 s each way leave a site out in words": latency_of_20_s,
}


@pytest.fixture(scope="module")
def scenes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[None]]]:
    with playing(request, SCENES, tmp_path_factory.mktemp) as found:
        yield found


@pytest.mark.parametrize("scene", SCENES)
def test_words_and_an_end(scenes: dict[str, Future[None]], scene: str) -> None:
    scenes[scene].result()
