"""The operator's commands on a server's home: created once, shown as text and JSON, safe against hostile names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from fedge.server.deployment import certificates, operations, server_config
from fedge.server.runs import results
from fedge.server.runs.directory import RunDirectory, state_of
from fedge.server.runs.journal import Journal
from fedge.shared.cli.main import main
from fedge.shared.daemon import home as homes
from fedge.shared.daemon.process import Program
from fedge.shared.daemon.supervisor import Service, Supervisor
from fedge.shared.errors import FedgeError, RunError
from fedge.shared.tasks.registry import get_task

CONFIG = '[task]\nname = "digits"\n[run]\nrounds = 3\n[sites]\ncount = 2\n'


def code_of(call: Any, *arguments: Any) -> int:
    with pytest.raises(FedgeError) as caught:
        call(*arguments)
    return caught.value.code


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("template") / "home"
    operations.init(home, "127.0.0.1:8443")
    return home


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Path:
    """A server's home, made once a module."""
    return Path(shutil.copytree(template, tmp_path / "home"))


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def test_init_makes_a_home_for_its_owner_alone(tmp_path: Path) -> None:
    home = tmp_path / "deep" / "home"
    said = operations.init(home, "127.0.0.1:8443")
    assert home.stat().st_mode & 0o777 == 0o700
    assert certificates.key_path(home).stat().st_mode & 0o077 == 0
    assert str(certificates.authority_path(home)) in said
    assert "127.0.0.1:8443, front none" in said
    assert server_config.load(home).server.address == "127.0.0.1:8443"


