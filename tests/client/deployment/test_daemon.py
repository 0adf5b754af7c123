"""The site's daemon: a node that waits without a reply, the state in the node's log, and one half of a site."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fedge.client.deployment import daemon
from fedge.client.deployment.daemon import Part, SiteDaemon
from fedge.client.settings import site_config
from fedge.shared.daemon import home as homes
from fedge.shared.daemon.process import Program
from fedge.shared.errors import DeployError, SiteError

DEAF = "INFO: Giving up reconnection after 7 tries\n"
FINE = "SuperNode ID: 17\n"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    site_config.write(tmp_path, name="clinic-a", task="digits", address="127.0.0.1:9")
    return tmp_path


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(daemon, "REPLY_WITHIN", 0.3)
    monkeypatch.setattr(daemon, "DISCONNECTED_EVERY", 0.05)
    monkeypatch.setattr(daemon, "SHUTDOWN_WITHIN", 0.5)


class Site:
    """A real daemon whose node and SuperExec are real processes that only write and wait."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.nodes, self.says = home, list[int](), FINE
        self.deaf_to_sigterm = False
        monkeypatch.setattr(daemon, "script", self._script)
        monkeypatch.setattr(
            daemon, "_node", lambda name, arguments: self._script(name, arguments)()
        )
        monkeypatch.setattr(
            daemon, "_client_app", lambda name, arguments, socket: self._app(arguments)
        )
        self.app: Callable[[], int | None] = lambda: None
        self.daemon = SiteDaemon(home, site_config.load(home), "relay")
        # Nobody is dialled here; its own tests have real servers.
        self.supervisor = self.daemon.supervisor
        self.supervisor.ticks.remove(self.daemon._watch_link)

    def _script(self, name: str, _arguments: list[str]) -> Callable[[], int | None]:
        says = self.says if name == "flower-supernode" else ""
        deaf = self.deaf_to_sigterm and name == "flower-supernode"

        def work() -> None:
            if deaf:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sys.stdout.write(says)
            sys.stdout.flush()
            time.sleep(600)

        return work

    def _app(self, _arguments: list[str]) -> int | None:
        return self.app()

    @property
    def log(self) -> Path:
        return self.supervisor.log_of("supernode")

    @property
    def node(self) -> Any:
        return self.supervisor.services["supernode"]

    def until(self, done: Callable[[], Any], seconds: float = 300.0) -> None:
        deadline = time.monotonic() + seconds
        met: list[bool] = []

        def tick() -> None:
            if self.node.pid and self.node.pid not in self.nodes:
                self.nodes.append(self.node.pid)
            if done():
                met.append(True)
            if met or time.monotonic() > deadline:
                self.supervisor.stop()

        self.supervisor.ticks.append(tick)
        self.supervisor.run()
        assert met, self.log.read_text() if self.log.exists() else "no log"

    def ready(self) -> bool:
        return all(service.is_ready for service in self.supervisor.services.values())


