"""Prometheus metrics: what every service counts of its calls, and the page that a scraper reads.

Each process has one registry of its own (never the library's global one, so that several services can live in a test's
process). Labels are names of methods and statuses, whose number is fixed; never names that callers choose.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Final
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    start_http_server,
)

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import format_address, parse_address

# Seconds. A HasBlocks takes a millisecond, a long put stream minutes.
CALL_SECONDS_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 600.0)
# Seconds of one durable write to disk.
SYNC_SECONDS_BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


def new_registry() -> CollectorRegistry:
    """Return a registry that reports the process (memory, CPU, open files) and waits for the service's own metrics."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    return registry


class CallMetrics:
    """Calls by method and status, their duration, and how many are in flight."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._calls = Counter(
            "holdfast_calls", "Calls answered, by method and gRPC status.", ("method", "status"), registry=registry
        )
        self._seconds = Histogram(
            "holdfast_call_seconds",
            "Time from a call's start to its end.",
            ("method",),
            buckets=CALL_SECONDS_BUCKETS,
            registry=registry,
        )
        self._in_flight = Gauge("holdfast_calls_in_flight", "Calls being handled.", registry=registry)

    def begin(self) -> None:
        """Count a call that starts."""
        self._in_flight.inc()

    def end(self, method: str, *, status: str, seconds: float) -> None:
        """Count a call that ends."""
        self._in_flight.dec()
        self._calls.labels(method, status).inc()
        self._seconds.labels(method).observe(seconds)


class MetricsPage:
    """The registry served over HTTP, from a thread of its own so that a busy event loop does not hide itself."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread

    @property
    def port(self) -> int:
        """The TCP port that it listens on."""
        return int(self._server.server_port)

    async def close(self) -> None:
        """Stop serving and free the port."""
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(bind: str, registry: CollectorRegistry) -> MetricsPage:
    """Serve `registry` at http://`bind`/metrics; port 0 takes a free one. No secrets are in it: any address is allowed.

    Raises:
        HoldfastError: INVALID_ARGUMENT for an address of another form, CONFLICT if it cannot be listened on.
    """
    host, port = parse_address(bind)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise HoldfastError(
            ErrorCode.CONFLICT,
            f"metrics cannot be served on {format_address(host, port)}: {error.strerror}; choose another address",
        ) from error
    return MetricsPage(server, thread)
