"""What the interceptor adds to every kind of call, over a real server."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.calls import write_message
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.logs import configure_logs
from holdfast_core.runtime.requests import REQUEST_ID_KEY
from holdfast_core.runtime.server import ServiceHost
from holdfast_core.runtime.status import error_from_rpc, reaches_peer
from holdfast_proto.v1 import blocks_pb2, blocks_pb2_grpc
from tests.runtime.services import SERVICE_NAME, CountRequests, EchoBlocks, refusal, running_host


@dataclass(frozen=True, slots=True)
class Rig:
    """A running host and one way to make each kind of call; each returns what the client got."""

    host: ServiceHost
    channel: grpc.aio.Channel
    blocks: EchoBlocks
    counting: CountRequests

    @property
    def stub(self) -> blocks_pb2_grpc.BlockServiceAsyncStub:
        return blocks_pb2_grpc.BlockServiceStub(self.channel)

    async def unary_unary(self) -> list[int]:
        await self.stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest())
        return [1]

    async def unary_stream(self) -> list[int]:
        return [answer.first async for answer in self.stub.GetBlocks(blocks_pb2.GetBlocksRequest())]

    async def stream_stream(self) -> list[int]:
        requests = [blocks_pb2.PutBlocksRequest(sequence=number, blocks=b"x") for number in (1, 2, 3)]
        return [answer.sequence async for answer in self.stub.PutBlocks(iter(requests))]

    async def stream_unary(self) -> list[int]:
        count: Any = self.channel.stream_unary("/test.Counting/Count")
        return [int(await count(iter([b"ab", b"cde"])))]

    def fail_with(self, error: HoldfastError) -> None:
        self.blocks.error = self.counting.error = error

    async def ended(self) -> None:
        """Wait until the server's side of every call is over: its answer leaves before it is counted and logged."""
        async with asyncio.timeout(10):
            while self.metric("holdfast_calls_in_flight"):  # noqa: ASYNC110 - a gauge has no event
                await asyncio.sleep(0.001)

    def metric(self, name: str, **labels: str) -> float:
        return self.host.registry.get_sample_value(name, labels) or 0.0


