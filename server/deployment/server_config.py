"""``server.toml``: where a server listens. Written by ``fedge server init``, changed by hand."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

import tomli_w
from pydantic import Field

from fedge.shared.config import home_files
from fedge.shared.config.base_section import Section
from fedge.shared.daemon.home import free_port, split_address
from fedge.shared.errors import DeployError
from fedge.shared.files import write_atomically

NAME = "server.toml"


class ServerSection(Section):
    """Addresses of the server."""

    address: str = Field(description="host:port that the sites dial; in the certificate")
    listen: str = Field(description="address:port on which this machine accepts sites")
    front: Literal["none", "nginx"] = Field(
        description="what accepts the sites; none: Flower's SuperLink itself, on a loopback address only"
    )
    port: int = Field(ge=1, le=65535, description="of Flower's SuperLink, on the loopback address")


class ServerFile(Section):
    """The content of server.toml."""

    server: ServerSection


def check(address: str, listen: str | None, front: str | None) -> ServerFile:
    """Choose and check the addresses of a new server.

    Args:
        address: host:port that the sites dial.
        listen: where to accept them; the address itself where it is a loopback one, else its port on all addresses.
        front: "none", "nginx", or None to choose: none where both addresses are loopback ones.

    Raises:
        DeployError: 904, an address is not host:port, or would be open to others without a reverse proxy.
    """
    host, port = split_address(address)
    listen = listen or (address if is_loopback(host) else f"0.0.0.0:{port}")
    where, inner = split_address(listen)
    if not front:
        # An address that others dial is passed on from somewhere, also where this machine listens on loopback.
        front = "none" if is_loopback(where) and is_loopback(host) else "nginx"
    _require_closed(listen, front)
    section = {"address": address, "listen": listen, "front": front}
    return ServerFile.model_validate(
        {"server": section | {"port": inner if front == "none" else free_port()}}
    )


def _require_closed(listen: str, front: str) -> None:
    """Refuse an open SuperLink: its Control API has no authentication, so without a proxy it must be on loopback.

    Raises:
        DeployError: 904.
    """
    if front == "none" and not is_loopback(split_address(listen)[0]):
        raise DeployError(
            904, f"listen: must be a loopback address where front is none, got {listen}; use nginx"
        )


def write(home: Path, settings: ServerFile) -> None:
    """Write server.toml."""
    content = settings.model_dump(mode="json", by_alias=True)
    write_atomically(home / NAME, tomli_w.dumps(content).encode())


def load(home: Path) -> ServerFile:
    """Read server.toml.

    Raises:
        DeployError: 901, there is none; 904, an address is not host:port, or would be open to others.
        ConfigError: 201 to 204, it is not as it must be.
    """
    settings = home_files.read(home / NAME, ServerFile)
    split_address(settings.server.address)
    _require_closed(settings.server.listen, settings.server.front)
    return settings


def is_loopback(host: str) -> bool:
    """Whether a host names this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
