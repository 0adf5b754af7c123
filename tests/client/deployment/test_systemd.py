"""A site's units: systemd accepts them, they are closed, and only the worker sees the data."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedge.client.deployment import systemd
from fedge.shared.errors import ConfigError, UsageError

BIN = Path("/opt/fedge/bin")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=300
    )


def settings(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", text, re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


@needs_systemd
def test_systemd_accepts_the_units(tmp_path):
    # It wants the command to exist.
    command = tmp_path / "bin" / "fedge"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    written = systemd.write(tmp_path / "units", bin=command.parent)
    services = [path for path in written if path.suffix == ".service"]
    assert len(services) == 2
    done = analyze("verify", *services)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_a_defect_would_be_noticed(tmp_path):
    path = next(p for p in systemd.write(tmp_path, bin=BIN) if p.name == systemd.WORKER)
    path.write_text(path.read_text().replace("NoNewPrivileges", "NoNewPriviliges"))
    assert "NoNewPriviliges" in analyze("verify", path).stderr


@needs_systemd
@pytest.mark.parametrize(("name", "most"), [(systemd.RELAY, 2.0), (systemd.WORKER, 1.5)])
def test_the_units_are_closed(tmp_path, name, most):
    systemd.write(tmp_path, bin=BIN)
    done = analyze("security", "--offline=true", tmp_path / name)
    found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= most


def test_only_the_worker_sees_the_data():
    found = systemd.texts(bin=BIN, data=Path("/srv/scans"))
    relay, worker = settings(found[systemd.RELAY]), settings(found[systemd.WORKER])
    assert "-/srv/scans" in relay["InaccessiblePaths"]
    assert "-/var/lib/fedge-worker" in relay["InaccessiblePaths"]
    assert worker["ReadOnlyPaths"] == ["-/srv/scans"]
    assert "-/srv/scans" not in worker["InaccessiblePaths"]
    assert relay["User"] != worker["User"]
    assert relay["SupplementaryGroups"] == worker["Group"] == ["fedge-site"]
    assert worker["RuntimeDirectory"] == ["fedge-site"]
    assert worker["RuntimeDirectoryMode"] == ["0750"]


def test_the_worker_has_no_network_and_the_relay_no_device():
    found = systemd.texts(bin=BIN)
    relay, worker = settings(found[systemd.RELAY]), settings(found[systemd.WORKER])
    assert worker["PrivateNetwork"] == ["yes"]
    assert worker["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert relay["PrivateDevices"] == relay["MemoryDenyWriteExecute"] == ["yes"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("/srv/x", "yes"),
        ("/home/lab/x", "read-only"),
        ("/homes/x", "yes"),
        ("/root/x", "read-only"),
    ],
)
def test_data_in_a_home_folder_stays_readable_for_the_worker_only(data, expected):
    found = systemd.texts(bin=BIN, data=Path(data))
    assert settings(found[systemd.WORKER])["ProtectHome"] == [expected]
    assert settings(found[systemd.RELAY])["ProtectHome"] == ["yes"]


def test_the_commands_and_the_users():
    found = systemd.texts(bin=BIN)
    for name, side in ((systemd.RELAY, "relay"), (systemd.WORKER, "worker")):
        command = f"/opt/fedge/bin/fedge site start --only {side} --home /var/lib/fedge-{side}"
        assert settings(found[name])["ExecStart"] == [command]
        assert settings(found[name])["User"] == [f"fedge-{side}"]
        assert f"u fedge-{side} - " in found[systemd.USERS]
        assert f"m fedge-{side} fedge-site" in found[systemd.USERS]
    assert "@" not in "".join(
        line for text in found.values() for line in text.splitlines() if line[:1] not in "#S"
    )


@pytest.mark.parametrize("path", ["bin", "/a b", "/a%n", "/a\nb", "/a;b", "/$a", "/a/../b", "/"])
def test_a_path_that_a_unit_cannot_hold_is_refused(path):
    for arguments in ({"bin": Path(path)}, {"bin": BIN, "data": Path(path)}):
        with pytest.raises(ConfigError) as caught:
            systemd.texts(**arguments)
        assert caught.value.code == 201


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file") as caught:
        systemd.write(tmp_path / "file", bin=BIN)
    assert caught.value.code == 107
