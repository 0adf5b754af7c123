"""An administrator's commands on a site's home: made once with a narrow policy, and a status that does not flatter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from fedge.client.deployment import node_key, operations
from fedge.client.settings import policy, site_config
from fedge.client.settings.policy import PolicyFile
from fedge.client.worker.handlers import SiteWorker
from fedge.client.worker.socket_server import Service as WorkerService
from fedge.shared.cli.main import main
from fedge.shared.daemon import home as homes
from fedge.shared.daemon import sockets
from fedge.shared.daemon.process import Program
from fedge.shared.daemon.supervisor import Service, Supervisor
from fedge.shared.errors import FedgeError
from fedge.shared.flower import app_bundle
from fedge.shared.privacy.accounting.charges import Budget, Charge
from fedge.shared.privacy.accounting.epsilon import Release
from fedge.shared.privacy.ledger.ledger import FILE, Ledger

HASH = "0f" * 32


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    path = tmp_path / "their-ca.crt"
    path.write_text("a certificate")
    return path


@pytest.fixture
def home(tmp_path: Path, ca: Path) -> Path:
    path = tmp_path / "home"
    operations.init(
        path, "clinic-a", task="digits", server="fed.example.org:8443", ca=ca, bundle=HASH
    )
    return path


def code_of(call: Callable[[], Any]) -> int:
    with pytest.raises(FedgeError) as caught:
        call()
    return caught.value.code


def test_init_makes_a_home_for_its_owner_with_a_narrow_policy(home: Path, ca: Path) -> None:
    assert home.stat().st_mode & 0o777 == 0o700
    assert (home / "site.key").stat().st_mode & 0o077 == 0
    assert (home / "ca.crt").read_bytes() == ca.read_bytes()
    site = site_config.load(home)
    assert (site.site.name, site.site.task) == ("clinic-a", "digits")
    assert site.server.address == "fed.example.org:8443"
    allowed = policy.read(home)
    assert allowed.tasks == ("digits",)
    assert allowed.bundles == (HASH,)
    assert allowed.versions == (version("fedge"),)
    assert allowed.min_cohort == 2


@pytest.mark.slow
def test_init_approves_the_bundle_of_this_release_and_says_so(tmp_path: Path, ca: Path) -> None:
    home = tmp_path / "home"
    said = operations.init(home, "clinic-a", task="digits", server="127.0.0.1:1", ca=ca)
    digest = app_bundle.sha256()
    assert policy.read(home).bundles == (digest,)
    assert digest in said
    assert str(home / node_key.PUBLIC_NAME) in said


def test_init_twice_changes_nothing(home: Path, ca: Path) -> None:
    before = {path: path.read_bytes() for path in home.rglob("*")}
    again = lambda: operations.init(home, "b", task="digits", server="h:1", ca=ca, bundle=HASH)  # noqa: E731
    assert code_of(again) == 903
    assert {path: path.read_bytes() for path in home.rglob("*")} == before


def test_an_init_that_was_killed_goes_on(home: Path, ca: Path) -> None:
    # site.toml comes last, so a kill leaves at most the rest; an administrator may know the key already.
    (home / "site.toml").unlink()
    key = (home / "site.key").read_bytes()
    operations.init(
        home, "clinic-a", task="digits", server="fed.example.org:8443", ca=ca, bundle=HASH
    )
    assert (home / "site.key").read_bytes() == key
    assert site_config.load(home).site.name == "clinic-a"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"server": "fed.example.org"}, 904),
        ({"server": "fed.example.org:0"}, 904),
        ({"ca": Path("none.crt")}, 901),
        ({"name": "../x"}, 201),
        ({"name": 'a"b'}, 201),
        ({"name": ""}, 201),
        ({"bundle": "short"}, 201),
        ({"task": "no-such-task", "bundle": None}, 304),
    ],
)
def test_what_init_refuses(tmp_path: Path, ca: Path, change: dict[str, Any], code: int) -> None:
    given = {"name": "a", "task": "digits", "server": "h:1", "ca": ca, "bundle": HASH} | change
    name = given.pop("name")
    assert code_of(lambda: operations.init(tmp_path / "home", name, **given)) == code
    assert not (tmp_path / "home" / "site.toml").exists()


def test_data_and_share_are_where_they_were_said_to_be(tmp_path: Path, ca: Path) -> None:
    def made(place: str, **more: Any) -> dict[str, Any]:
        home = tmp_path / place
        operations.init(home, "a", task="digits", server="h:1", ca=ca, bundle=HASH, **more)
        found: dict[str, Any] = tomllib.loads((home / "site.toml").read_text())["data"]
        return found

    assert made("one", data=Path("relative"))["path"] == str(Path("relative").absolute())
    assert made("two", share=Path("share"))["share"] == "share"
    assert "path" not in made("three")


def test_a_folder_that_is_no_home(tmp_path: Path) -> None:
    assert code_of(lambda: operations.status(tmp_path)) == 901


def test_a_site_that_does_not_run_is_not_healthy(home: Path) -> None:
    # What a daemon that died said of itself is no news.
    services = {"supernode": {"state": "ready", "pid": 1, "restarts": 0}}
    link = {"reachable": True, "problem": "", "days_left": 300}
    (home / "status.json").write_text(json.dumps({"services": services, "link": link}))
    found = operations.status(home)
    assert (found["running"], found["connected"], found["healthy"]) == (False, False, False)
    assert found["worker"] is None
    assert "FE-420" in found["worker_problem"]
    json.dumps(found)
    text = operations.status_text(found)
    assert "site       clinic-a, not running" in text
    assert "good for" not in text
    assert "FE-420" in text


def test_what_is_spent_of_the_privacy_budget_stands_in_the_status(home: Path) -> None:
    assert operations.status(home)["privacy"] is None
    one = Charge("default", "site", "r", 1, "train", 0, "local", Release(4.0), 1e-5, "ab" * 32)
    Ledger.create(home / FILE).charge(one, Budget(10, 1e-5))
    text = operations.status_text(operations.status(home))
    assert "privacy    study default: epsilon 0.9263 of 10 is spent for one site" in text


@contextmanager
def served(home: Path, worker: SiteWorker) -> Iterator[None]:
    """A worker's socket, served by the real thing in a thread."""
    service = WorkerService(worker, PolicyFile(home), 60.0, lambda _status: None)
    listener = sockets.listen(home / "worker.sock")
    over = threading.Event()

    def serve() -> None:
        listener.settimeout(0.05)
        while not over.is_set():
            try:
                service.take(listener.accept()[0])
            except TimeoutError:
                continue

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        service.drain(2.0)
        listener.close()