@pytest.fixture
def site(home: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    return Site(home, monkeypatch)


class Steps:
    """Does one thing after the other, each when the one before is true."""

    def __init__(self, *steps: Callable[[], Any]) -> None:
        self.steps = list(steps)

    def __call__(self) -> bool:
        while self.steps and self.steps[0]() is not False:
            self.steps.pop(0)
        return not self.steps


def waits(true: Callable[[], Any]) -> Callable[[], bool]:
    return lambda: bool(true())


@pytest.mark.slow
def test_a_client_process_that_was_killed_costs_the_node(site: Site) -> None:
    """Flower's node waits for ever on the reply that nobody will write."""

    def killed() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    site.app = killed
    site.until(
        Steps(
            waits(site.ready),
            lambda: site.daemon._launch("flwr-clientapp", []),
            waits(lambda: len(site.nodes) == 2 and site.ready()),
        )
    )
    assert site.node.restarts == 1


@pytest.mark.slow
def test_one_that_failed_without_an_answer_does_so_after_a_moment(site: Site) -> None:
    site.app = lambda: 1
    site.until(
        Steps(
            waits(site.ready),
            lambda: site.daemon._launch("flwr-clientapp", []),
            waits(lambda: len(site.nodes) == 2 and site.ready()),
        )
    )
    assert site.node.restarts == 1


@pytest.mark.slow
@pytest.mark.parametrize(("status", "words"), [(0, "Sending:"), (1, "Sending:"), (1, "Receiving:")])
def test_one_that_answered_costs_nothing(site: Site, status: int, words: str) -> None:
    """The twin: the node took a reply, an error among them, or goes on without one."""
    log = site.log

    def answers() -> int:
        with log.open("a") as file:
            file.write(f"INFO: {words} train message\n")
        return status

    site.app = answers
    ended: list[float] = []

    def some_time_later() -> bool:
        if not ended and words in log.read_text() and not site.supervisor.alive("flwr-clientapp"):
            ended.append(time.monotonic())
        return bool(ended) and time.monotonic() - ended[0] > 3 * daemon.REPLY_WITHIN

    site.until(
        Steps(
            waits(site.ready),
            lambda: site.daemon._launch("flwr-clientapp", []),
            some_time_later,
        )
    )
    assert site.node.restarts == 0


@pytest.mark.slow
def test_an_answer_to_an_earlier_request_is_no_answer(site: Site) -> None:
    def before() -> None:
        with site.log.open("a") as file:
            file.write("INFO: Sending: train message\n")

    site.app = lambda: 1
    site.until(
        Steps(
            waits(site.ready),
            before,
            lambda: site.daemon._launch("flwr-clientapp", []),
            waits(lambda: len(site.nodes) == 2),
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("words", [DEAF, "SSL/TLS handshake error detected\n"])
def test_a_node_that_gave_up_its_line_is_started_again(site: Site, words: str) -> None:
    def gives_up() -> None:
        with site.log.open("a") as file:
            file.write(words)

    site.until(
        Steps(waits(site.ready), gives_up, waits(lambda: len(site.nodes) == 2 and site.ready()))
    )
    # The words of the one before do not count against the new one.
    assert site.node.restarts == 1
    assert site.node.last_exit == "killed by SIGTERM"


@pytest.mark.slow
def test_one_whose_good_bye_hangs_is_killed(site: Site) -> None:
    site.deaf_to_sigterm = True

    def gives_up() -> None:
        site.deaf_to_sigterm = False
        with site.log.open("a") as file:
            file.write(DEAF)

    exits: list[str] = []
    site.until(
        Steps(
            waits(site.ready),
            gives_up,
            waits(lambda: len(site.nodes) == 2 and (exits.append(site.node.last_exit) or True)),
        )
    )
    assert exits == ["killed by SIGKILL"]


@pytest.mark.slow
def test_a_node_that_hangs_in_its_good_bye_is_killed_whatever_ended_it(site: Site) -> None:
    site.deaf_to_sigterm = True

    def dies() -> None:
        site.deaf_to_sigterm = False
        site.supervisor.kill(site.supervisor.services["superexec"].pid, signal.SIGKILL)

    exits: list[str] = []
    site.until(
        Steps(
            waits(site.ready),
            dies,
            waits(lambda: len(site.nodes) == 2 and (exits.append(site.node.last_exit) or True)),
            # The one after it is nobody's debt.
            waits(lambda: site.ready() and not site.daemon._shutdown_deadlines),
        )
    )
    assert exits == ["killed by SIGKILL"]
    assert site.node.restarts == 1


@pytest.mark.slow
def test_a_client_process_has_the_workers_time_and_a_little_more(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site_config.write(
        site.home,
        name="clinic-a",
        task="digits",
        address="127.0.0.1:9",
        worker=site_config.WorkerPart(deadline=0.2),
    )
    site.daemon._site = site_config.load(site.home)
    monkeypatch.setattr(daemon, "APP_EXTRA", 0.3)
    site.app = lambda: time.sleep(600)
    site.until(
        Steps(
            waits(site.ready),
            lambda: site.daemon._launch("flwr-clientapp", []),
            waits(lambda: site.supervisor.alive("flwr-clientapp")),
            waits(lambda: not site.supervisor.alive("flwr-clientapp")),
            waits(lambda: len(site.nodes) == 2),
        )
    )


# What a node's log says.


@pytest.mark.slow
def test_what_the_log_said_before_the_start_does_not_count(site: Site) -> None:
    site.log.parent.mkdir(parents=True)
    site.log.write_text(DEAF + FINE)
    site.says = ""
    seen: list[float] = []
    site.until(lambda: site.node.pid and (seen.append(0) or len(seen) > 15))
    assert site.node.restarts == 0
    assert not site.node.is_ready


@pytest.mark.slow
def test_a_superexec_that_died_takes_the_node_with_it(site: Site) -> None:
    """A task that it had taken and not started would be waited for for ever."""

    def kills() -> None:
        site.supervisor.kill(site.supervisor.services["superexec"].pid, signal.SIGKILL)

    site.until(
        Steps(waits(site.ready), kills, waits(lambda: len(site.nodes) == 2 and site.ready()))
    )
    assert site.node.restarts == 1


@pytest.mark.slow
def test_a_node_that_died_takes_its_client_processes_and_debts_with_it(site: Site) -> None:
    site.app = lambda: time.sleep(600)

    def owes() -> None:
        site.daemon._pending_restarts.append((time.monotonic() + 0.2, 0))
        site.supervisor.kill(site.node.pid, signal.SIGKILL)

    site.until(
        Steps(
            waits(site.ready),
            lambda: site.daemon._launch("flwr-clientapp", []),
            waits(lambda: site.supervisor.alive("flwr-clientapp")),
            owes,
            waits(lambda: len(site.nodes) == 2 and site.ready()),
            waits(lambda: not site.supervisor.alive("flwr-clientapp")),
        )
    )
    assert site.daemon._pending_restarts == []


@pytest.mark.slow
def test_since_when_a_site_is_connected(site: Site) -> None:
    told: list[Any] = []

    def look() -> None:
        told.append(site.supervisor.facts.get("connected_since"))

    def kills() -> None:
        site.supervisor.kill(site.node.pid, signal.SIGKILL)

    site.until(Steps(waits(site.ready), look, kills, waits(lambda: not site.node.is_ready), look))
    assert abs(told[0] - time.time()) < 120
    assert told[1] is None


# What runs where, and what it knows.


def programs(home: Path, part: Part) -> dict[str, Program]:
    made = SiteDaemon(home, site_config.load(home), part)
    try:
        return {name: service.program() for name, service in made.supervisor.services.items()}
    finally:
        for key in list(made.supervisor._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
        made.supervisor._selector.close()


def test_each_half_keeps_only_its_own_processes(home: Path) -> None:
    assert set(programs(home, "worker")) == {"worker"}
    assert not (home / "superexec.secret").exists()
    assert set(programs(home, "relay")) == {"supernode", "superexec"}
    assert set(programs(home, "both")) == {"worker", "supernode", "superexec"}


def test_the_workers_environment_is_the_daemons_own_and_the_relays_is_told(home: Path) -> None:
    found = programs(home, "both")
    assert found["worker"].environment == {}
    for name in ("supernode", "superexec"):
        environment = found[name].environment
        assert environment["FEDGE_WORKER_SOCKET"] == str(home / "worker.sock")
        assert environment["FLWR_HOME"] == str(home / "flower")
        assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
        assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
        assert environment["PATH"].split(os.pathsep)[0] == str(home / "bin")
    assert stat.S_IMODE((home / "superexec.secret").stat().st_mode) == 0o600
    assert stat.S_IMODE((home / "bin" / "flwr-clientapp").stat().st_mode) == 0o700


def test_the_node_listens_to_itself_and_dials_by_tls(home: Path) -> None:
    title = programs(home, "relay")["supernode"].title
    assert "--host 127.0.0.1" in title
    assert f"--root-certificates {home / 'ca.crt'}" in title
    assert "--superlink 127.0.0.1:9" in title
    assert 'site="clinic-a"' in title
    assert "--insecure" not in title


@pytest.mark.slow
def test_a_daemon_is_the_only_one_of_its_home(home: Path) -> None:
    with homes.lock(home), pytest.raises(DeployError) as caught:
        daemon.run(home)
    assert caught.value.code == 902


# The look at the bundle, as a fork of the daemon takes it.


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Callable[[bytes], None]]]:
    """The function that Flower's command would call with the bundle."""
    found: list[Callable[[bytes], None]] = []
    monkeypatch.setattr(daemon, "before_bundle", lambda _module, approve: found.append(approve))
    monkeypatch.setattr(daemon, "script", lambda name, arguments: lambda: 7)
    monkeypatch.delenv("FEDGE_BUNDLE", raising=False)
    yield found
    os.environ.pop("FEDGE_BUNDLE", None)


def test_a_bundle_that_nobody_can_approve_is_refused_without_a_word_of_the_site(
    home: Path, asked: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fedge.client.relay.worker_client import SocketLink

    def permit(self: SocketLink, sha256: str) -> None:
        raise SiteError(419, f"{self.path}: secret words of {sha256}")

    monkeypatch.setattr(SocketLink, "permit", permit)
    assert daemon._client_app("flwr-clientapp", [], home / "worker.sock") == 7
    with pytest.raises(SiteError) as caught:
        asked[0](b"a bundle")
    assert str(caught.value) == "FE-419 refused by the site"
    # No cause either: a traceback of it would travel.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    assert "secret words" in caplog.text


def test_the_hash_of_a_bundle_is_passed_on_to_the_worker(
    home: Path, asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedge.client.relay.worker_client import SocketLink

    permitted: list[str] = []
    monkeypatch.setattr(SocketLink, "permit", lambda self, sha256: permitted.append(sha256))
    daemon._client_app("flwr-clientapp", [], home / "worker.sock")
    asked[0](b"a bundle")
    assert permitted == [hashlib.sha256(b"a bundle").hexdigest()]
    assert os.environ["FEDGE_BUNDLE"] == hashlib.sha256(b"a bundle").hexdigest()


def test_a_link_that_was_checked_is_in_the_status(home: Path) -> None:
    """A real check, of an address where nobody is."""
    made = SiteDaemon(home, site_config.load(home), "worker")
    (home / "ca.crt").write_text("")
    made.supervisor.services.clear()
    deadline = time.monotonic() + 120

    def tick() -> None:
        made._watch_link()
        if "link" in made.supervisor.facts or time.monotonic() > deadline:
            made.supervisor.stop()

    made.supervisor.ticks.append(tick)
    made.supervisor.run()
    told = json.loads((home / "status.json").read_text())
    assert told["link"]["reachable"] is False
    assert told["link"]["problem"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs", "fails", "says nothing"])
def test_an_old_look_at_the_server_is_none_where_the_next_one_hangs(
    home: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    old = {"reachable": True, "at": round(time.time()), "days_left": 300, "problem": ""}
    (home / "link.json").write_text(json.dumps(old))

    def write(_address: str, _ca: Path, path: Path) -> None:
        if how == "hangs":
            time.sleep(600)
        if how == "fails":
            path.write_text(json.dumps(old))
            raise ValueError("a check that fails")

    monkeypatch.setattr(daemon.server_probe, "write", write)
    # Only the look that hangs may meet the deadline, however busy the machine is.
    monkeypatch.setattr(daemon, "LINK_WITHIN", 0.3 if how == "hangs" else 120.0)
    made = SiteDaemon(home, site_config.load(home), "worker")
    made.supervisor.services.clear()
    deadline = time.monotonic() + 120

    def tick() -> None:
        made._watch_link()
        if "link" in made.supervisor.facts or time.monotonic() > deadline:
            made.supervisor.stop()

    made.supervisor.ticks.append(tick)
    made.supervisor.run()
    link = made.supervisor.facts["link"]
    assert link["reachable"] is False
    assert abs(link["at"] - time.time()) < 120
    assert ("not checked within 0.3 s" in link["problem"]) is (how == "hangs")
