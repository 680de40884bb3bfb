"""The error table, over a real server: every code arrives as it left, and gRPC's own failures become ours."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import ERROR_BLOCK_IDS_MAX
from holdfast_core.runtime.channels import open_channel
from holdfast_core.runtime.status import (
    ERROR_METADATA_KEY,
    RpcFailure,
    classify,
    detail_from_error,
    error_from_detail,
    error_from_rpc,
    reaches_peer,
    status_name,
)
from holdfast_proto.v1 import blocks_pb2, blocks_pb2_grpc, common_pb2, state_pb2, state_pb2_grpc
from tests.runtime.services import EchoBlocks, refusal, running_host

Stub: TypeAlias = "blocks_pb2_grpc.BlockServiceAsyncStub"


@pytest_asyncio.fixture
async def service() -> AsyncIterator[tuple[EchoBlocks, Stub]]:
    servicer = EchoBlocks()
    async with running_host(servicer) as host:
        channel = open_channel(host.address)
        yield servicer, blocks_pb2_grpc.BlockServiceStub(channel)
        await channel.close()


async def failure_of(stub: Stub, timeout_s: float = 10.0) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetNodeStatus(blocks_pb2.GetNodeStatusRequest(), timeout=timeout_s)
    return caught.value


@pytest.mark.parametrize("code", list(ErrorCode), ids=lambda code: code.name)
async def test_every_code_crosses_the_wire_whole(service: tuple[EchoBlocks, Stub], code: ErrorCode) -> None:
    servicer, stub = service
    servicer.error = sent = refusal(code)
    failure = await failure_of(stub)
    received = error_from_rpc(failure, peer="node x")
    assert received.code is code
    assert (received.message, received.facts, received.block_ids) == (sent.message, sent.facts, sent.block_ids)
    assert received.retryable == sent.retryable
    assert reaches_peer(received)
    assert classify(failure).value == status_name(code)
    assert failure.details() == sent.message


async def test_statuses_that_ready_made_clients_act_on(service: tuple[EchoBlocks, Stub]) -> None:
    """Proxies and other languages retry UNAVAILABLE and nothing else, so only what may come right by itself is that."""
    retried = {code for code in ErrorCode if status_name(code) == "UNAVAILABLE"}
    assert retried == {ErrorCode.UNREACHABLE, ErrorCode.NO_QUORUM, ErrorCode.NOT_READY}
    assert status_name(None) == "OK"
    assert status_name(ErrorCode.DENIED) == "PERMISSION_DENIED"
    assert {status_name(code) for code in (ErrorCode.MISSING, ErrorCode.CORRUPT)} == {"DATA_LOSS"}


async def test_a_full_list_of_blocks_fits_into_the_metadata(service: tuple[EchoBlocks, Stub]) -> None:
    servicer, stub = service
    ids = [number.to_bytes(32, "big") for number in range(ERROR_BLOCK_IDS_MAX + 5)]
    servicer.error = HoldfastError(ErrorCode.MISSING, "lost " * 10_000, block_ids=ids)
    received = error_from_rpc(await failure_of(stub), peer="node x")
    assert received.code is ErrorCode.MISSING
    assert received.block_ids == tuple(ids[:ERROR_BLOCK_IDS_MAX])
    assert received.message.startswith("lost lost")


def test_an_unknown_code_becomes_what_its_status_says() -> None:
    detail = common_pb2.ErrorDetail(code="FROM_THE_FUTURE", message="new", retryable=True, block_ids=b"x" * 40)
    metadata = grpc.aio.Metadata((ERROR_METADATA_KEY, detail.SerializeToString()))
    failure = grpc.aio.AioRpcError(grpc.StatusCode.DATA_LOSS, grpc.aio.Metadata(), metadata, "new")
    received = error_from_rpc(failure, peer="node x")
    assert received.code is ErrorCode.CORRUPT
    assert received.facts == {"code": "FROM_THE_FUTURE"}
    assert received.retryable
    assert received.block_ids == (b"x" * 32,)
    assert reaches_peer(received)
    assert error_from_detail(detail).code is ErrorCode.INTERNAL


def test_damaged_details_leave_the_status_to_speak() -> None:
    metadata = grpc.aio.Metadata((ERROR_METADATA_KEY, b"\xff\xff\xff"))
    failure = grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), metadata, "gone")
    received = error_from_rpc(failure, peer="node x")
    assert received.code is ErrorCode.UNREACHABLE
    assert not reaches_peer(received)


@pytest.mark.parametrize("status", list(grpc.StatusCode), ids=lambda status: status.name)
def test_every_status_without_details_has_a_meaning(status: grpc.StatusCode) -> None:
    if status is grpc.StatusCode.OK:
        assert status.name not in RpcFailure.__members__
        return
    failure = grpc.aio.AioRpcError(status, grpc.aio.Metadata(), grpc.aio.Metadata(), "why")
    received = error_from_rpc(failure, peer="node 10.0.0.1:7")
    assert isinstance(received.code, ErrorCode)
    assert "node 10.0.0.1:7" in received.message
    assert received.facts == {"transport": status.name}
    assert classify(failure).value == status.name


def test_what_a_transport_said_does_not_travel_on() -> None:
    """A coordinator that could not reach a node did answer itself: its client must not take it for dead."""
    local = HoldfastError(
        ErrorCode.UNREACHABLE, "node x cannot be reached", facts={"transport": "UNAVAILABLE", "a": "b"}
    )
    received = error_from_detail(detail_from_error(local))
    assert received.facts == {"a": "b"}
    assert reaches_peer(received)


async def test_nobody_there_is_unreachable(unused_tcp_port: int) -> None:
    channel = open_channel(f"127.0.0.1:{unused_tcp_port}")
    received = error_from_rpc(await failure_of(blocks_pb2_grpc.BlockServiceStub(channel)), peer="node x")
    await channel.close()
    assert received.code is ErrorCode.UNREACHABLE
    assert received.retryable
    assert "node x cannot be reached" in received.message
    assert not reaches_peer(received)


async def test_no_answer_in_time_is_unreachable(service: tuple[EchoBlocks, Stub]) -> None:
    servicer, stub = service
    servicer.gate = asyncio.Event()
    received = error_from_rpc(await failure_of(stub, timeout_s=0.2), peer="node x")
    assert received.code is ErrorCode.UNREACHABLE
    assert "did not answer in time" in received.message


async def test_a_server_that_dies_under_a_call_is_not_an_answer() -> None:
    servicer = EchoBlocks()
    servicer.gate = asyncio.Event()
    async with running_host(servicer) as host:
        channel = open_channel(host.address)
        stub: Stub = blocks_pb2_grpc.BlockServiceStub(channel)
        call = asyncio.ensure_future(failure_of(stub))
        await servicer.entered.wait()
        await host.stop(0)
        received = error_from_rpc(await call, peer="node x")
        await channel.close()
    assert received.code is ErrorCode.UNREACHABLE
    assert not reaches_peer(received)


async def test_a_call_that_the_peer_does_not_have() -> None:
    async with running_host() as host:
        channel = open_channel(host.address)
        stub: Any = state_pb2_grpc.StateServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetVm(state_pb2.GetVmRequest(vm_id="vm"))
        await channel.close()
    received = error_from_rpc(caught.value, peer="coordinator x")
    assert received.code is ErrorCode.INTERNAL
    assert "does not offer this call" in received.message
