import subprocess
import sys
from pathlib import Path

import pytest

from fedge.client.settings import site_config
from fedge.client.settings.site_config import OwnData, WorkerPart
from fedge.shared.errors import ConfigError, DeployError

GOOD = {"name": "hosp-1", "task": "digits", "address": "fed.example.org:443"}


def test_what_is_written_is_read_with_absolute_paths(tmp_path):
    home = tmp_path / "deep" / "home"
    data = OwnData.model_validate({"share": Path("share"), "test-fraction": 0.5, "seed": 7})
    site_config.write(home, **GOOD, data=data)
    found = site_config.load(home)
    assert (found.site.name, found.site.task) == ("hosp-1", "digits")
    assert found.server.address == "fed.example.org:443"
    assert found.server.root_certificates == home / "ca.crt"
    assert (found.data.share, found.data.path) == (home / "share", None)
    assert (found.data.test_fraction, found.data.seed) == (0.5, 7)
    assert (found.worker.socket, found.worker.deadline) == (home / "worker.sock", 3600.0)
    assert home.stat().st_mode & 0o777 == 0o700


def test_absolute_paths_stay(tmp_path):
    socket = tmp_path / "run" / "w.sock"
    found = site_config.write(
        tmp_path,
        **GOOD,
        root_certificates=Path("/etc/ca.pem"),
        data=OwnData.model_validate({"path": Path("/srv/data")}),
        worker=WorkerPart.model_validate({"socket": socket, "deadline": 5.0}),
    )
    assert found.worker.socket == socket
    assert found.server.root_certificates == Path("/etc/ca.pem")
    assert found.data.path == Path("/srv/data")


def test_a_folder_without_the_file_is_no_home(tmp_path):
    with pytest.raises(DeployError) as caught:
        site_config.load(tmp_path)
    assert caught.value.code == 901


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Hospital One"},
        {"name": ""},
        {"task": ""},
        {"address": "no-port"},
        {"address": "a b:1"},
        {"address": "h:999999"},
        {"address": "http://h:1"},
    ],
)
def test_bad_values_are_refused_and_nothing_is_written(tmp_path, change):
    with pytest.raises(ConfigError) as caught:
        site_config.write(tmp_path, **GOOD | change)
    assert caught.value.code == 201
    assert not (tmp_path / "site.toml").exists()


def test_path_and_share_exclude_each_other(tmp_path):
    site_config.write(tmp_path, **GOOD)
    path = tmp_path / "site.toml"
    path.write_text(path.read_text().replace("[data]", '[data]\npath = "a"\nshare = "b"'))
    with pytest.raises(ConfigError, match="path or share, got both"):
        site_config.load(tmp_path)


@pytest.mark.slow
def test_reading_imports_no_torch():
    code = "import sys, fedge.client.settings.site_config; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.strip() == "False"