@contextmanager
def daemon(home: Path, state: str = "ready", **facts: Any) -> Iterator[None]:
    """A real daemon of this home whose node never ends, and is connected or not."""
    pid = os.fork()
    if not pid:
        try:
            with homes.lock(home):
                supervisor = Supervisor(home)
                supervisor.facts |= facts
                program = Program("node", home / "log" / "n.log", command=("sleep", "60"))
                ready = state == "ready"
                supervisor.add(Service("supernode", lambda: program, ready=lambda: ready))
                supervisor.run()
        finally:
            os._exit(0)
    try:
        until = time.monotonic() + 120
        while operations.status(home)["services"].get("supernode", {}).get("state") != state:
            assert time.monotonic() < until
            time.sleep(0.05)
        yield
    finally:
        os.kill(pid, 15)
        os.waitpid(pid, 0)


def good(age: float = 0.0, **changes: Any) -> dict[str, Any]:
    """What a look at the server leaves that is so many seconds old."""
    link = {"reachable": True, "at": time.time() - age, "problem": "", "days_left": 300}
    return link | changes


@pytest.mark.slow
def test_healthy_is_connected_reachable_and_served(home: Path, worker: SiteWorker) -> None:
    with daemon(home, link=good(), connected_since=7), served(home, worker):
        found = operations.status(home)
        text = operations.status_text(found)
    assert found["healthy"] is True
    assert found["connected_since"] == 7
    assert "site       clinic-a, running" in text
    assert "connected, certificate good for 300 days" in text
    assert "serves     task blobs, device cpu, pid" in text
    assert "supernode  ready, pid" in text


@pytest.mark.slow
def test_any_part_that_is_missing_is_not_healthy(home: Path, worker: SiteWorker) -> None:
    with daemon(home, link=good()):
        assert operations.status(home)["healthy"] is False
        with served(home, worker):
            assert operations.status(home)["healthy"] is True
    with daemon(home, "starting", link=good()), served(home, worker):
        assert operations.status(home)["healthy"] is False
    with daemon(home), served(home, worker):
        assert operations.status(home)["healthy"] is False


@pytest.mark.slow
def test_a_problem_of_the_node_is_told_and_not_healthy(home: Path, worker: SiteWorker) -> None:
    with daemon(home, link=good(), problem="FE-913 not admitted"), served(home, worker):
        found = operations.status(home)
    assert found["healthy"] is False
    assert "problem    FE-913 not admitted" in operations.status_text(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("link", "said"),
    [
        ({"reachable": False, "problem": "Connection refused", "days_left": None}, "refused"),
        ({"days_left": 12}, "certificate ends in 12 days"),
        ({"days_left": 30}, "good for 30 days"),
    ],
)
def test_what_is_said_of_the_line(
    home: Path, worker: SiteWorker, link: dict[str, Any], said: str
) -> None:
    now = good(**link)
    with daemon(home, link=now), served(home, worker):
        found = operations.status(home)
    assert said in operations.status_text(found)
    assert found["healthy"] is now["reachable"]


@pytest.mark.slow
def test_an_old_look_at_the_server_is_none(home: Path, worker: SiteWorker) -> None:
    with daemon(home, link=good(80)), served(home, worker):
        assert operations.status(home)["healthy"] is True
    for age in (100.0, -100.0):
        with daemon(home, link=good(age)), served(home, worker):
            found = operations.status(home)
        assert (found["healthy"], found["connected"]) == (False, False)
        assert "not connected, not checked since" in operations.status_text(found)


@pytest.mark.slow
def test_the_status_command_tells_by_its_exit_too(
    home: Path, worker: SiteWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["site", "status", "--home", str(home)]) == 1
    assert "not running" in capsys.readouterr().out
    with daemon(home, link=good()), served(home, worker):
        assert main(["site", "status", "--home", str(home), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["worker"]["task"] == "blobs"


@pytest.mark.slow
def test_init_of_a_given_bundle_and_status_import_no_torch(home: Path) -> None:
    code = (
        "import sys; from fedge.shared.cli.main import main; main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "site", "status", "--home", str(home)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
