"""``site.toml``: the site's name, its server's address, its data and its worker's socket.

Relay and worker read the same file in processes of their own; reading it imports no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import tomli_w
from pydantic import Field, model_validator

from fedge.shared.config import home_files
from fedge.shared.config.base_section import FilePath, Section, SiteName
from fedge.shared.files import write_atomically

FILE: Final = "site.toml"


class Identity(Section):
    """The site's name and task."""

    name: SiteName = Field(description="as the server registered it; part of every random seed")
    task: str = Field(min_length=1, max_length=64, description="name of an installed task")


class Server(Section):
    """Address and certificate authority of the server."""

    address: str = Field(
        pattern=r"^(\[[0-9a-fA-F:.]{2,45}\]|[A-Za-z0-9.-]{1,253}):[0-9]{1,5}$",
        description="host:port of the server's fleet",
    )
    root_certificates: FilePath = Field(
        Path("ca.crt"), description="PEM file of the server's CA; relative to the home"
    )


class OwnData(Section):
    """Where the site's examples lie."""

    path: FilePath | None = Field(
        None, description="what the task reads; relative to the home; none where it needs no file"
    )
    share: FilePath | None = Field(
        None, description="folder of .npy files that `fedge up` wrote, instead of path"
    )
    test_fraction: float = Field(
        0.25,
        gt=0,
        lt=1,
        description="share of the examples held out, where the data has no split of its own",
    )
    seed: int = Field(42, ge=0, le=2**63 - 1, description="which examples are held out")

    @model_validator(mode="after")
    def _one_of(self) -> OwnData:
        if self.path is not None and self.share is not None:
            raise ValueError("must hold path or share, got both")
        return self


class WorkerPart(Section):
    """The socket between relay and worker."""

    socket: FilePath = Field(
        Path("worker.sock"), description="Unix socket of the worker; relative to the home"
    )
    deadline: float = Field(
        3600.0, gt=0, le=604_800, description="seconds that the relay waits for a reply"
    )
    group: str | None = Field(
        None,
        min_length=1,
        max_length=64,
        description="group whose members may use the socket, where the relay runs as another user",
    )


class SiteFile(Section):
    """The content of ``site.toml``."""

    site: Identity
    server: Server
    data: OwnData = OwnData()
    worker: WorkerPart = WorkerPart()


def load(home: Path) -> SiteFile:
    """Read a home's ``site.toml``.

    Returns:
        The file, its paths made absolute.

    Raises:
        DeployError: 901, there is none.
        ConfigError: 201 to 204, its content is not allowed.
    """
    file = home_files.read(home / FILE, SiteFile)
    base = home.absolute()

    def absolute(path: Path | None) -> Path | None:
        return None if path is None else base / path

    server = {"root_certificates": absolute(file.server.root_certificates)}
    data = {"path": absolute(file.data.path), "share": absolute(file.data.share)}
    return file.model_copy(
        update={
            "server": file.server.model_copy(update=server),
            "data": file.data.model_copy(update=data),
            "worker": file.worker.model_copy(update={"socket": absolute(file.worker.socket)}),
        }
    )


def write(
    home: Path,
    *,
    name: str,
    task: str,
    address: str,
    data: OwnData | None = None,
    root_certificates: Path = Path("ca.crt"),
    worker: WorkerPart | None = None,
) -> SiteFile:
    """Write a home's ``site.toml``, replacing an existing one.

    Args:
        home: created if missing, readable by its owner only.
        name: of the site.
        task: name of an installed task.
        address: host:port of the server.
        data: where the examples lie; paths may be relative to the home.
        root_certificates: PEM file of the server's CA; may be relative to the home.
        worker: socket and deadline.

    Returns:
        The result of ``load``.

    Raises:
        ConfigError: 201, a value is not allowed; the file is then not written.
    """
    tree: dict[str, Any] = {
        "site": {"name": name, "task": task},
        "server": {"address": address, "root-certificates": str(root_certificates)},
        "data": _dump(data or OwnData()),
        "worker": _dump(worker or WorkerPart()),
    }
    home_files.check(tree, SiteFile, FILE)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(home / FILE, tomli_w.dumps(tree).encode())
    return load(home)


def _dump(section: Section) -> dict[str, Any]:
    return section.model_dump(mode="json", by_alias=True, exclude_none=True)
