"""The ServerApp that Flower runs: it opens the run's directory and plays the rounds over Flower's Grid.

Without a listener in this process, the progress goes to RUN/events.jsonl and the log to standard error. A run that
an error of fedge ends leaves RUN/stopped.json, and the error is raised: Flower must not take it for a success.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedge.server.runs import events, results
from fedge.server.runs import listener as listeners
from fedge.server.runs.directory import RunDirectory
from fedge.server.training.run import run
from fedge.server.transport.grid_wrappers import PackedGrid
from fedge.shared.errors import ConfigError, FedgeError

_log = logging.getLogger(__name__)

app = ServerApp()

#: Environment variable by which the server's daemon names the folder of its runs.
RUNS = "FEDGE_RUNS"
#: The same for its file of sites and their nodes.
NODES = "FEDGE_NODES"
#: Errors that mean that another process has the run, or that there is no such run: then nothing has stopped.
_NOT_OURS = (208, 209)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run, or continue, the federation of ``run-dir`` in Flower's run configuration.

    Args:
        grid: Flower's grid, whose nodes are the sites.
        context: Flower's context, with the run configuration.

    Raises:
        FedgeError: the run stopped; RUN/stopped.json says why.
    """
    directory = RunDirectory(Path(str(context.run_config["run-dir"])))
    listener = listeners.current()
    try:
        _require_ours(directory.path)
        with directory.lock(), _logged(directory, quiet=listener is not None), _terminable():
            if listener is None:
                log = events.EventLog(directory.path / events.NAME)
                run(
                    PackedGrid(grid),
                    directory,
                    context.run_id,
                    log,
                    admitted_nodes=_admitted_nodes(),
                )
            else:
                run(grid, directory, context.run_id, listener)
    except FedgeError as error:
        if error.code not in _NOT_OURS:
            _log.error("the run stopped: %s", error)
            results.stop(directory, error)
        raise


def _require_ours(path: Path) -> None:
    """Check that a directory is a run of this server: a client of Flower's Control API can name any directory.

    Raises:
        ConfigError: 209, it is not.
    """
    runs = os.environ.get(RUNS)
    if not path.is_dir() or (runs and path.parent != Path(runs)):
        raise ConfigError(209, f"{path.name}: must be a run of this server, got another folder")


def _admitted_nodes() -> Callable[[], Mapping[str, str]] | None:
    """A function that reads the daemon's file of sites and their nodes; None where no daemon started this process."""
    path = os.environ.get(NODES)
    if path is None:
        return None

    def read() -> Mapping[str, str]:
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return {str(name): str(entry.get("node")) for name, entry in entries.items()}

    return read


@contextmanager
def _logged(directory: RunDirectory, *, quiet: bool) -> Iterator[None]:
    """Send fedge's log to standard error, with the run in each line; ``quiet`` where a command has its own."""
    if quiet:
        yield
        return
    logger, handler = logging.getLogger("fedge"), logging.StreamHandler(sys.stderr)
    name = directory.path.name.replace("%", "%%")
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s %(levelname)s run {name} %(name)s: %(message)s")
    )
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the run as an interrupt does, unless a handler (Flower's) is installed already."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
