"""The ServerApp as Flower runs it: a Grid, a Context that names the run directory, real sites."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from builders import config
from flwr.app import Context, RecordDict

from fedge.client.app import app as client_app
from fedge.client.data.dataset import site_shares
from fedge.client.relay import message_relay
from fedge.client.relay.message_relay import DirectLink
from fedge.client.worker.handlers import SiteWorker
from fedge.server.app import app
from fedge.server.runs import listener
from fedge.server.runs.directory import RunDirectory, prepare, state_of
from fedge.server.runs.journal import Journal
from fedge.shared.errors import ConfigError, RunError
from fedge.shared.tasks.registry import get_task
from fedge.simulations.grid import InProcessGrid

CONFIG = config("breast-cancer", sites={"count": 3})


class RecordingListener(listener.NullListener):
    def __init__(self) -> None:
        self.starts: list[tuple[int, int]] = []
        self.sites: list[tuple[int, str]] = []
        self.rounds: list[int] = []

    def start(self, total_rounds: int, done: int = 0) -> None:
        self.starts.append((total_rounds, done))

    def site(self, server_round: int, site: str, done: int, total: int) -> None:
        assert 1 <= done <= total
        self.sites.append((server_round, site))

    def round(self, line: dict[str, Any]) -> None:
        self.rounds.append(line["round"])


def serve(directory: RunDirectory, flower_run: int) -> None:
    shares = site_shares(CONFIG, get_task("breast-cancer"))
    for site, data in shares.items():
        worker = SiteWorker(site, get_task("breast-cancer"), data, directory.sites / site)
        message_relay.connect(site, DirectLink(worker))
    try:
        grid = InProcessGrid(dict(enumerate(shares, start=1)), client_app, flower_run)
        app(grid, Context(flower_run, 0, {}, RecordDict(), {"run-dir": str(directory.path)}))
    finally:
        for site in shares:
            message_relay.disconnect(site)


@pytest.mark.slow
def test_it_plays_the_run_of_its_directory_and_reports_to_the_listener(tmp_path: Path):
    directory, _ = prepare(tmp_path / "run", CONFIG, resume=False)
    recording = RecordingListener()
    with listener.listening(recording):
        serve(directory, 501)
    assert recording.starts == [(2, 0)]
    assert recording.rounds == [1, 2]
    sites = ["site-1", "site-2", "site-3"]
    assert recording.sites == [(r, s) for r in (1, 1, 2, 2) for s in sites], "train, then evaluate"
    assert json.loads(directory.run.read_text())["state"] == "finished"

    # Another Flower run on the finished directory changes nothing, and plays nothing.
    before = directory.model.stat().st_mtime_ns
    again = RecordingListener()
    with listener.listening(again):
        serve(directory, 502)
    assert again.rounds == []
    assert directory.model.stat().st_mtime_ns == before
    journal = Journal(directory.journal)
    assert journal.flower_runs() == ["501"]
    journal.close()


def test_without_a_run_directory_it_refuses(tmp_path: Path):
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError) as refused:
        serve(RunDirectory(tmp_path / "run"), 501)
    assert refused.value.code == 209


def test_there_is_no_listener_outside_the_block():
    recording = RecordingListener()
    with listener.listening(recording):
        assert listener.current() is recording
        with listener.listening(listener.NullListener()):
            assert listener.current() is not recording
        assert listener.current() is recording
    assert listener.current() is None


def _serve_alone(directory: RunDirectory) -> None:
    grid = InProcessGrid({}, client_app, 501)
    app(grid, Context(501, 0, {}, RecordDict(), {"run-dir": str(directory.path)}))


@pytest.mark.slow
def test_without_a_listener_the_events_go_to_a_file(tmp_path: Path):
    directory, _ = prepare(tmp_path / "run", CONFIG, resume=False)
    serve(directory, 501)
    events = [json.loads(x) for x in (directory.path / "events.jsonl").read_text().splitlines()]
    assert events[0]["event"] == "start"
    assert [e["line"]["round"] for e in events if e["event"] == "round"] == [1, 2]
    assert not directory.stopped.exists()
    assert state_of(directory.path) == "finished"


def test_a_run_that_stops_says_why_and_the_error_goes_out(tmp_path: Path):
    quick = CONFIG.model_copy(update={"round": CONFIG.round.model_copy(update={"deadline": 0.1})})
    directory, _ = prepare(tmp_path / "run", quick, resume=False)
    with pytest.raises(RunError) as stopped:
        _serve_alone(directory)
    assert stopped.value.code == 501
    stopped_json = json.loads(directory.stopped.read_text())
    assert stopped_json["code"] == "FE-501"
    assert stopped_json["message"] == stopped.value.message
    assert state_of(directory.path) == "stopped"
    prepare(directory.path, quick, resume=True)
    assert state_of(directory.path) == "unfinished"


def test_a_directory_that_is_missing_is_refused_and_not_made(tmp_path: Path):
    with pytest.raises(ConfigError) as refused:
        _serve_alone(RunDirectory(tmp_path / "run"))
    assert refused.value.code == 209
    assert not (tmp_path / "run").exists()


def test_sigterm_ends_a_run_as_an_interrupt_does(tmp_path: Path):
    class Ended(listener.NullListener):
        def round(self, line: dict[str, Any]) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    directory, _ = prepare(tmp_path / "run", CONFIG, resume=False)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), listener.listening(Ended()):
            serve(directory, 501)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not directory.stopped.exists()
    assert state_of(directory.path) == "unfinished"
