"""Preparation of `fedge up` before its daemons start, in a process of its own that imports torch.

That process imports torch once, forks for the division of the data, and then remains as the one from which every
worker and coordinator is forked. It starts no thread, and reads no data itself: a worker inherits only the imports. The
command's own process, of which the daemons and the relays are forks, has neither.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final, NoReturn

from fedge.server.runs.directory import RunDirectory, prepare
from fedge.shared.cli.command import unexpected
from fedge.shared.config.federation import Config
from fedge.shared.daemon import fork_server, process, sockets
from fedge.shared.errors import ConfigError, DataError, DeployError, FedgeError, RunError, SiteError

_log = logging.getLogger(__name__)

#: Socket of the process, below the run directory.
SOCKET: Final = Path("federation") / "fork.sock"
#: Imports of the data's division, the worker and the coordinator.
_IMPORTS: Final = (
    "flwr.superlink.runtime.run_serverapp",
    "fedge.client.worker.process",
    "fedge.server.app",
    "fedge.server.deployment.run_scheduler",
    "fedge.shared.privacy.checks.compatibility",
    "fedge.shared.tasks.dry_run",
)
_MAX_ANSWER: Final = 1 << 20
_BY_FAULT: Final = {2: ConfigError, 3: DataError, 4: SiteError, 5: RunError, 9: DeployError}


def error_of(code: int, message: str) -> FedgeError:
    """The error that another process has reported.

    Args:
        code: FE number.
        message: its text.
    """
    return _BY_FAULT.get(code // 100, FedgeError)(code, message)


@contextmanager
def prepared(config: Config, out: Path, *, resume: bool) -> Iterator[bool]:
    """Make the run directory, and every site's share of the data; within the block, serve forks at ``SOCKET``.

    Args:
        config: of the run.
        out: the run directory.
        resume: continue the run in ``out``, or start where there is none.

    Yields:
        Whether the run is finished already; then nothing is served.

    Raises:
        ConfigError, DataError: as ``simulate``.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_main, args=(config, out, resume, there))
    child.start()
    there.close()
    try:
        yield _finished(here)
    finally:
        here.close()
        child.terminate()
        child.join()


def _finished(here: Connection) -> bool:
    try:
        answer = json.loads(here.recv_bytes(_MAX_ANSWER))
    except EOFError:
        answer = {"code": 104, "message": "the preparation ended without a word"}
    if "code" in answer:
        raise error_of(answer["code"], answer["message"])
    return bool(answer["finished"])


def _main(config: Config, out: Path, resume: bool, there: Connection) -> None:
    """The process: import, divide the data in a fork, report, serve."""
    from fedge.client.deployment.daemon import WORKER
    from fedge.server.deployment import run_scheduler
    from fedge.server.deployment.run_scheduler import COORDINATOR

    process.die_with_parent()
    process.set_title(f"fedge imports --out {out}")
    with suppress(KeyboardInterrupt):  # the command has it too, and says so
        _import(config)
        answer = _in_a_fork(lambda: _divide(config, out, resume))
        if json.loads(answer or "{}").get("finished") is False:
            (out / SOCKET).parent.mkdir(exist_ok=True)
            try:
                listener = sockets.listen(out / SOCKET)
            except FedgeError as error:
                there.send_bytes(json.dumps(_error_answer(error)).encode())
                return
            with listener:
                there.send_bytes(answer)
                there.close()
                try:
                    fork_server.serve(listener, {WORKER: _worker, COORDINATOR: run_scheduler.play})
                except RuntimeError as error:
                    # A task's package has started a thread: every worker imports for itself, which takes longer.
                    _log.warning("nothing is forked: %s", error)
        elif answer:
            there.send_bytes(answer)


def _import(config: Config) -> None:
    """Import what the forks need; none of it may start a thread."""
    process.preload(_IMPORTS)
    from fedge.shared.tasks.registry import get_task

    # A faulty task is reported by the process that checks it.
    with suppress(FedgeError):
        get_task(config.task.name)


def _worker(arguments: Sequence[str]) -> int:
    from fedge.client.worker import process as worker_process
    from fedge.shared.cli.command import guarded

    return guarded("fedge worker", lambda: worker_process.main(Path(arguments[0])))


def _in_a_fork(work: Callable[[], bool]) -> bytes:
    """The result of some work in a fork, as JSON; empty if it died. Its data and threads end with the fork."""
    here, there = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(here)
        _report(work, there)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        answer = pipe.read(_MAX_ANSWER)
    os.waitpid(pid, 0)
    return answer


def _report(work: Callable[[], bool], there: int) -> NoReturn:
    process.die_with_parent()
    answer: dict[str, object]
    try:
        try:
            answer = {"finished": work()}
        except FedgeError as error:
            answer = _error_answer(error)
        except KeyboardInterrupt:
            answer = {"code": 103, "message": "interrupted"}
        except Exception as error:
            answer = _error_answer(unexpected("fedge up", error))
        os.write(there, json.dumps(answer).encode())
    finally:
        os._exit(0)


def _error_answer(error: FedgeError) -> dict[str, object]:
    return {"code": error.code, "message": error.message}


def _divide(config: Config, out: Path, resume: bool) -> bool:
    """Make the run directory, and every site's share of the data; whether the run is finished already."""
    from fedge.client.data import npy_files
    from fedge.client.data.dataset import site_shares
    from fedge.server.runs import results
    from fedge.shared.compile.onnx_export import require_exportable
    from fedge.shared.privacy.checks.compatibility import require_compatible
    from fedge.shared.tasks.dry_run import check
    from fedge.shared.tasks.registry import get_task

    task = get_task(config.task.name)
    if not RunDirectory(out).says_finished():
        check(task)
        require_exportable(task)
        require_compatible(config.privacy, task, config.secure_aggregation.min_sites)
    shares = site_shares(config, task)
    directory, finished = prepare(out, config, resume=resume)
    if finished:
        results.restore(directory)
        return True
    for name, data in shares.items():
        place = out / "sites" / name
        if not (place / "site.toml").exists():
            place.mkdir(parents=True, exist_ok=True)
            npy_files.write(place / "share", data)
    return False


__all__ = ["SOCKET", "error_of", "prepared"]
