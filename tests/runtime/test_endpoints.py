"""Several coordinators as one, with real servers that die and come back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

import grpc.aio
import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_core.runtime.requests import enter_request
from holdfast_proto.v1 import blocks_pb2, blocks_pb2_grpc
from tests.runtime.services import EchoBlocks, refusal, running_host


async def ask(endpoints: Endpoints, *, timeout_s: float = 10.0) -> str:
    response = await endpoints.call(_get_node_status, blocks_pb2.GetNodeStatusRequest(), timeout_s=timeout_s)
    return response.status.node_id


def _get_node_status(
    channel: grpc.aio.Channel,
) -> grpc.aio.UnaryUnaryMultiCallable[blocks_pb2.GetNodeStatusRequest, blocks_pb2.GetNodeStatusResponse]:
    return blocks_pb2_grpc.BlockServiceStub(channel).GetNodeStatus


async def refused(endpoints: Endpoints, **options: float) -> HoldfastError:
    with pytest.raises(HoldfastError) as caught:
        await ask(endpoints, **options)
    return caught.value


def free_addresses(ports: Sequence[int]) -> list[str]:
    return [f"127.0.0.1:{port}" for port in ports]


async def test_the_next_coordinator_answers_when_the_first_dies_and_is_kept() -> None:
    first, second = EchoBlocks(), EchoBlocks()
    async with running_host(first) as dying, running_host(second) as living:
        endpoints = Endpoints([dying.address, living.address])
        await ask(endpoints)
        assert (first.calls, second.calls) == (1, 0)
        await dying.stop(0)
        await ask(endpoints)
        await ask(endpoints)
        assert (first.calls, second.calls) == (1, 2)
        await endpoints.close()


async def test_a_coordinator_that_dies_under_a_call_is_replaced() -> None:
    first, second = EchoBlocks(), EchoBlocks()
    first.gate = asyncio.Event()
    async with running_host(first) as dying, running_host(second) as living:
        endpoints = Endpoints([dying.address, living.address])
        call = asyncio.ensure_future(ask(endpoints))
        await first.entered.wait()
        await dying.stop(0)
        assert await call
        assert second.calls == 1
        await endpoints.close()


@pytest.mark.slow
async def test_a_coordinator_that_hangs_costs_one_timeout() -> None:
    first, second = EchoBlocks(), EchoBlocks()
    first.gate = asyncio.Event()
    async with running_host(first) as hanging, running_host(second) as living:
        endpoints = Endpoints([hanging.address, living.address])
        # Long enough for a living one on a machine that has other things to do.
        await ask(endpoints, timeout_s=2)
        await ask(endpoints, timeout_s=2)
        assert (first.calls, second.calls) == (1, 2)
        await endpoints.close()


async def test_an_answer_that_is_an_error_is_not_asked_elsewhere() -> None:
    for code in ErrorCode:
        if code is ErrorCode.UNREACHABLE:
            continue
        first, second = EchoBlocks(), EchoBlocks()
        first.error = refusal(code)
        async with running_host(first) as one, running_host(second) as other:
            endpoints = Endpoints([one.address, other.address])
            assert (await refused(endpoints)).code is code
            assert (first.calls, second.calls) == (1, 0)
            await endpoints.close()


async def test_a_coordinator_cut_off_from_its_store_sends_us_on() -> None:
    first, second = EchoBlocks(), EchoBlocks()
    first.error = HoldfastError(ErrorCode.UNREACHABLE, "etcd has no quorum")
    async with running_host(first) as one, running_host(second) as other:
        endpoints = Endpoints([one.address, other.address])
        assert await ask(endpoints)
        second.error = first.error
        assert (await refused(endpoints)).message == "etcd has no quorum"
        await endpoints.close()


async def test_nobody_there(unused_tcp_port_factory: object) -> None:
    assert callable(unused_tcp_port_factory)
    addresses = free_addresses([unused_tcp_port_factory(), unused_tcp_port_factory()])
    endpoints = Endpoints(addresses)
    error = await refused(endpoints)
    assert error.code is ErrorCode.UNREACHABLE
    assert all(address in error.message for address in addresses)
    await endpoints.close()
    alone = Endpoints(addresses[:1], what="metadata store")
    assert f"metadata store {addresses[0]} cannot be reached" in (await refused(alone)).message
    await alone.close()


async def test_a_coordinator_that_comes_back_is_found_again(unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    endpoints = Endpoints([address])
    assert (await refused(endpoints)).code is ErrorCode.UNREACHABLE
    async with running_host(bind=address), asyncio.timeout(20):
        answer = ""
        while not answer:
            with suppress(HoldfastError):
                answer = await ask(endpoints)
    await endpoints.close()


async def test_calls_carry_the_current_request_id() -> None:
    async with running_host() as host:
        endpoints = Endpoints([host.address])
        enter_request("req-9")
        assert await ask(endpoints) == "req-9"
        await endpoints.close()


async def test_streams_are_moved_on_by_hand() -> None:
    async with running_host() as one, running_host() as other:
        endpoints = Endpoints([one.address, other.address, one.address])
        assert endpoints.addresses == (one.address, other.address)
        first = endpoints.channel()
        endpoints.advance()
        assert endpoints.channel() is not first
        endpoints.advance()
        assert endpoints.channel() is first
        await endpoints.close()


def test_no_address_is_an_error() -> None:
    with pytest.raises(HoldfastError, match="no coordinator address"):
        Endpoints([])


def _get_blocks(
    channel: grpc.aio.Channel,
) -> grpc.aio.UnaryStreamMultiCallable[blocks_pb2.GetBlocksRequest, blocks_pb2.GetBlocksResponse]:
    return blocks_pb2_grpc.BlockServiceStub(channel).GetBlocks


async def read(endpoints: Endpoints) -> tuple[list[int], HoldfastError | None]:
    """What a stream yields before it ends, and the error that ends it."""
    seen: list[int] = []
    try:
        async for answer in endpoints.stream(_get_blocks, blocks_pb2.GetBlocksRequest(), timeout_s=10):
            seen += [answer.first]
    except HoldfastError as error:
        return seen, error
    return seen, None


async def test_a_stream_goes_to_who_answers_and_never_twice_over() -> None:
    first, second = EchoBlocks(), EchoBlocks()
    async with running_host(first) as dying, running_host(second) as living:
        endpoints = Endpoints([dying.address, living.address])
        assert await read(endpoints) == ([1, 2], None)
        await dying.stop(0)
        assert await read(endpoints) == ([1, 2], None)
        assert (first.calls, second.calls) == (1, 1)
        # The servicer fails after its first message: what came stands, and nobody else is asked for the rest.
        second.error = refusal(ErrorCode.UNREACHABLE)
        seen, error = await read(endpoints)
        assert seen == [1]
        assert error is not None
        assert error.message == "what UNREACHABLE means"
        assert second.calls == 2
        await endpoints.close()
