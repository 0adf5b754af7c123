"""Exports the counters in Prometheus format on a loopback address."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.registry import Collector

from fedge.edge.serving.credentials import Address
from fedge.edge.serving.service import Service
from fedge.edge.serving.usage_counters import ROWS, SECONDS, Counts
from fedge.shared.errors import DeployError
from fedge.shared.files import reason

_PATH: Final = "/metrics"
_TIMEOUT: Final = 5.0


class _Collector(Collector):
    """Builds the metrics for each scrape."""

    def __init__(self, service: Service, counts: Counts) -> None:
        self._service = service
        self._counts = counts

    def collect(self) -> Iterator[Any]:
        counts, served = self._counts.snapshot(), self._service.served
        requests = CounterMetricFamily(
            "fedge_requests", "Inference requests that are over, by outcome.", labels=["code"]
        )
        for code, number in sorted(counts.requests.items()):
            requests.add_metric([code], number)
        yield requests
        yield _histogram(
            "fedge_request_seconds",
            "Time of an inference request in the server.",
            SECONDS,
            counts.latency,
            counts.seconds,
        )
        yield _histogram(
            "fedge_batch_rows",
            "Examples in one run of the model.",
            ROWS,
            counts.batches,
            counts.rows,
        )
        yield GaugeMetricFamily(
            "fedge_queue_length", "Requests that wait for a run.", value=served.waiting
        )
        manifest = served.model.manifest
        info = {
            "backend": served.model.backend,
            "task": manifest.task,
            "run": manifest.run,
            "model_sha256": manifest.model_sha256,
            "manifest_sha256": served.sha256,
        }
        yield InfoMetricFamily("fedge_model", "The model at work, and where it runs.", value=info)
        yield GaugeMetricFamily(
            "fedge_fallbacks",
            "Artefacts of the bundle that were tried before the one at work and do not work here.",
            value=len(served.model.fallbacks),
        )
        reloads = CounterMetricFamily(
            "fedge_reloads", "Changed bundles, by what became of them.", labels=["outcome"]
        )
        for outcome in ("swapped", "refused"):
            reloads.add_metric([outcome], counts.reloads.get(outcome, 0))
        yield reloads


def _histogram(
    name: str, text: str, bounds: Iterable[float], numbers: Iterable[int], total: float
) -> HistogramMetricFamily:
    edges = [*(str(float(bound)) for bound in bounds), "+Inf"]
    return HistogramMetricFamily(
        name,
        text,
        buckets=list(zip(edges, itertools.accumulate(numbers), strict=True)),
        sum_value=total,
    )


class MetricsServer:
    """Answers ``GET /metrics``, one client at a time, each within a few seconds.

    Args:
        where: a loopback address; port 0 takes any that is free.
        service: whose model is reported.
        counts: to export.

    Attributes:
        address: where it listens.

    Raises:
        DeployError: 904, the address is not loopback, or cannot be used.
    """

    def __init__(self, where: Address, service: Service, counts: Counts) -> None:
        if not where.loopback:
            raise DeployError(904, f"--metrics: must be a loopback address, got {where.host}")
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(service, counts))

        class Handler(BaseHTTPRequestHandler):
            timeout = _TIMEOUT

            def do_GET(self) -> None:
                if self.path.partition("?")[0] != _PATH:
                    self.send_error(404)
                    return
                body = generate_latest(registry)
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(HTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                """Ignore a client that disconnects."""

        if ":" in where.host:
            import socket

            Server.address_family = socket.AF_INET6
        try:
            self._server = Server((where.host, where.port), Handler)
        except OSError as error:
            raise DeployError(904, f"--metrics: {where} cannot be used ({reason(error)})") from None
        self.address = Address(where.host, int(self._server.server_address[1]))
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="fedge-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_TIMEOUT)
