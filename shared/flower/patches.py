"""A patch of a private function of Flower: check a bundle before any of its code runs.

Flower offers no public way to approve bundles by hash (``--trusted-entities`` knows only those of its hub). In
``flwr-clientapp`` and in ``flwr-serverapp`` the bundle's bytes pass through ``install_from_fab``; we wrap it,
at a site to check its policy, at the server to run no code but the installed one. The folder from which code is loaded
is named by the run's record, which the server writes: ``get_project_dir`` is held to the one just unpacked.

A test names the Flower versions for which both were read.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from fedge.shared.errors import SiteError

#: Flower's releases whose modules below were read for this.
READ: Final = ("1.41", "1.42")
CLIENT_APP: Final = "flwr.supernode.runtime.run_clientapp"
SERVER_APP: Final = "flwr.superlink.runtime.run_serverapp"

_INSTALL: Final = "install_from_fab"
_PROJECT_DIR: Final = "get_project_dir"


def before_bundle(module: str, approve: Callable[[bytes], None]) -> None:
    """Have ``approve`` called with a bundle's bytes before it is unpacked, and no other folder's code loaded.

    Args:
        module: ``CLIENT_APP`` or ``SERVER_APP``.
        approve: raises to refuse; Flower then ends the task, and nothing of the bundle is unpacked or run.

    Raises:
        AttributeError: this release of Flower has no such functions, so nothing could be checked.
    """
    flower_module = import_module(module)
    install: Any = getattr(flower_module, _INSTALL)
    project_dir: Any = getattr(flower_module, _PROJECT_DIR)
    installed: list[Path] = []

    def checked(fab_file: Path | bytes, *args: Any, **options: Any) -> Path:
        content = fab_file if isinstance(fab_file, bytes) else fab_file.read_bytes()
        approve(content)
        folder: Path = install(content, *args, **options)
        installed[:] = [folder]
        return folder

    def same_folder(*args: Any, **options: Any) -> Path:
        # Flower takes id, version and hash from the run's record, and not from the bundle that was approved.
        folder: Path = project_dir(*args, **options)
        if [folder.resolve()] != [path.resolve() for path in installed]:
            raise SiteError(419, f"bundle: must be loaded from where it was unpacked, got {folder}")
        return folder

    setattr(flower_module, _INSTALL, checked)
    setattr(flower_module, _PROJECT_DIR, same_folder)
