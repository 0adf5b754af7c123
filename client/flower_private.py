"""The one private touch of Flower at a site: look at a bundle before a line of it runs.

Flower offers a site no public way to approve bundles by hash (``--trusted-entities`` knows only those of its hub).
In ``flwr-clientapp`` the bundle's bytes pass through ``install_from_fab``; we stand in front of it. A test names the
Flower version for which that was read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

#: Flower's releases whose ``run_clientapp`` was read for this.
READ: Final = ("1.41",)
_PLACE: Final = "install_from_fab"


def before_bundle(approve: Callable[[str], None]) -> None:
    """Have ``approve`` called with the SHA-256 of a bundle before it is unpacked in this process.

    Args:
        approve: raises to refuse; Flower then answers with an error, and nothing of the bundle is unpacked or run.

    Raises:
        AttributeError: this release of Flower has no such place, so nothing could be checked.
    """
    from flwr.supernode.runtime import run_clientapp

    install: Any = getattr(run_clientapp, _PLACE)

    def checked(fab_file: Path | bytes, *args: Any, **options: Any) -> Path:
        content = fab_file if isinstance(fab_file, bytes) else fab_file.read_bytes()
        approve(hashlib.sha256(content).hexdigest())
        installed: Path = install(content, *args, **options)
        return installed

    setattr(run_clientapp, _PLACE, checked)