KINDS: dict[str, tuple[Callable[[Rig], Awaitable[list[int]]], str, list[int]]] = {
    "unary-unary": (Rig.unary_unary, f"/{SERVICE_NAME}/GetNodeStatus", [1]),
    "unary-stream": (Rig.unary_stream, f"/{SERVICE_NAME}/GetBlocks", [1, 2]),
    "stream-stream": (Rig.stream_stream, f"/{SERVICE_NAME}/PutBlocks", [1, 2, 3]),
    "stream-unary": (Rig.stream_unary, "/test.Counting/Count", [5]),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def log_lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Send this test's logs to a buffer; calling the fixture parses them."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    stream = io.StringIO()
    configure_logs("test", level="debug", stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:] = before
    root.setLevel(level)


@pytest_asyncio.fixture
async def rig(log_lines: object) -> AsyncIterator[Rig]:
    blocks, counting = EchoBlocks(), CountRequests()
    async with running_host(blocks, counting=counting) as host:
        channel = open_channel(host.address)
        yield Rig(host=host, channel=channel, blocks=blocks, counting=counting)
        await channel.close()


@every_kind
async def test_a_call_is_answered_and_counted(rig: Rig, kind: str) -> None:
    call, method, answers = KINDS[kind]
    assert await call(rig) == answers
    await rig.ended()
    assert rig.metric("holdfast_calls_total", method=method, status="OK") == 1
    assert rig.metric("holdfast_call_seconds_count", method=method) == 1
    assert rig.metric("holdfast_calls_in_flight") == 0


@every_kind
async def test_an_error_of_ours_keeps_its_code(rig: Rig, kind: str) -> None:
    call, method, _ = KINDS[kind]
    rig.fail_with(refusal(ErrorCode.WRONG_EPOCH))
    # grpc.aio forgets what the server said when a write meets a stream that has just ended; then it is asked again.
    tries, received = 0, None
    while received is None or not reaches_peer(received):
        tries += 1
        assert tries <= 10, "the server was never heard"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(rig)
        received = error_from_rpc(caught.value, peer="test")
    assert (received.code, received.facts) == (ErrorCode.WRONG_EPOCH, {"seconds_left": "12"})
    await rig.ended()
    assert rig.metric("holdfast_calls_total", method=method, status="FAILED_PRECONDITION") == tries


async def error_behind_one_answer(stub: blocks_pb2_grpc.BlockServiceAsyncStub) -> HoldfastError:
    """Read a stream that has one answer and then an error."""
    call = stub.GetBlocks(blocks_pb2.GetBlocksRequest())
    first = await call.read()
    assert isinstance(first, blocks_pb2.GetBlocksResponse)
    assert first.first == 1
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    return error_from_rpc(caught.value, peer="test")


async def test_a_stream_delivers_what_came_before_its_error(rig: Rig) -> None:
    rig.fail_with(refusal(ErrorCode.CORRUPT))
    assert (await error_behind_one_answer(rig.stub)).code is ErrorCode.CORRUPT


class FailsWhileItWrites(EchoBlocks):
    """Fails like a task group: a message is under way, its task is cancelled, and what the call says is an error."""

    async def GetBlocks(  # type: ignore[override]  # generated stubs know only generators
        self, request: blocks_pb2.GetBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        # Larger than what gRPC takes before the other end has read some of it.
        large = blocks_pb2.GetBlocksResponse(first=1, blocks=bytes(4 << 20))
        writing = asyncio.create_task(write_message(context, large))
        for _ in range(10):
            await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait((writing,))
        raise refusal(ErrorCode.CORRUPT)


class WritesWhenLet:
    """What a handler has of gRPC, as far as a message is written by it; one is under way until `release` is set."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.written: list[str] = []

    async def write(self, message: str) -> None:
        await self.release.wait()
        self.written.append(message)


async def test_a_message_that_is_begun_is_written_before_its_task_ends() -> None:
    context: Any = WritesWhenLet()
    writing = asyncio.create_task(write_message(context, "a message"))
    for _ in range(10):
        await asyncio.sleep(0)
    writing.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not writing.done()
    context.release.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert context.written == ["a message"]


async def test_a_call_that_fails_while_it_writes_is_heard() -> None:
    async with running_host(FailsWhileItWrites()) as host, asyncio.timeout(20):
        channel = open_channel(host.address)
        error = await error_behind_one_answer(blocks_pb2_grpc.BlockServiceStub(channel))
        assert error.code is ErrorCode.CORRUPT
        await channel.close()


class WritesWithoutEnd(EchoBlocks):
    """Has always more to write than whoever does not read will take."""

    async def GetBlocks(  # type: ignore[override]  # generated stubs know only generators
        self, request: blocks_pb2.GetBlocksRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> None:
        while True:
            await write_message(context, blocks_pb2.GetBlocksResponse(first=1, blocks=bytes(4 << 20)))
            self.entered.set()


async def test_a_client_that_does_not_read_holds_up_no_stop() -> None:
    blocks = WritesWithoutEnd()
    async with running_host(blocks) as host, asyncio.timeout(20):
        channel = open_channel(host.address)
        call = blocks_pb2_grpc.BlockServiceStub(channel).GetBlocks(blocks_pb2.GetBlocksRequest())
        await call.read()
        await blocks.entered.wait()
        await host.stop(0.2)
        await Rig(host=host, channel=channel, blocks=blocks, counting=CountRequests()).ended()
        await channel.close()


async def test_a_fault_is_internal_and_logged_once_with_its_traceback(
    rig: Rig, log_lines: Callable[[], list[dict[str, Any]]]
) -> None:
    rig.blocks.error = ZeroDivisionError("the secret inside")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest(), metadata=((REQUEST_ID_KEY, "req-1"),))
    received = error_from_rpc(caught.value, peer="test")
    assert received.code is ErrorCode.INTERNAL
    assert "the secret inside" not in received.message
    assert received.facts == {"request_id": "req-1"}
    # By name: gRPC's poller tells of exceptions of its own where loops come and go, as they do from test to test.
    faults = [line for line in log_lines() if line["event"] == "fault"]
    assert len(faults) == 1
    assert "ZeroDivisionError" in faults[0]["exception"]
    assert faults[0]["request_id"] == "req-1"


@pytest.mark.parametrize(
    ("sent", "kept"), [("req-1", True), ("", False), ("a b", False), ("x" * 65, False), ('"}', False)]
)
async def test_the_request_id_is_the_callers_if_harmless(rig: Rig, sent: str, kept: bool) -> None:
    call = rig.stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest(), metadata=((REQUEST_ID_KEY, sent),))
    answer = await call
    seen = answer.status.node_id
    assert (seen == sent) is kept
    assert seen
    assert (REQUEST_ID_KEY, seen) in tuple(await call.trailing_metadata() or ())


async def test_a_refusal_names_the_request_too(rig: Rig) -> None:
    rig.fail_with(refusal())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await rig.stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest(), metadata=((REQUEST_ID_KEY, "req-2"),))
    assert (REQUEST_ID_KEY, "req-2") in tuple(caught.value.trailing_metadata() or ())


async def test_one_structured_line_an_event(rig: Rig, log_lines: Callable[[], list[dict[str, Any]]]) -> None:
    await rig.stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest(), metadata=((REQUEST_ID_KEY, "req-3"),))
    await rig.ended()
    # A cluster that other tests share may log its own calls beside this one.
    [line] = [line for line in log_lines() if line["event"] == "call" and line["request_id"] == "req-3"]
    assert line["method"] == f"/{SERVICE_NAME}/GetNodeStatus"
    assert (line["status"], line["request_id"], line["service"], line["level"]) == ("OK", "req-3", "test", "info")
    assert line["seconds"] >= 0
    assert line["timestamp"].endswith("Z")


async def test_a_caller_that_goes_away_is_counted_as_cancelled(rig: Rig) -> None:
    rig.blocks.gate = asyncio.Event()
    call = rig.stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest())
    waiting = asyncio.ensure_future(call)
    await rig.blocks.entered.wait()
    waiting.cancel()
    await rig.host.stop(5)
    method = f"/{SERVICE_NAME}/GetNodeStatus"
    assert rig.metric("holdfast_calls_total", method=method, status="CANCELLED") == 1
    assert rig.metric("holdfast_calls_in_flight") == 0


async def test_unknown_methods_make_no_metrics(rig: Rig) -> None:
    unknown: Any = rig.channel.unary_unary("/holdfast.v1.BlockService/Nothing")
    with pytest.raises(grpc.aio.AioRpcError):
        await unknown(b"")
    assert rig.metric("holdfast_calls_total", method="/holdfast.v1.BlockService/Nothing", status="UNIMPLEMENTED") == 0
