"""Two whole coordinators over one store: what one is told about access the other does within seconds."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.credentials import parse_token
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.status import error_from_rpc
from holdfast_proto.v1 import access_pb2, cluster_pb2, state_pb2
from tests.coordinator.rig import Client, coordinator, eventually, records, refused

WITHIN_S = 5.0
GET_VM = state_pb2.GetVmRequest(vm_id="vm-1")


@pytest.fixture
async def other(store: SqliteStore, clock: ManualClock, client: Client) -> AsyncIterator[Client]:
    """A client of a second coordinator over the store of `client`."""
    async with coordinator(store, clock=clock, seed=2) as second:
        yield second


async def until(code: ErrorCode | None, caller: Client) -> float:
    """Ask until the answer is `code` (None for success); return the seconds that took."""
    began_s = time.monotonic()

    async def answered() -> bool:
        try:
            await caller.state("GetVm", GET_VM)
        except HoldfastError as error:
            return error.code is code
        return code is None

    await eventually(answered, f"{code}", within_s=WITHIN_S)
    return time.monotonic() - began_s


async def test_rights_come_and_go_on_both_coordinators(client: Client, other: Client) -> None:
    token = await client.new_token("agent-7")
    here, there = Client(client.address, token=token), Client(other.address, token=token)
    try:
        await refused(ErrorCode.DENIED, here.state("GetVm", GET_VM))
        assert await until(ErrorCode.DENIED, there) < WITHIN_S
        await client.bind(("agent-7", "restorer", "vm/*"))
        await here.state("GetVm", GET_VM)
        assert await until(None, there) < WITHIN_S
        await client.bind()
        await refused(ErrorCode.DENIED, here.state("GetVm", GET_VM))
        assert await until(ErrorCode.DENIED, there) < WITHIN_S
        await client.bind(("agent-7", "restorer", "vm/*"))
        assert await until(None, there) < WITHIN_S
        await client.access("RevokeToken", access_pb2.RevokeTokenRequest(token_id=parse_token(token)[0]))
        await refused(ErrorCode.UNAUTHENTICATED, here.state("GetVm", GET_VM))
        assert await until(ErrorCode.UNAUTHENTICATED, there) < WITHIN_S
    finally:
        await here.close()
        await there.close()


async def test_a_watch_ends_with_the_right_to_it(client: Client, other: Client) -> None:
    token = await client.new_token("agent-7")
    await client.bind(("agent-7", "restorer", "*"))
    there = Client(other.address, token=token)
    try:
        assert await until(None, there) < WITHIN_S
        watch = there.watch()
        await watch.read()
        await client.bind()
        assert await until(ErrorCode.DENIED, there) < WITHIN_S
        await client.beat(9)

        async def ended() -> bool:
            await watch.read()
            return False

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await eventually(ended, "the watch's end")
        assert error_from_rpc(caught.value, peer="test").code is ErrorCode.DENIED
    finally:
        await there.close()


async def test_what_was_done_about_access_is_in_the_log_of_both(
    client: Client, other: Client, store: SqliteStore
) -> None:
    token = await other.new_token("agent-7")
    stranger = Client(client.address, token=token)
    try:
        await until(ErrorCode.DENIED, stranger)
        await refused(ErrorCode.DENIED, stranger.cluster("ListNodes", cluster_pb2.ListNodesRequest()))
    finally:
        await stranger.close()
    told = [(each.principal, each.action, each.resource, each.outcome) for each in await records(store)]
    assert ("admin", "access.admin", "access", "OK") in told
    assert ("agent-7", "vm.list", "", "DENIED") in told
    assert told[-1] == ("agent-7", "cluster.read", "", "DENIED")
    assert parse_token(token)[1].hex() not in "".join(map(str, await records(store)))
