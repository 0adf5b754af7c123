"""`fedge-edge serve`: answers inference requests over gRPC until a signal stops it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final

from fedge.edge.commands.arguments import open_trusted
from fedge.edge.serving.options import add_options, limits_of
from fedge.shared.cli.command import Command

if TYPE_CHECKING:
    from fedge.edge.serving.loaded_model import Limits, Served
    from fedge.edge.serving.metrics import MetricsServer
    from fedge.edge.serving.reload import Background
    from fedge.edge.serving.service import Service
    from fedge.edge.serving.usage_counters import Counts

_log = logging.getLogger(__name__)

#: Seconds between two looks at the bundle's file.
LOOK: Final = 1.0


def _run(arguments: Namespace) -> int:
    # Otherwise any client can fill the log with grpc's lines on each failed handshake.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    from fedge.edge.installation.folder import watched
    from fedge.edge.serving import credentials
    from fedge.edge.serving.reload import Background, Reloader, look
    from fedge.edge.serving.server import InferenceServer
    from fedge.edge.serving.service import Service
    from fedge.edge.serving.usage_counters import Counts

    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    where = credentials.address(arguments.listen, "--listen")
    tls = credentials.credentials(arguments.tls_cert, arguments.tls_key, arguments.client_ca)
    limits = limits_of(arguments)
    counts = Counts()
    load = _loader(arguments, limits, counts)
    signals = _signals()
    path = watched(arguments.bundle)
    seen = look(path)
    service = Service(load(), limits.deadline, counts)
    metrics = _metrics(arguments.metrics, service, counts)
    server = InferenceServer(
        service,
        where,
        tls,
        max_bytes=service.served.max_bytes,
        in_flight=limits.in_flight,
        insecure=arguments.insecure,
    )
    kind = "plaintext" if tls is None else "mTLS" if arguments.client_ca else "TLS"
    _announce(f"{server.address} ({kind})", metrics, service.served)
    if tls is None and not where.loopback:
        _log.warning("--insecure: anybody on the network can read and forge requests and answers")

    if arguments.allow_older:
        _log.warning("--allow-older: whoever can write the bundle can put back an older model")
    reloader = Reloader(path, seen, load, service, counts, allow_older=arguments.allow_older)
    loading = Background(reloader)
    _until_stopped(signals, loading, service, watch=arguments.watch)

    _log.info("stopping")
    reloader.end()
    drained = server.stop(limits.deadline)
    if metrics is not None:
        metrics.close()
    if not drained:
        _log.warning("some requests were not answered within %g s", limits.deadline)
    if not drained or loading.busy:
        # Python would wait for the threads, and so for a run or a load that may never end.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    service.served.retire()
    return 0


def _metrics(listen: str | None, service: Service, counts: Counts) -> MetricsServer | None:
    """The server of the metrics, if an address for it is given."""
    if not listen:
        return None
    from fedge.edge.serving import credentials
    from fedge.shared.cli.command import missing_extra

    with missing_extra("fedge-edge serve --metrics", "serve"):
        from fedge.edge.serving.metrics import MetricsServer
    return MetricsServer(credentials.address(listen, "--metrics"), service, counts)


def _announce(where: str, metrics: MetricsServer | None, served: Served) -> None:
    """Print the addresses to stdout, and log the model."""
    sys.stdout.write(f"listening on {where}\n")
    if metrics is not None:
        sys.stdout.write(f"metrics on http://{metrics.address}/metrics\n")
    sys.stdout.flush()
    _log.info(
        "serving %s, run %s, version %s, by %s: %s",
        served.signature.name,
        served.model.manifest.run,
        served.signature.version,
        served.model.backend,
        served.model.why,
    )


def _until_stopped(
    signals: SimpleQueue[int], loading: Background, service: Service, *, watch: bool
) -> None:
    while True:
        try:
            if signals.get(timeout=LOOK) != signal.SIGHUP:
                return
            loading.ask()
        except Empty:
            loading.step(watch=watch)
        service.end_stalled()


def _loader(arguments: Namespace, limits: Limits, counts: Counts) -> Callable[[], Served]:
    """A function that verifies and loads the current bundle."""
    from fedge.edge.inputs.reader import read_statistics
    from fedge.edge.runtime.model import EdgeModel
    from fedge.edge.serving.loaded_model import Served
    from fedge.shared.errors import BundleError

    keys: set[str] = set()

    def load() -> Served:
        bundle, record = open_trusted(arguments)
        if bundle.key_id not in (keys or {bundle.key_id}):
            raise BundleError(703, "--trust: must hold the key that the server began with")
        # At the start there is no running model that a bad graph could end.
        rehearsed = bool(keys)
        keys.add(bundle.key_id)
        statistics = read_statistics(arguments.statistics) if arguments.statistics else None
        model = EdgeModel.from_bundle(
            bundle,
            threads=arguments.threads,
            statistics=statistics,
            record=record,
            rehearsed=rehearsed,
        )
        return Served(model, limits, counts, bundle.parts[1].sha256)

    return load


def _signals() -> SimpleQueue[int]:
    """A queue of the signals to come, by number."""
    signals: SimpleQueue[int] = SimpleQueue()  # the one queue that a signal handler may put into
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda number, _frame: signals.put(number))
    return signals


COMMAND = Command(
    summary="answer inference requests over gRPC (KServe v2, the Open Inference Protocol)",
    extra="edge",
    arguments=add_options,
    run=_run,
    epilog=(
        "SIGHUP loads the bundle again; SIGTERM answers what has begun and ends\n\n"
        "example:\n  fedge-edge serve model.fedge --trust release.key.pub --listen 127.0.0.1:8001"
    ),
)
