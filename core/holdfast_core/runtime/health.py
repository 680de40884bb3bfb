"""The standard health service `grpc.health.v1.Health`, for load balancers, container engines and people.

Every service of a process shares one state: SERVING until the drain begins, NOT_SERVING from then on. A watcher is
told of the drain and its stream then ends by itself, so that watchers never hold up the end of a process; gRPC's own
servicer keeps them open until they are cancelled, and a cancelled write may lose the news.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from holdfast_core.model.errors import ErrorCode, HoldfastError

_STATUS = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package ships no types
    """Answers for the whole process under "" and for each of its services by full name."""

    def __init__(self, service_names: Iterable[str]) -> None:
        self._names = frozenset(("", *service_names))
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Answer NOT_SERVING from now on, and end all watches."""
        self._draining.set()

    async def Check(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """Answer whether a service serves.

        Raises:
            HoldfastError: NOT_FOUND for a service that this process does not have, as the standard says.
        """
        if request.service not in self._names:
            raise HoldfastError(ErrorCode.NOT_FOUND, f"this server has no service {request.service!r}")
        return _STATUS(status=self._status())

    async def Watch(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
        """Send the state now and when it changes. An unknown service is SERVICE_UNKNOWN for good."""
        if request.service not in self._names:
            yield _STATUS(status=_STATUS.SERVICE_UNKNOWN)
            await self._draining.wait()
            return
        yield _STATUS(status=self._status())
        if not self._draining.is_set():
            await self._draining.wait()
            yield _STATUS(status=_STATUS.NOT_SERVING)

    def _status(self) -> Any:
        return _STATUS.NOT_SERVING if self._draining.is_set() else _STATUS.SERVING
