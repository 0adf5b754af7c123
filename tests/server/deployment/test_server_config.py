"""server.toml: its defaults, and that nothing is open to others without a reverse proxy."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedge.server.deployment import server_config
from fedge.shared.errors import ConfigError, DeployError, FedgeError


def chosen(address: str, listen: str | None = None, front: str | None = None) -> tuple[str, str]:
    section = server_config.check(address, listen, front).server
    return section.listen, section.front


@pytest.mark.parametrize(
    ("address", "listen", "front", "wanted"),
    [
        ("127.0.0.1:8443", None, None, ("127.0.0.1:8443", "none")),
        ("localhost:8443", None, None, ("localhost:8443", "none")),
        ("[::1]:8443", None, None, ("[::1]:8443", "none")),
        ("fed.example.org:8443", None, None, ("0.0.0.0:8443", "nginx")),
        ("fed.example.org:8443", "10.0.0.7:9443", None, ("10.0.0.7:9443", "nginx")),
        # What others dial is passed on from somewhere: they reach this machine's own front, not Flower.
        ("fed.example.org:8443", "127.0.0.1:9443", None, ("127.0.0.1:9443", "nginx")),
        ("fed.example.org:8443", "127.0.0.1:9443", "none", ("127.0.0.1:9443", "none")),
        ("127.0.0.1:8443", None, "nginx", ("127.0.0.1:8443", "nginx")),
    ],
)
def test_where_a_server_listens(
    address: str, listen: str | None, front: str | None, wanted: tuple[str, str]
) -> None:
    assert chosen(address, listen, front) == wanted


def test_without_a_front_flower_takes_the_port_itself_and_with_one_another() -> None:
    assert server_config.check("127.0.0.1:8443", None, "none").server.port == 8443
    assert server_config.check("127.0.0.1:8443", None, "nginx").server.port != 8443


@pytest.mark.parametrize(
    ("address", "listen", "front"),
    [
        ("fed.example.org:8443", None, "none"),
        ("127.0.0.1:8443", "0.0.0.0:8443", "none"),
        ("127.0.0.1:8443", "[::]:8443", "none"),
        ("127.0.0.1:8443", "10.0.0.7:8443", "none"),
        ("fed.example.org", None, None),
        ("fed.example.org:0", None, None),
        ("fed.example.org:70000", None, None),
        (":8443", None, None),
        ("127.0.0.1:8443", "everywhere", None),
    ],
)
def test_what_is_refused(address: str, listen: str | None, front: str | None) -> None:
    with pytest.raises(DeployError) as caught:
        server_config.check(address, listen, front)
    assert caught.value.code == 904


def test_a_file_that_was_edited_to_listen_to_all_without_a_front_is_refused(tmp_path: Path) -> None:
    server_config.write(tmp_path, server_config.check("127.0.0.1:8443", None, None))
    path = tmp_path / server_config.NAME
    path.write_text(path.read_text().replace('listen = "127.0.0.1', 'listen = "0.0.0.0'))
    with pytest.raises(DeployError) as caught:
        server_config.load(tmp_path)
    assert caught.value.code == 904


def test_what_is_written_is_read(tmp_path: Path) -> None:
    settings = server_config.check("fed.example.org:8443", None, None)
    server_config.write(tmp_path, settings)
    assert server_config.load(tmp_path) == settings


GOOD = '[server]\naddress = "127.0.0.1:1"\nlisten = "127.0.0.1:1"\nfront = "none"\nport = 1\n'


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (GOOD.replace("port = 1", "port = 70000"), 201),
        (GOOD.replace("port = 1", 'port = "1"'), 201),
        (GOOD.replace('"none"', '"apache"'), 201),
        (GOOD + "[extra]\n", 202),
        ("[server]\n", 201),
        ("not = = toml", 204),
        ("\0", 204),
        ("a = " + "[" * 5000, 204),
        ("a = " + "9" * 5000, 204),
    ],
)
def test_a_file_that_is_not_as_it_must_be(tmp_path: Path, text: str, code: int) -> None:
    (tmp_path / server_config.NAME).write_text(GOOD)
    assert server_config.load(tmp_path).server.port == 1
    (tmp_path / server_config.NAME).write_text(text)
    with pytest.raises(FedgeError) as caught:
        server_config.load(tmp_path)
    assert isinstance(caught.value, ConfigError | DeployError)
    assert caught.value.code == code


def test_a_folder_without_the_file_is_no_home(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(DeployError) as caught:
            server_config.load(place)
        assert caught.value.code == 901


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost"])
def test_who_is_this_machine_only(host: str) -> None:
    assert server_config.is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.evil.org"])  # noqa: S104
def test_who_is_others_too(host: str) -> None:
    assert not server_config.is_loopback(host)
