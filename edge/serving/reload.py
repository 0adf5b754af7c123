"""Swaps in a changed bundle while the old one serves; a refused one changes nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from fedge.edge.serving.loaded_model import Served
from fedge.edge.serving.service import Service
from fedge.edge.serving.usage_counters import Counts
from fedge.shared.errors import BundleError, FedgeError, UsageError, one_line

Seen: TypeAlias = tuple[int, int, int, int] | None

_log = logging.getLogger(__name__)


class Reloader:
    """Polls a file, and loads it once it has changed and then stayed the same for one poll.

    Args:
        path: the file to watch.
        seen: state of the file by ``look``, from before the current model was loaded.
        load: verifies and loads the current bundle; raises ``FedgeError``.
        service: gets the new model.
        counts: records the outcome.
        allow_older: take a bundle with a lower serial than the one that serves. Unsafe: an old one stays signed, so
            that whoever can write the file can put back a model that was replaced for its faults.
    """

    def __init__(
        self,
        path: Path,
        seen: Seen,
        load: Callable[[], Served],
        service: Service,
        counts: Counts,
        *,
        allow_older: bool = False,
    ) -> None:
        self._allow_older = allow_older
        self._path = path
        self._load = load
        self._service = service
        self._counts = counts
        self._taken = self._last = seen
        self._lock = threading.Lock()
        self._ended = False

    def changed(self) -> bool:
        """Look once; returns whether there is something to load."""
        seen, before = look(self._path), self._last
        self._last = seen
        # A file that is still being written changes from one look to the next.
        return seen is not None and seen != self._taken and seen == before

    def poll(self) -> bool:
        """Look once, and load a changed bundle; returns whether another model serves now."""
        return self.changed() and self.reload()

    def end(self) -> None:
        """Prevent any further swap, even to a model that is being loaded."""
        with self._lock:
            self._ended = True

    def reload(self) -> bool:
        """Load the bundle now; returns whether another model serves now."""
        self._taken = look(self._path)
        old = self._service.served
        try:
            new = self._load()
            task = new.signature.name
            if task != old.signature.name:
                new.retire()
                raise BundleError(
                    706,
                    f"manifest.json: task must be {old.signature.name!r}, got {task!r}",
                    remedy="Give each task a server of its own; clients of this one know its inputs.",
                )
            serial, least = new.model.manifest.serial, old.model.manifest.serial
            if serial < least and not self._allow_older:
                new.retire()
                raise BundleError(
                    713,
                    f"serial: must be {least} or more, got {serial}",
                    remedy="Give a newer bundle, or start the server with --allow-older.",
                )
        except FedgeError as error:
            self._refused(error)
            return False
        except Exception as error:
            self._refused(UsageError(104, f"reload: unexpected {type(error).__name__}"))
            return False
        with self._lock:
            if not self._ended:
                self._service.served = new
        if self._service.served is not new:
            new.retire()
            return False
        old.retire()
        self._counts.reloaded("swapped")
        manifest = new.model.manifest
        _log.info(
            "serving run %s, version %s, by %s",
            manifest.run,
            new.signature.version,
            new.model.backend,
        )
        return True

    def _refused(self, error: FedgeError) -> None:
        self._counts.reloaded("refused")
        _log.error("the changed bundle is refused, the old one serves on: %s", one_line(error))


class Background:
    """Reloads in a thread of its own, one at a time, so that the caller never waits.

    Args:
        reloader: called in that thread, except for ``changed``.
    """

    def __init__(self, reloader: Reloader) -> None:
        self._reloader = reloader
        self._thread: threading.Thread | None = None
        self._requested = False

    @property
    def busy(self) -> bool:
        """Whether a bundle is being loaded now."""
        return self._thread is not None and self._thread.is_alive()

    def ask(self) -> None:
        """Load the bundle, at once or, where one is being loaded, at a later ``step``."""
        self._requested = True
        self.step(watch=False)

    def step(self, *, watch: bool) -> None:
        """Start a requested reload.

        Args:
            watch: look at the file too, and load a changed bundle.
        """
        if self.busy or not (self._requested or (watch and self._reloader.changed())):
            return
        self._requested = False
        self._thread = threading.Thread(
            target=self._reloader.reload, name="fedge-reload", daemon=True
        )
        self._thread.start()


def look(path: Path) -> Seen:
    """Device, inode, size and modification time in ns of a file, to detect changes; None if it is missing."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
