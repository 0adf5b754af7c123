"""A bad line between one site and the server: progress or a typed error within 120 s, always."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fedge.server.run_directory import state_of

from .deployment import Deployment, events
from .proxy import FaultProxy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = """
[task]
name = "breast-cancer"
[run]
rounds = {rounds}
evaluate-every = 100
[data]
partition = "iid"
[sites]
count = 2
[train]
local-steps = 3
[round]
deadline = {deadline}
min-sites = 1
max-skipped = 100
"""
#: Seconds without a word that nobody has to bear.
SILENCE = 120.0


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path, ["near", "far"]) as found:
        yield found


def longest_silence(run: Path, until: float) -> float:
    """Longest gap between two events of a run, the last one until now, in seconds."""
    told = [datetime.fromisoformat(event["at"]).timestamp() for event in events(run)]
    assert told, "no event at all"
    return max(b - a for a, b in zip(told, [*told[1:], until], strict=True))


def play(
    deployment: Deployment, proxy: FaultProxy, *, rounds: int, deadline: float
) -> tuple[Path, list[dict[str, Any]]]:
    deployment.admit("near")
    deployment.admit("far", dial=proxy.port)
    for name in ("server", "near", "far"):
        deployment.start(name)
    run = deployment.submit(CONFIG.format(rounds=rounds, deadline=deadline))
    return run, []


def lines(run: Path) -> list[dict[str, Any]]:
    path = run / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


BAD_LINES = {
    "latency 2 s": {"latency": 2.0},
    "4 Mbit/s": {"bandwidth": 4e6},
    "a reset every 5 s": {"reset_every": 5.0},
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_run_ends_over_a_bad_line(deployment: Deployment, name: str) -> None:
    with FaultProxy(("127.0.0.1", deployment.port), **BAD_LINES[name]) as proxy:
        run, _ = play(deployment, proxy, rounds=2, deadline=240)
        deployment.wait(lambda: state_of(run) != "unfinished", 400, "the end of the run")
        assert state_of(run) == "finished", deployment.tails()
        assert longest_silence(run, time.time()) < SILENCE
        assert [line["trained"] for line in lines(run)] == [["far", "near"]] * 2
        assert proxy.connections > 0


def test_with_20_s_each_way_every_wait_still_ends_in_words(deployment: Deployment) -> None:
    """Flower's own heartbeats time out after 5 s, so such a site may take part or be absent, but named."""
    with FaultProxy(("127.0.0.1", deployment.port), latency=20.0) as proxy:
        run, _ = play(deployment, proxy, rounds=1, deadline=60)
        deployment.wait(lambda: state_of(run) != "unfinished", 400, "the end of the run")
        assert state_of(run) == "finished", deployment.tails()
        assert longest_silence(run, time.time()) < SILENCE
        (line,) = lines(run)
        named = set(line["trained"]) | {r["site"] for r in line["rejected"]}
        assert "near" in line["trained"]
        assert "far" in named or "far" not in json.loads((run / "run.json").read_text())["sites"]


def test_a_line_that_goes_silent_is_told_within_75_s_and_comes_back(deployment: Deployment) -> None:
    with FaultProxy(("127.0.0.1", deployment.port)) as proxy:
        run, _ = play(deployment, proxy, rounds=40, deadline=100)
        deployment.wait(lambda: len(lines(run)) >= 1, 120, "round 1")
        proxy.half_open = True
        silent_since = time.time()

        def lost() -> list[dict[str, Any]]:
            return [e for e in events(run) if e["event"] == "lost" and e["site"] == "far"]

        deployment.wait(lost, 90, "the word that the site is lost")
        told = datetime.fromisoformat(lost()[0]["at"]).timestamp()
        # Flower counts a node as gone 60 s after its last heartbeat.
        assert told - silent_since <= 75 + 1

        def told_absent() -> bool:
            return any("far" in [r["site"] for r in line["rejected"]] for line in lines(run))

        deployment.wait(told_absent, 150, "a round without the site")
        proxy.half_open = False
        proxy.reset()
        before = len(lines(run))
        deployment.wait(
            lambda: any("far" in line["trained"] for line in lines(run)[before:]),
            180,
            "the site's return",
        )
        assert longest_silence(run, time.time()) < SILENCE
