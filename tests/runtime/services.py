"""A real service with one method of each streaming kind, and hosts that run it on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.options import TlsFiles
from holdfast_core.runtime.requests import current_request_id
from holdfast_core.runtime.server import ServiceHost
from holdfast_proto.v1 import blocks_pb2, blocks_pb2_grpc

SERVICE_NAME = "holdfast.v1.BlockService"


class EchoBlocks(blocks_pb2_grpc.BlockServiceServicer):
    """Speaks the block service's contract without keeping anything.

    Requests carry what to do: PutBlocks answers each message with its own sequence; `error` is raised by every method
    where set; GetNodeStatus waits for `gate` where set and answers the request id that its handler saw.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.gate: asyncio.Event | None = None
        self.entered = asyncio.Event()
        self.calls = 0
        self.seen_request_id = ""

    def _begin(self) -> None:
        self.calls += 1
        self.seen_request_id = current_request_id()
        self.entered.set()
        if self.error is not None:
            raise self.error

    async def GetNodeStatus(
        self, request: blocks_pb2.GetNodeStatusRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> blocks_pb2.GetNodeStatusResponse:
        self._begin()
        if self.gate is not None:
            await self.gate.wait()
        response = blocks_pb2.GetNodeStatusResponse()
        response.status.node_id = current_request_id()
        return response

    async def PutBlocks(
        self,
        request_iterator: AsyncIterator[blocks_pb2.PutBlocksRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[blocks_pb2.PutBlocksResponse]:
        async for request in request_iterator:
            yield blocks_pb2.PutBlocksResponse(sequence=request.sequence)
            self._begin()

    async def GetBlocks(  # type: ignore[override]  # generated stubs know only generators
        self, request: blocks_pb2.GetBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        """The other way to write a response stream: a coroutine that writes itself."""
        await context.write(blocks_pb2.GetBlocksResponse(first=1))
        self._begin()
        await context.write(blocks_pb2.GetBlocksResponse(first=2))

    async def ScanBlocks(
        self, request: blocks_pb2.ScanBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[blocks_pb2.ScanBlocksResponse]:
        """A watch: sends one message and then nothing until it is ended."""
        yield blocks_pb2.ScanBlocksResponse(block_ids=b"1")
        self._begin()
        await asyncio.Event().wait()

    async def HasBlocks(
        self, request: blocks_pb2.HasBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> blocks_pb2.HasBlocksResponse:
        self._begin()
        return blocks_pb2.HasBlocksResponse()

    async def DeleteBlocks(
        self, request: blocks_pb2.DeleteBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> blocks_pb2.DeleteBlocksResponse:
        self._begin()
        return blocks_pb2.DeleteBlocksResponse()


class CountRequests:
    """A stream-unary method, which no service of ours has: counts the bytes that came in."""

    def __init__(self) -> None:
        self.error: HoldfastError | None = None

    async def Count(self, request_iterator: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        count = 0
        async for request in request_iterator:
            count += len(request)
        if self.error is not None:
            raise self.error
        return str(count).encode()


def add_count_requests(servicer: CountRequests, server: grpc.aio.Server) -> None:
    """Register `CountRequests` by hand, as generated code would."""
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(
                "test.Counting", {"Count": grpc.stream_unary_rpc_method_handler(servicer.Count)}
            ),
        )
    )


@asynccontextmanager
async def running_host(
    servicer: EchoBlocks | None = None,
    *,
    bind: str = "127.0.0.1:0",
    tls: TlsFiles | None = None,
    metrics_bind: str | None = None,
    counting: CountRequests | None = None,
) -> AsyncIterator[ServiceHost]:
    """Run a host with `EchoBlocks` and yield it; it is stopped at once when the block ends."""
    host = ServiceHost("test", bind=bind, tls=tls, metrics_bind=metrics_bind)
    host.add(
        blocks_pb2_grpc.add_BlockServiceServicer_to_server,
        servicer if servicer is not None else EchoBlocks(),
        SERVICE_NAME,
        endless_methods=("ScanBlocks",),
    )
    if counting is not None:
        host.add(add_count_requests, counting, "test.Counting")
    await host.start()
    try:
        yield host
    finally:
        await host.stop(0)


def refusal(code: ErrorCode = ErrorCode.BUSY) -> HoldfastError:
    """Return an error with every field filled."""
    return HoldfastError(code, f"what {code.name} means", facts={"seconds_left": "12"}, block_ids=[bytes(range(32))])
