"""One gRPC server process: its services, health, reflection, metrics page, and how it ends.

The end is a drain: health says NOT_SERVING, no new call is taken, calls in flight finish within the grace, watches end,
and the process leaves with 0. What is still running when the grace is over is cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import CollectorRegistry

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.calls import CallInterceptor, Guard
from holdfast_core.runtime.channels import SERVER_OPTIONS, check_bind
from holdfast_core.runtime.clock import Clock, SystemClock
from holdfast_core.runtime.health import HealthService
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metrics import CallMetrics, MetricsPage, new_registry, serve_metrics
from holdfast_core.runtime.options import UNIX_SCHEME, TlsFiles, format_address, is_loopback, parse_address
from holdfast_core.runtime.signals import termination_signals
from holdfast_core.runtime.tls import TlsReader, server_credentials

DRAIN_GRACE_S: Final = 10.0

_HEALTH_NAME: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class ServiceHost:
    """A gRPC server that is built up with `add`, started once and stopped once. Made inside its event loop.

    Attributes:
        registry: where the process's metrics are registered; services add theirs.
    """

    def __init__(
        self,
        name: str,
        *,
        bind: str,
        tls: TlsFiles | None = None,
        metrics_bind: str | None = None,
        registry: CollectorRegistry | None = None,
        clock: Clock | None = None,
        guard: Guard | None = None,
        plaintext_on_network: bool = False,
    ) -> None:
        """Prepare a server called `name` (for its log) on `bind`, HOST:PORT with port 0 for a free one, or unix:PATH.

        `plaintext_on_network` lets it speak plain text to other machines.

        Raises:
            HoldfastError: INVALID_ARGUMENT if it would do so without being told (see `check_bind`).
        """
        check_bind(bind, tls, plaintext_on_network=plaintext_on_network)
        self.registry = registry if registry is not None else new_registry()
        self._bind = bind
        self._tls = tls
        self._metrics_bind = metrics_bind
        self._metrics_page: MetricsPage | None = None
        self._log = get_log(name)
        self._calls = CallInterceptor(
            metrics=CallMetrics(self.registry),
            log=self._log,
            clock=clock if clock is not None else SystemClock(),
            guard=guard,
        )
        self._server = grpc.aio.server(interceptors=(self._calls,), options=SERVER_OPTIONS)
        self._names: list[str] = []
        self._health: HealthService | None = None
        self._address = bind

    @property
    def address(self) -> str:
        """HOST:PORT or unix:PATH that it listens on; the port is known after `start`."""
        return self._address

    @property
    def metrics_port(self) -> int | None:
        """TCP port of the metrics page, or None where there is none."""
        return self._metrics_page.port if self._metrics_page is not None else None

    def add(
        self,
        register: Callable[[Any, Any], None],
        servicer: object,
        full_service_name: str,
        *,
        endless_methods: Sequence[str] = (),
    ) -> None:
        """Add a service, e.g. `add(add_StateServiceServicer_to_server, StateService(...), "holdfast.v1.StateService")`.

        `endless_methods` names its watches: streams that would never end by themselves, which the drain ends last.
        """
        register(servicer, self._server)
        self._names.append(full_service_name)
        for method in endless_methods:
            self._calls.mark_endless(f"/{full_service_name}/{method}")

    async def start(self) -> int:
        """Listen, and return the port (0 for a Unix socket).

        Raises:
            HoldfastError: CONFLICT if the address is taken or is not this machine's, INVALID_ARGUMENT for TLS files
                that cannot be used.
        """
        self._health = HealthService(self._names)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*self._names, _HEALTH_NAME, reflection.SERVICE_NAME), self._server)
        self._calls.mark_endless(f"/{reflection.SERVICE_NAME}/ServerReflectionInfo")
        port = self._listen()
        if self._metrics_bind is not None:
            self._metrics_page = serve_metrics(self._metrics_bind, self.registry)
        await self._server.start()
        if self._bind.startswith(UNIX_SCHEME):
            port = 0
        else:
            self._address = format_address(parse_address(self._bind)[0], port)
        self._log.info("started", address=self._address, tls=self._tls is not None, metrics_port=self.metrics_port)
        if self._tls is None:
            self._tell_of_plain_text()
        return port

    def _tell_of_plain_text(self) -> None:
        if is_loopback(self._bind):
            self._log.info("plain text on this machine only; give --tls-ca, --tls-cert and --tls-key to serve others")
        else:
            self._log.warning(
                "plain text to other machines: whoever sits between reads and changes what passes; credentials and "
                "keys are not taken or released on such connections",
                address=self._address,
            )

    async def stop(self, grace_s: float = DRAIN_GRACE_S) -> None:
        """Drain and end, within `grace_s` seconds."""
        self._log.info("draining", grace_s=grace_s)
        if self._health is not None:
            self._health.drain()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._server.stop(grace_s))
            group.create_task(self._end_watches(grace_s))
            if self._metrics_page is not None:
                group.create_task(self._metrics_page.close())
        self._log.info("stopped")

    def _listen(self) -> int:
        try:
            if self._tls is None:
                return self._server.add_insecure_port(self._bind)
            reader = TlsReader(self._tls, notice=lambda text: self._log.info("tls", message=text))
            return self._server.add_secure_port(self._bind, server_credentials(reader))
        except RuntimeError as error:
            raise HoldfastError(
                ErrorCode.CONFLICT,
                f"{self._bind} cannot be listened on; another program may have it; choose another address",
            ) from error

    async def _end_watches(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self._calls.wait_idle()
        except TimeoutError:
            self._log.warning("grace over", grace_s=grace_s)
        self._calls.end_endless()


async def run_until_signalled(
    host: ServiceHost,
    *,
    on_started: Callable[[str], Awaitable[None] | None] | None = None,
    grace_s: float = DRAIN_GRACE_S,
) -> None:
    """Start `host`, call `on_started` with its address, and drain it when SIGTERM or SIGINT comes.

    Raises:
        HoldfastError: as `ServiceHost.start`.
    """
    with termination_signals() as asked:
        await host.start()
        try:
            if on_started is not None:
                pending = on_started(host.address)
                if pending is not None:
                    await pending
            await asked.wait()
        finally:
            await host.stop(grace_s)
