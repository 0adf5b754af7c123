"""Whole runs over a network that loses messages and sites; the model must be that of a run that loses nothing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import builders
import pytest
from flwr.app import Message

from fedge.client.app import app as client_app
from fedge.client.data.dataset import site_shares
from fedge.client.relay import message_relay
from fedge.client.relay.message_relay import DirectLink
from fedge.client.worker.handlers import SiteWorker
from fedge.server.runs.directory import RunDirectory, prepare
from fedge.server.runs.listener import NullListener
from fedge.server.training.run import run
from fedge.server.transport.grid_calls import Clock
from fedge.shared import protocol
from fedge.shared.config.federation import Config
from fedge.shared.errors import RunError
from fedge.shared.tasks.registry import get_task
from fedge.simulations.engine import simulate
from fedge.simulations.grid import InProcessGrid

TASK = get_task("breast-cancer")


def config(rounds: int = 3, **round_options: Any) -> Config:
    timed = {"deadline": 120.0, **round_options}
    return builders.config("breast-cancer", run={"rounds": rounds}, sites={"count": 3}, round=timed)


class RecordingListener(NullListener):
    def __init__(self) -> None:
        self.disconnected_sites: list[tuple[int, str]] = []
        self.reconnected_sites: list[tuple[int, str]] = []
        self.phases: list[tuple[int, str]] = []
        self.rounds: list[int] = []

    def disconnected(self, server_round: int, site: str, seconds: float) -> None:
        self.disconnected_sites.append((server_round, site))

    def reconnected(self, server_round: int, site: str, seconds: float) -> None:
        self.reconnected_sites.append((server_round, site))

    def waiting(self, server_round: int, phase: str, sites: Any, seconds: float) -> None:
        self.phases.append((server_round, phase))

    def round(self, line: dict[str, Any]) -> None:
        self.rounds.append(line["round"])


@contextmanager
def connected(given: Config, directory: RunDirectory) -> Iterator[list[str]]:
    shares = site_shares(given, TASK)
    for site, data in shares.items():
        message_relay.connect(
            site, DirectLink(SiteWorker(site, TASK, data, directory.sites / site))
        )
    try:
        yield list(shares)
    finally:
        for site in shares:
            message_relay.disconnect(site)


class Scene:
    """A run whose sites are real and whose network is scripted."""

    def __init__(self, path: Path, given: Config, superlink: Any, time: Any) -> None:
        self.config, self.time, self.recording = given, time, RecordingListener()
        self.directory, _ = prepare(path, given, resume=True)
        self.inner = InProcessGrid({n: f"site-{n}" for n in (1, 2, 3)}, client_app, 7)
        self.grid = superlink(time, self.answer, [1, 2, 3])
        self.numbers = itertools.count()
        self.begun: dict[tuple[int, int], float] = {}

    def answer(self, message: Message) -> Message | None:
        config = message.content.config_records["config"]
        if message.metadata.message_type == protocol.PROBE:
            return Message(message.content, reply_to=message)
        self.on_work(message.metadata.dst_node_id, int(str(config["server-round"])), message)
        number = message.metadata.message_id
        (inner,) = self.inner.push_messages([message])
        (reply,) = self.inner.pull_messages([inner])
        reply.metadata.__dict__["_reply_to_message_id"] = number
        message.metadata.__dict__["_message_id"] = number
        return reply

    def on_work(self, node: int, server_round: int, message: Message) -> None:
        """What happens when a site begins to work on a request."""

    def play(self) -> list[dict[str, Any]]:
        with connected(self.config, self.directory):
            clock = Clock(self.time.now, self.time.sleep)
            run(self.grid, self.directory, 7, self.recording, clock=clock)
        return self.lines()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(x) for x in self.directory.rounds.read_text().splitlines()]

    def model(self) -> bytes:
        return self.directory.model.read_bytes()


@pytest.fixture
def scene(tmp_path: Path, superlink: Any, fake_time: Any) -> Any:
    return lambda given, name="run": Scene(tmp_path / name, given, superlink, fake_time)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = simulate(config(), tmp_path_factory.mktemp("whole") / "run")
    return out.model.read_bytes()


@pytest.mark.slow
def test_lost_messages_and_a_restart_leave_the_models_bytes_as_they_are(
    scene: Any, undisturbed: bytes
):
    network = scene(config())
    seen: set[tuple[int, str]] = set()

    def first(message: Message) -> bool:
        key = (message.metadata.dst_node_id, message.metadata.message_type)
        lost = key in {(1, "train"), (2, "evaluate"), (3, "query.register")} and key not in seen
        seen.add(key)
        return lost

    network.grid.lose = first
    second: list[Message] = []

    def of_round_two(message: Message) -> bool:
        meta = message.metadata
        if (meta.group_id, meta.dst_node_id, meta.message_type) != ("2", 3, "train") or second:
            return False
        second.append(message)
        return True

    network.grid.lose_reply = of_round_two
    lines = network.play()
    assert network.model() == undisturbed
    assert all(line["trained"] == ["site-1", "site-2", "site-3"] for line in lines)
    assert all(line["rejected"] == [] for line in lines), "what we repeat is no duplicate"


@pytest.mark.slow
def test_a_host_that_is_back_within_the_deadline_costs_nothing(
    scene: Any, undisturbed: bytes, fake_time: Any
):
    network = scene(config(deadline=600.0))
    network.grid.down[2] = [(fake_time.now() + 4.0, fake_time.now() + 150.0)]
    lines = network.play()
    assert network.model() == undisturbed
    assert (
        len(network.recording.disconnected_sites) == len(network.recording.reconnected_sites) == 1
    )
    assert lines[0]["rejected"] == []


@pytest.mark.slow
def test_a_host_that_dropped_out_is_not_invited_again_until_it_is_back(scene: Any, fake_time: Any):
    network = scene(config(rounds=6))
    network.grid.down[2] = [(fake_time.now() + 4.0, fake_time.now() + 180.0)]
    network.grid.work = 20.0
    lines = network.play()
    assert lines[0]["invited"] == ["site-1", "site-2", "site-3"]
    (rejection,) = [r for r in lines[0]["rejected"] if r["site"] == "site-2"]
    assert rejection["code"] == "FE-409"
    assert rejection["reason"].startswith("not connected for ")
    without_site = [line for line in lines if "site-2" not in line["invited"]]
    assert without_site
    for line in without_site:
        (rejection,) = line["rejected"]
        assert rejection["reason"].startswith("not invited: not connected for ")
        assert line["seconds"] < 60
    assert "site-2" in lines[-1]["trained"]
    assert (
        [s for _, s in network.recording.disconnected_sites]
        == [s for _, s in network.recording.reconnected_sites]
        == ["site-2"]
    )


@pytest.mark.slow
def test_a_connected_site_that_times_out_is_reported_as_such_and_invited_again(scene: Any):
    network = scene(config(rounds=2))
    network.grid.lose = lambda m: (
        m.metadata.dst_node_id == 2 and m.metadata.message_type != (protocol.REGISTER)
    )
    lines = network.play()
    assert [line["invited"] for line in lines] == [["site-1", "site-2", "site-3"]] * 2
    reasons = {r["reason"] for line in lines for r in line["rejected"]}
    assert reasons == {"connected, but no reply within 120 s"}


@pytest.mark.slow
def test_a_late_joiner_takes_part_from_the_next_round(scene: Any, fake_time: Any):
    network = scene(config(rounds=4, deadline=60.0))
    network.grid.since[3] = fake_time.now() + 61.0
    network.grid.work = 40.0
    lines = network.play()
    assert lines[0]["invited"] == ["site-1", "site-2"]
    assert lines[-1]["trained"] == ["site-1", "site-2", "site-3"]
    assert (0, "connect") in network.recording.phases
    run_json = json.loads(network.directory.run.read_text())
    assert list(run_json["sites"]) == ["site-1", "site-2", "site-3"]


def test_a_node_that_times_out_does_not_delay_the_registration(scene: Any, fake_time: Any):
    network = scene(config(rounds=1, deadline=600.0))
    network.grid.lose = lambda m: m.metadata.dst_node_id == 3
    began = fake_time.now()
    lines = network.play()
    assert lines[0]["invited"] == ["site-1", "site-2"]
    assert {r["reason"] for r in lines[0]["rejected"]} >= {
        "connected, but no answer to the registration"
    }
    assert fake_time.now() - began < 170


def test_a_site_whose_answer_takes_longer_than_a_minute_has_more_time_when_asked_again(scene: Any):
    network = scene(config(rounds=1, deadline=240.0))
    first: list[Message] = []

    def slower(message: Message) -> float:
        if (message.metadata.dst_node_id, message.metadata.message_type) != (3, "query.register"):
            return 0.0
        first.append(message)
        return 95.0 if len(first) == 1 else 45.0

    network.grid.slower = slower
    (line,) = network.play()
    assert line["trained"] == ["site-1", "site-2", "site-3"]
    assert len(first) == 2


@pytest.mark.slow
def test_an_outage_of_the_superlink_between_two_rounds_is_reported(scene: Any, fake_time: Any):
    network = scene(config())
    record_round = network.recording.round

    def fail(line: dict[str, Any]) -> None:
        record_round(line)
        now = fake_time.now()
        network.grid.failing = [(now, now + 40.0, ConnectionRefusedError("refused"))]

    network.recording.round = fail
    lines = network.play()
    assert [line["outcome"] for line in lines] == ["committed"] * 3
    assert network.recording.phases.count((2, "superlink")) >= 2


def test_502_names_what_is_known_of_each_required_site(scene: Any, fake_time: Any):
    network = scene(config(**{"deadline": 30.0, "require-sites": ["site-3", "elsewhere"]}))
    network.grid.since[3] = 1e12
    with pytest.raises(RunError) as stopped:
        network.play()
    assert stopped.value.code == 502
    assert "elsewhere (never registered)" in stopped.value.message
    assert "site-3 (never registered)" in stopped.value.message


def test_502_a_required_site_that_is_disconnected_is_reported_with_the_time(
    scene: Any, fake_time: Any
):
    network = scene(config(**{"require-sites": ["site-2"]}))
    network.grid.down[2] = [(fake_time.now() + 4.0, 1e12)]
    with pytest.raises(RunError, match="not connected for") as stopped:
        network.play()
    assert stopped.value.code == 502


@pytest.mark.slow
def test_a_whole_network_that_is_down_is_waited_for(scene: Any, fake_time: Any):
    network = scene(config(rounds=3, **{"max-skipped": 2}))
    now = fake_time.now()
    network.grid.down = {n: [(now + 4.0, now + 200.0)] for n in (1, 2, 3)}
    lines = network.play()
    assert lines[0]["outcome"] == "skipped"
    assert lines[-1]["outcome"] == "committed"
    assert (2, "connect") in network.recording.phases
