"""The private places of Flower at a site: where we read them to be, and what happens where they are not."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
from flwr.cli.config_utils import get_fab_metadata
from flwr.cli.install import install_from_fab
from flwr.common.config import get_project_dir
from flwr.supernode import start_client_internal
from flwr.supernode.runtime import run_clientapp

from fedge.client.deployment import flower_patches
from fedge.client.deployment.flower_patches import BUSY_FOR, LOOK, POLL, READ, NodeClock
from fedge.shared.errors import SiteError
from fedge.shared.flower import app_bundle
from fedge.shared.flower.patches import CLIENT_APP, SERVER_APP, before_bundle


def test_the_installed_flower_is_one_that_was_read() -> None:
    found = version("flwr")
    assert found.startswith(tuple(f"{minor}." for minor in READ)), (
        f"Flower {found} is installed; fedge.client.deployment.flower_patches was read against {', '.join(READ)} only."
        " Run this file's other tests; if they pass, read run_clientapp and start_client_internal and add it to READ."
    )


def test_the_bundle_passes_one_place_before_any_of_it_is_used() -> None:
    assert run_clientapp.install_from_fab is install_from_fab
    source = inspect.getsource(run_clientapp.run_clientapp)
    assert source.count("install_from_fab(") == 1
    place = source.index("install_from_fab(fab.content")
    # Where the app's folder, its dependencies and its code come into play is after it.
    for later in ("get_project_dir(", "install_app_dependencies(", "load_client_app_fn("):
        assert source.index(later) > place


def test_the_node_pauses_where_we_think_it_does() -> None:
    source = inspect.getsource(start_client_internal)
    assert re.findall(r"time\.sleep\(([^)]*)\)", source) == ["3", "0.5", "0.5"]
    assert start_client_internal.time is time
    assert (flower_patches._IDLE, flower_patches._AWAITING) == (3, 0.5)
    idle = inspect.getsource(start_client_internal.start_client_internal)
    assert re.search(r"if run_id is None:\s+#[^\n]*\n\s+time\.sleep\(3\)", idle)


def test_the_server_s_bundle_passes_one_place_too() -> None:
    module = import_module(SERVER_APP)
    source = inspect.getsource(module)
    assert source.count("install_from_fab(") == 1
    assert module.install_from_fab is install_from_fab


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test wraps is as Flower has it when the test ends."""
    monkeypatch.setattr(run_clientapp, "install_from_fab", install_from_fab)
    monkeypatch.setattr(run_clientapp, "get_project_dir", get_project_dir)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bundles that Flower was given to unpack."""
    found: list[bytes] = []

    def install(content: Path | bytes, skip_prompt: bool = False) -> Path:
        assert skip_prompt
        found.append(content if isinstance(content, bytes) else content.read_bytes())
        return Path("unpacked")

    monkeypatch.setattr(run_clientapp, "install_from_fab", install)
    return found


def test_a_bundle_is_shown_before_it_is_unpacked(installed: list[bytes], tmp_path: Path) -> None:
    asked: list[bytes] = []

    def approve(content: bytes) -> None:
        assert len(installed) == len(asked)
        asked.append(content)

    before_bundle(CLIENT_APP, approve)
    assert run_clientapp.install_from_fab(b"a bundle", skip_prompt=True) == Path("unpacked")
    (tmp_path / "b.fab").write_bytes(b"another")
    run_clientapp.install_from_fab(tmp_path / "b.fab", skip_prompt=True)
    assert asked == [b"a bundle", b"another"]
    assert installed == [b"a bundle", b"another"]


def test_a_bundle_that_is_refused_is_not_unpacked(installed: list[bytes]) -> None:
    def refuse(_content: bytes) -> None:
        raise PermissionError("no")

    before_bundle(CLIENT_APP, refuse)
    with pytest.raises(PermissionError):
        run_clientapp.install_from_fab(b"a bundle", skip_prompt=True)
    assert installed == []


def test_a_flower_without_the_place_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(run_clientapp, "install_from_fab")
    with pytest.raises(AttributeError):
        before_bundle(CLIENT_APP, lambda _: None)


def test_code_is_loaded_from_the_bundle_that_was_approved_and_from_no_other_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A server names id, version and hash of the run apart from the bundle's bytes; here another bundle lies there."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    content = app_bundle.bundle()
    name, number = get_fab_metadata(content)
    digest = app_bundle.sha256()
    before_bundle(CLIENT_APP, lambda _: None)
    with pytest.raises(SiteError):
        run_clientapp.get_project_dir(name, number, digest)  # nothing was approved yet
    folder = run_clientapp.install_from_fab(content, skip_prompt=True)
    assert run_clientapp.get_project_dir(name, number, digest) == folder
    # Flower itself takes any folder that is named and there.
    for place in ((name, "9.9.9", digest), ("other/app", number, digest), (name, number, "f" * 64)):
        shutil.copytree(folder, get_project_dir(*place))
        with pytest.raises(SiteError) as caught:
            run_clientapp.get_project_dir(*place)
        assert caught.value.code == 419


class Time:
    """Sleeping moves it."""

    def __init__(self) -> None:
        self.at, self.slept = 100.0, list[float]()

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.at += seconds


def test_pauses_are_short_while_a_run_is_under_way_and_flowers_own_otherwise() -> None:
    real = Time()
    clock = NodeClock(real.sleep, lambda: real.at)
    clock.sleep(3)
    assert real.slept == [3]
    clock.sleep(0.5)
    clock.sleep(3)
    assert real.slept[1:] == [LOOK, POLL]
    real.at += BUSY_FOR
    clock.sleep(3)
    assert real.slept[-1] == 3
    # Any other pause is not ours to change, nor does it mean that a message is there.
    clock.sleep(7.5)
    clock.sleep(3)
    assert real.slept[-2:] == [7.5, 3]


def test_a_busy_minute_counts_from_the_last_message() -> None:
    real = Time()
    clock = NodeClock(real.sleep, lambda: real.at)
    clock.sleep(0.5)
    real.at += BUSY_FOR - 1
    clock.sleep(0.5)
    real.at += BUSY_FOR - 1
    clock.sleep(3)
    assert real.slept[-1] == POLL


def test_all_else_is_the_module_time() -> None:
    assert NodeClock().monotonic is time.monotonic
    assert time.time() <= NodeClock().time() <= time.time()
    with pytest.raises(AttributeError):
        _ = NodeClock().no_such_thing


def test_only_the_nodes_own_module_sees_other_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_client_internal, "time", time)
    assert flower_patches.poll_while_busy()
    assert isinstance(vars(start_client_internal)["time"], NodeClock)
    assert sys.modules["time"] is time
    # A second call finds another module there and leaves it alone.
    assert not flower_patches.poll_while_busy()


def test_a_flower_that_pauses_otherwise_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("other")
    monkeypatch.setattr(start_client_internal, "time", other)
    assert flower_patches.poll_while_busy() is False
    assert vars(start_client_internal)["time"] is other
    monkeypatch.delattr(start_client_internal, "time")
    assert flower_patches.poll_while_busy() is False
    assert "time" not in vars(start_client_internal)
