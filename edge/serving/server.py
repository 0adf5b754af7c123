"""The gRPC server around the service: limits, address, and a graceful stop."""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import grpc

from fedge.edge.serving.credentials import Address
from fedge.edge.serving.service import Service
from fedge.shared.errors import DeployError

#: Most connections, and most calls on each.
MAX_CONNECTIONS: Final = 256
MAX_STREAMS: Final = 256
#: Threads beyond those that wait or run: for calls that arrive, answer or are refused.
SPARE_THREADS: Final = 8
#: Most threads, whatever the limits ask for.
MAX_THREADS: Final = 1024
#: A message up to this much too large is refused by number; grpc refuses larger ones in its own words.
OVERSIZE: Final = 2**20
_METADATA: Final = 8192

_log = logging.getLogger(__name__)


class InferenceServer:
    """A gRPC server that listens from its construction until ``stop``.

    Args:
        service: answers the calls.
        where: address to listen on; port 0 takes any that is free.
        tls: from ``credentials.credentials``; None for plaintext.
        max_bytes: of one message.
        in_flight: requests that may wait or run at once; each has a thread, of which there are at most
            ``MAX_THREADS``.
        insecure: whether an address that other machines reach may be served without TLS.

    Attributes:
        address: where it listens.

    Raises:
        DeployError: 904, the address cannot be used; 920, other machines would reach it without TLS.
    """

    def __init__(
        self,
        service: Service,
        where: Address,
        tls: Any | None,
        *,
        max_bytes: int,
        in_flight: int,
        insecure: bool = False,
    ) -> None:
        if tls is None and not where.loopback and not insecure:
            raise DeployError(
                920, f"--listen: must be a loopback address without --tls-cert, got {where.host}"
            )
        threads = min(in_flight + SPARE_THREADS, MAX_THREADS)
        if threads < in_flight + SPARE_THREADS:
            _log.warning(
                "at most %d requests wait or run at once, not the %d of --max-queue + --parallel x"
                " --max-batch: each takes a thread",
                threads - SPARE_THREADS,
                in_flight,
            )
        service.max_arriving = threads // 2
        self._service = service
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fedge-infer")
        self._server = grpc.server(
            self._pool,
            handlers=service.handlers(),
            # Calls beyond the threads only wait to be refused.
            maximum_concurrent_rpcs=4 * threads,
            options=[
                ("grpc.max_receive_message_length", max_bytes + OVERSIZE),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_metadata_size", _METADATA),
                ("grpc.max_concurrent_streams", MAX_STREAMS),
                ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
                ("grpc.server_handshake_timeout_ms", 10_000),
                ("grpc.keepalive_time_ms", 60_000),
                ("grpc.keepalive_timeout_ms", 20_000),
                # Two servers on one port would share its connections without a word.
                ("grpc.so_reuseport", 0),
                # Identity only: a message that unpacks to a thousand times its size has no bound.
                ("grpc.compression_enabled_algorithms_bitset", 1),
            ],
        )
        try:
            if tls is None:
                port = self._server.add_insecure_port(str(where))
            else:
                port = self._server.add_secure_port(str(where), tls)
        except RuntimeError:
            port = 0
        if not port:
            self._pool.shutdown(wait=False)
            raise DeployError(904, f"--listen: {where} must be free and of this machine")
        self.address = Address(where.host, port)
        self._server.start()

    def stop(self, grace: float) -> bool:
        """Refuse new calls, wait for those that have begun, and close.

        Args:
            grace: seconds until calls in progress are aborted.

        Returns:
            Whether all have ended; where not, threads of this process still run.
        """
        self._service.ready = False
        self._service.end_streams()
        done: threading.Event = self._server.stop(grace)
        done.wait(grace + 1.0)
        # Not waited for: a run that hangs would never end it.
        self._pool.shutdown(wait=False, cancel_futures=True)
        end = time.monotonic() + 1.0
        while not (idle := self._service.served.idle) and time.monotonic() < end:
            time.sleep(0.01)
        return idle
