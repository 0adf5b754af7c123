"""A patch of a private function of Flower: check a bundle before any of its code runs.

Flower offers no public way to approve bundles by hash (``--trusted-entities`` knows only those of its hub). In
``flwr-clientapp`` and in ``flwr-serverapp`` the bundle's bytes pass through ``install_from_fab``; we wrap it,
at a site to check its policy, at the server to run no code but the installed one.

A test names the Flower versions for which both were read.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

#: Flower's releases whose modules below were read for this.
READ: Final = ("1.41", "1.42")
CLIENT_APP: Final = "flwr.supernode.runtime.run_clientapp"
SERVER_APP: Final = "flwr.superlink.runtime.run_serverapp"

_PLACE: Final = "install_from_fab"


def before_bundle(module: str, approve: Callable[[bytes], None]) -> None:
    """Have ``approve`` called with a bundle's bytes before it is unpacked in this process.

    Args:
        module: ``CLIENT_APP`` or ``SERVER_APP``.
        approve: raises to refuse; Flower then ends the task, and nothing of the bundle is unpacked or run.

    Raises:
        AttributeError: this release of Flower has no such function, so nothing could be checked.
    """
    flower_module = import_module(module)
    install: Any = getattr(flower_module, _PLACE)

    def checked(fab_file: Path | bytes, *args: Any, **options: Any) -> Path:
        content = fab_file if isinstance(fab_file, bytes) else fab_file.read_bytes()
        approve(content)
        installed: Path = install(content, *args, **options)
        return installed

    setattr(flower_module, _PLACE, checked)
