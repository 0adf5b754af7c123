"""The server's unit: systemd accepts it, and it is closed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fedge.server.deployment import systemd
from fedge.shared.errors import ConfigError, UsageError

BIN = Path("/opt/fedge/bin")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed"
)


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=300
    )


@needs_systemd
def test_systemd_accepts_the_unit(tmp_path):
    # It wants the command to exist.
    command = tmp_path / "bin" / "fedge"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    written = systemd.write(tmp_path / "units", bin=command.parent)
    assert [path.name for path in written] == [systemd.UNIT, systemd.USERS]
    done = analyze("verify", written[0])
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
def test_the_unit_is_closed(tmp_path):
    systemd.write(tmp_path, bin=BIN)
    done = analyze("security", "--offline=true", tmp_path / systemd.UNIT)
    found = re.search(r"exposure level for \S+: ([\d.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= 2.0


def test_the_command_and_the_user():
    found = systemd.texts(bin=BIN)
    command = "ExecStart=/opt/fedge/bin/fedge server start --home /var/lib/fedge-server\n"
    assert command in found[systemd.UNIT]
    assert "Environment=PATH=/opt/fedge/bin:" in found[systemd.UNIT]
    assert "User=fedge-server\n" in found[systemd.UNIT]
    assert "u fedge-server - " in found[systemd.USERS]


@pytest.mark.parametrize("path", ["bin", "/a b", "/a%n", "/a\nb", "/a;b", "/$a", "/a/../b", "/"])
def test_a_path_that_a_unit_cannot_hold_is_refused(path):
    with pytest.raises(ConfigError) as caught:
        systemd.texts(bin=Path(path))
    assert caught.value.code == 201


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="file") as caught:
        systemd.write(tmp_path / "file", bin=BIN)
    assert caught.value.code == 107