def test_init_twice_changes_nothing(home: Path) -> None:
    before = {path: path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert code_of(operations.init, home, "127.0.0.1:9999") == 903
    assert {path: path.read_bytes() for path in home.rglob("*") if path.is_file()} == before


def test_an_init_that_was_killed_goes_on_with_the_same_authority(home: Path) -> None:
    # server.toml comes last, so this is what a kill leaves.
    (home / server_config.NAME).unlink()
    authority = certificates.authority_path(home).read_bytes()
    operations.init(home, "127.0.0.1:8443")
    assert certificates.authority_path(home).read_bytes() == authority
    assert operations.status(home)["certificate"]["problem"] is None


def test_init_refuses_what_would_be_open_and_leaves_no_home(tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert code_of(operations.init, home, "fed.example.org:8443", None, "none") == 904
    assert code_of(operations.init, home, "fed.example.org", None, None) == 904
    assert not (home / server_config.NAME).exists()
    (tmp_path / "file").touch()
    assert code_of(operations.init, tmp_path / "file" / "home", "127.0.0.1:1") == 901


def test_submit_refuses_what_no_site_could_learn(home: Path, config: Path) -> None:
    secure = ["secure-aggregation.enabled=true", "secure-aggregation.min-sites=3", "sites.count=5"]
    sections = ["privacy.mechanism=distributed", "round.min-sites=3"]
    for little in ("0.001", "1"):
        made = [*secure, *sections, f"privacy.noise-multiplier={little}"]
        if little == "1":
            assert operations.submit(home, config, made, "fits") == "fits"
        else:
            assert code_of(operations.submit, home, config, made, "unfit") == 211
    assert [path.name for path in (home / "runs").iterdir()] == ["fits"]


def test_submit_refuses_what_no_release_could_export(
    home: Path, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10).bfloat16())

    own = replace(get_task("digits"), network=network)
    monkeypatch.setattr(operations, "get_task", lambda _: own)
    with pytest.raises(FedgeError, match="1.weight must be of a type that arrays have") as caught:
        operations.submit(home, config, (), "own")
    assert caught.value.code == 305
    assert not list((home / "runs").glob("*"))


def test_submit_queues_a_run(home: Path, config: Path) -> None:
    name = operations.submit(home, config, ["run.rounds=5"])
    (told,) = operations.runs(home)
    assert (told["name"], told["state"], told["rounds_done"]) == (name, "unfinished", 0)
    assert RunDirectory(home / "runs" / name).load_config().run.rounds == 5
    other = operations.submit(home, config, (), "second-run")
    assert [run["name"] for run in operations.runs(home)] == sorted([name, other])
    # A name that is taken is refused; the run that has it stays.
    assert code_of(operations.submit, home, config, (), "second-run") == 206


NO_NAMES = ["../x", "..", ".", "", "a/b", "/etc", "a\nb", "x" * 200, "-rf", ".hidden", "ü"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_a_name_leads_nowhere_else(home: Path, config: Path, name: str) -> None:
    (home / "x").mkdir()
    (home / "x" / "config.toml").write_text(CONFIG)
    if name:  # none given is no name that was given
        assert code_of(operations.submit, home, config, (), name) == 914
        assert operations.runs(home) == []
    assert code_of(operations.stop, home, name) == 914
    assert code_of(operations.resume, home, name) == 914
    assert not (home / "x" / "stop").exists()


def test_stop_asks_a_run_that_is_not_over(home: Path, config: Path) -> None:
    operations.submit(home, config, (), "one")
    run = home / "runs" / "one"
    operations.stop(home, "one")
    assert (run / "stop").exists()
    (run / "stop").unlink()
    results.stop(RunDirectory(run), RunError(508, "stopped by its operator"))
    operations.stop(home, "one")
    assert not (run / "stop").exists()
    assert code_of(operations.stop, home, "none-such") == 914


def test_resume_lets_a_stopped_run_go_on(home: Path, config: Path) -> None:
    operations.submit(home, config, (), "one")
    run = home / "runs" / "one"
    results.stop(RunDirectory(run), RunError(508, "stopped by its operator"))
    assert state_of(run) == "stopped"
    (told,) = operations.runs(home)
    assert told["stopped"]["code"] == "FE-508"
    operations.resume(home, "one")
    assert state_of(run) == "unfinished"
    assert operations.runs(home)[0]["stopped"] is None


@pytest.mark.parametrize(
    ("played", "counted", "over"), [(3, 0, True), (2, 0, False), (3, 1, False)]
)
def test_a_run_without_a_round_left_and_without_a_model_is_over(
    home: Path, config: Path, played: int, counted: int, over: bool
) -> None:
    operations.submit(home, config, (), "one")
    run = RunDirectory(home / "runs" / "one")
    journal = Journal(run.journal)
    results.begin(journal, run)
    journal.close()
    site = {"train_examples": 1, "test_examples": 1, "rounds": counted}
    told = {"rounds": 3, "rounds_done": played, "sites": {"a": site}, "state": "running"}
    run.write_json(run.run, told)
    results.stop(run, RunError(503, "round 3: must make a model"))
    (found,) = operations.runs(home)
    assert found["over"] is over
    text = operations.status_text(operations.status(home))
    assert ("submit a new one" in text) is over
    assert ("fedge server resume one" in text) is not over
    assert ("it writes the model" in text) is (played == 3 and not over)
    if over:
        assert code_of(operations.resume, home, "one") == 503
        assert state_of(run.path) == "stopped"
    else:
        assert operations.resume(home, "one") == "one goes on"


def test_a_run_asked_to_stop_and_resumed_before_the_server_saw_it_goes_on(
    home: Path, config: Path
) -> None:
    operations.submit(home, config, (), "one")
    operations.stop(home, "one")
    operations.resume(home, "one")
    assert not (home / "runs" / "one" / "stop").exists()


@pytest.mark.parametrize("call", [operations.runs, operations.status, operations.stop])
def test_a_folder_that_is_no_home(tmp_path: Path, call: Any) -> None:
    assert code_of(call, tmp_path) == 901


def test_status_without_a_daemon(home: Path, config: Path) -> None:
    operations.submit(home, config, (), "one")
    # What a dead daemon said of its processes is no news.
    (home / "status.json").write_text(json.dumps({"services": {"superlink": {"state": "ready"}}}))
    found = operations.status(home)
    assert found["running"] is False
    assert found["services"] == {}
    assert found["certificate"]["days_left"] > 30
    json.dumps(found)
    text = operations.status_text(found)
    assert "server       not running, 127.0.0.1:8443" in text
    assert "certificate  good for" in text
    assert "one " in text
    assert "queued" in text
    assert code_of(operations.stop, home) == 911


def test_status_with_a_daemon_and_stop_ends_it(home: Path) -> None:
    """A real daemon of this home, which keeps one process."""

    def daemon() -> int:
        with homes.lock(home):
            supervisor = Supervisor(home)
            supervisor.facts["sites"] = {"clinic-a": {"state": "online", "since": None}}
            program = Program("sleep", home / "log" / "sleep.log", command=("sleep", "60"))
            supervisor.add(Service("superlink", lambda: program))
            supervisor.run()
        return 0

    pid = os.fork()
    if not pid:
        try:
            os._exit(daemon())
        except BaseException:
            os._exit(1)

    def ready() -> bool:
        services = operations.status(home)["services"]
        return bool(services and services["superlink"]["state"] == "ready")

    until = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < until
        time.sleep(0.05)
    text = operations.status_text(operations.status(home))
    assert "server       running" in text
    assert "superlink    ready, pid" in text
    assert "clinic-a                 online" in text
    # The daemon is a child of this process here, so somebody must collect it while it is waited for.
    threading.Thread(target=os.waitpid, args=(pid, 0)).start()
    operations.stop(home)
    assert operations.status(home)["running"] is False


def test_a_certificate_that_is_not_usable_is_said_not_raised(home: Path) -> None:
    certificates.certificate_path(home).write_text("nonsense")
    found = operations.status(home)
    assert found["certificate"]["days_left"] is None
    assert "FE-907" in operations.status_text(found)


def test_what_lies_among_the_runs_and_is_none(home: Path, config: Path) -> None:
    operations.submit(home, config, (), "one")
    (home / "runs" / "note.txt").write_text("a file")
    (home / "runs" / "empty").mkdir()
    (home / "runs" / "damaged").mkdir()
    (home / "runs" / "damaged" / "config.toml").write_text(CONFIG)
    (home / "runs" / "damaged" / "run.json").write_text("[" * 10_000)
    states = {run["name"]: run["state"] for run in operations.runs(home)}
    assert states["one"] == states["damaged"] == "unfinished"
    assert states["empty"] == "none"
    operations.runs_text(operations.runs(home))


def test_runs_as_people_read_them() -> None:
    assert operations.runs_text([]) == "no runs"
    base = {
        "name": "one",
        "task": "digits",
        "rounds": 12,
        "rounds_done": 3,
        "stopped": None,
        "begun": True,
    }
    told = [
        base | {"state": "unfinished"},
        base | {"name": "two", "state": "unfinished", "task": None, "rounds": None, "begun": False},
        base | {"name": "four", "state": "unfinished", "task": None, "rounds": None},
        base | {"name": "three", "state": "stopped", "stopped": {"code": "FE-509"}},
    ]
    head, one, two, four, three = operations.runs_text(told).splitlines()
    assert head.split() == ["run", "state", "rounds", "task"]
    assert one.split() == ["one", "unfinished", "3/12", "digits"]
    assert two.split() == ["two", "queued", "3/?"]
    assert four.split() == ["four", "gathering", "3/?"]
    assert three.split() == ["three", "stopped", "3/12", "digits", "FE-509"]


def test_a_long_message_is_cut_between_words() -> None:
    run = {"name": "one", "state": "stopped", "task": "digits", "rounds": 2, "rounds_done": 1}
    message = "got 0: " + "reported FE-418 " * 40
    text = operations.runs_text([run | {"stopped": {"code": "FE-501", "message": message}}])
    told = text.splitlines()[2]
    assert told.endswith(" …")
    assert len(told) <= 302
    assert told.split()[-2] in ("reported", "FE-418")


def test_the_commands_print_text_and_json(
    home: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str, status: int = 0) -> str:
        assert main(["server", *words, "--home", str(home)]) == status
        return capsys.readouterr().out

    assert json.loads(said("submit", str(config), "--name", "one", "--json")) == {"run": "one"}
    assert said("submit", str(config), "--name", "two") == "two\n"
    assert [run["name"] for run in json.loads(said("runs", "--json"))] == ["one", "two"]
    # A monitor sees from the exit status alone that the server is down.
    assert json.loads(said("status", "--json", status=1))["running"] is False
    assert "not running" in said("status", status=1)
    assert said("stop", "one") == "one stops after what it is doing\n"
    assert main(["server", "stop", "../x", "--home", str(home)]) == 1
    assert capsys.readouterr().err.startswith("FE-914")


@pytest.mark.slow
def test_a_look_at_a_server_does_not_wait_for_torch(home: Path) -> None:
    code = (
        "import sys; from fedge.shared.cli.main import main; main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules"
    )
    for word in ("runs", "status"):
        done = subprocess.run(
            [sys.executable, "-c", code, "server", word, "--home", str(home)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
