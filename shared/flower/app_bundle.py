"""The Flower bundle of fedge: a pyproject.toml that points at the installed apps, and nothing else.

Flower ships a bundle from the starter of a run to every site. Ours holds no code, so its SHA-256 depends on fedge's
version alone; a site approves it by that number (``bundles`` in its policy.toml).
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from fedge.shared.errors import DeployError

_MAX_BUNDLE = 64 * 1024
_PYPROJECT = """\
[project]
name = "relay"
version = "{version}"
description = "Points at the installed fedge; holds no code."
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "fedge"

[tool.flwr.app.components]
serverapp = "fedge.server.app:app"
clientapp = "fedge.client.app:app"

[tool.flwr.app.config]
run-dir = ""
"""


def write(folder: Path) -> None:
    """Write the app's source, for ``flwr run`` and ``flwr build``."""
    folder.mkdir(parents=True, exist_ok=True)
    text = _PYPROJECT.format(version=version("fedge"))
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")


def require_ours(content: bytes) -> None:
    """Check a bundle's bytes: they must hold the pyproject.toml that ``write`` writes, Flower's own notes, and no code.

    Raises:
        DeployError: 915, it is another bundle.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = {name for name in archive.namelist() if not name.startswith(".info/")}
            small = all(entry.file_size < _MAX_BUNDLE for entry in archive.infolist())
            ours = names == {"pyproject.toml"} and small
            text = archive.read("pyproject.toml") if ours else b""
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error):
        text = b""
    if text != _PYPROJECT.format(version=version("fedge")).encode():
        raise DeployError(915, "bundle: must be that of this fedge, got another")


def bundle(build: Callable[[Path], str] | None = None) -> bytes:
    """The bundle, as Flower's own command builds it.

    Args:
        build: runs ``flwr build`` in a folder and returns its output; by default a new process.

    Raises:
        DeployError: 915, the command failed.
    """
    with tempfile.TemporaryDirectory(prefix="fedge-bundle-") as name:
        folder = Path(name) / "app"
        write(folder)
        output = (build or _build)(folder)
        built = list(folder.glob("*.fab"))
        if len(built) != 1:
            words = " ".join(output.split())[-300:]
            raise DeployError(915, f"flwr build: must give one bundle, got {words!r}")
        return built[0].read_bytes()


def _build(folder: Path) -> str:
    done = subprocess.run(
        [str(Path(sys.executable).parent / "flwr"), "build"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout + done.stderr


def sha256(build: Callable[[Path], str] | None = None) -> str:
    """SHA-256 of the bundle, as hexadecimal text."""
    return hashlib.sha256(bundle(build)).hexdigest()
