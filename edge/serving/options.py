"""Command-line options of `fedge-edge serve`."""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fedge.edge.commands.arguments import (
    MAX_THREADS,
    add_bundle,
    add_statistics,
    add_threads,
    real,
    whole,
)

if TYPE_CHECKING:
    from fedge.edge.serving.loaded_model import Limits

_MAX_BATCH: Final = 4096
_MAX_QUEUE: Final = 4096
_MAX_REQUEST: Final = 2**30
#: Runs at once without `--parallel`: beyond a few, more requests a second cost each of them time.
_MAX_PARALLEL: Final = 4


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `fedge-edge serve`."""
    add_bundle(parser)
    parser.add_argument(
        "--listen",
        default="127.0.0.1:8001",
        metavar="HOST:PORT",
        help="IP address and port, port 0 for any that is free (default 127.0.0.1:8001)",
    )
    parser.add_argument("--tls-cert", type=Path, metavar="PEM", help="the server's certificate")
    parser.add_argument("--tls-key", type=Path, metavar="PEM", help="its private key")
    parser.add_argument(
        "--client-ca",
        type=Path,
        metavar="PEM",
        help="let in only clients with a certificate of this authority (mTLS)",
    )
    parser.add_argument(
        "--insecure",
        action="store_true",
        help="allow an address that others reach without TLS: they can read and forge everything",
    )
    parser.add_argument(
        "--max-batch",
        type=whole(1, _MAX_BATCH),
        default=32,
        metavar="N",
        help="most examples in one request and in one run (default 32)",
    )
    parser.add_argument(
        "--batch-delay",
        type=real(0.0, 1000.0),
        default=0.0,
        metavar="MS",
        help="wait so long for more requests to run together (default 0: never wait)",
    )
    parser.add_argument(
        "--max-queue",
        type=whole(1, _MAX_QUEUE),
        default=64,
        metavar="N",
        help="most requests that wait; more are refused (default 64)",
    )
    parser.add_argument(
        "--deadline",
        type=real(0.001, 3600.0),
        default=10.0,
        metavar="S",
        help="most seconds of one request (default 10)",
    )
    parser.add_argument(
        "--max-request-bytes",
        type=whole(1024, _MAX_REQUEST),
        metavar="N",
        help="most bytes of one request (default: a full batch, at most 16 MiB)",
    )
    parser.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        help="Prometheus metrics on this loopback address (needs fedge[serve])",
    )
    add_threads(parser)
    parser.add_argument(
        "--parallel",
        type=whole(1, MAX_THREADS),
        metavar="N",
        help=f"most inferences at once, each with --threads (default: fill the cores, at most {_MAX_PARALLEL})",
    )
    add_statistics(parser)
    parser.add_argument(
        "--no-watch",
        dest="watch",
        action="store_false",
        help="do not look every second whether the bundle has changed; SIGHUP always does",
    )
    parser.add_argument(
        "--watch", action="store_true", default=True, help="look every second (default)"
    )
    parser.add_argument(
        "--allow-older",
        action="store_true",
        help="also take a changed bundle with a lower serial (unsafe: an old one stays signed)",
    )


def limits_of(arguments: Namespace) -> Limits:
    """The server's limits from its parsed options."""
    from fedge.edge.serving.loaded_model import Limits

    return Limits(
        max_batch=arguments.max_batch,
        max_queue=arguments.max_queue,
        parallel=arguments.parallel or _parallel(arguments.threads),
        batch_delay=arguments.batch_delay / 1e3,
        deadline=arguments.deadline,
        max_request_bytes=arguments.max_request_bytes,
    )


def _parallel(threads: int) -> int:
    """Number of parallel runs of ``threads`` each for which this process has cores."""
    own = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return max(1, min(_MAX_PARALLEL, len(own(0)) // threads))
