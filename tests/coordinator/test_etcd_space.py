"""A metadata store without space left: said plainly, reads go on, and it goes on once there is space again."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import pytest

from holdfast_coordinator import keyspace
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import KIB
from holdfast_core.runtime.metadata.etcd import EtcdStore
from holdfast_core.runtime.metadata.store import OUTCOME_FACT, OUTCOME_UNAPPLIED, Put
from holdfast_proto.v1 import cluster_pb2, state_pb2
from tests.coordinator.rig import Client, coordinator, eventually, records, refused
from tests.support.etcd import EtcdCluster

QUOTA_BYTES = 8 << 20


@pytest.fixture
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdCluster]:
    options = (f"--quota-backend-bytes={QUOTA_BYTES}", "--auto-compaction-retention=0")
    with EtcdCluster(1, tmp_path_factory.mktemp("etcd"), options=options) as cluster:
        yield cluster


async def fill(store: EtcdStore) -> HoldfastError:
    """Write one key over and over until the store has no space; return what it says then."""
    for number in range(200):
        try:
            await store.txn([], [Put("elsewhere/filler", number.to_bytes(2, "big") * (256 * KIB))])
        except HoldfastError as error:
            return error
    raise AssertionError("the store takes everything")


def make_room(etcd: EtcdCluster) -> None:
    """What an operator does (docs/operations.md)."""
    status = json.loads(etcd.ctl("endpoint", "status", "-w", "json"))
    etcd.ctl("compact", str(status[0]["Status"]["header"]["revision"]))
    etcd.ctl("defrag")
    etcd.ctl("alarm", "disarm")


@pytest.mark.slow
@pytest.mark.timeout(120)
async def test_a_full_store_is_said_plainly_and_recovers(etcd: EtcdCluster) -> None:
    store = await EtcdStore.open(etcd.endpoints)
    try:
        async with coordinator(store, session_ttl_s=60.0, node_lease_ttl_s=60.0) as client:
            await client.form_layout()
            await client.register_vm("vm-1")
            point = await client.save("vm-1")
            begun = await client.begin("vm-1")
            error = await fill(store)
            assert error.code is ErrorCode.DISK_FULL
            assert "the metadata store has no space left" in error.message
            assert error.facts[OUTCOME_FACT] == OUTCOME_UNAPPLIED
            await refused_for_want_of_space(client, point.point_id)
            # What is there is read as ever, and open sessions stay open.
            assert await store.get(keyspace.TenantKeyspace(1).vm("vm-1")) is not None
            status = await client.cluster("GetClusterStatus", cluster_pb2.GetClusterStatusRequest())
            assert status.layout_epoch == 1
            left = await client.state("KeepAlive", state_pb2.KeepAliveRequest(session_id=begun.session_id))
            assert left.session_ttl_ms > 0
            known = len(await records(store))
            await asyncio.to_thread(make_room, etcd)

            async def takes_writes() -> bool:
                try:
                    await client.register_vm("vm-2")
                except HoldfastError as failure:
                    if failure.code is not ErrorCode.DISK_FULL:
                        raise
                    return False
                return True

            await eventually(takes_writes, "the store takes writes again")
            assert len(await records(store)) > known
            assert [each.point_id for each in await client.points("vm-1")] == [point.point_id]
            await client.state("AbortSession", state_pb2.AbortSessionRequest(session_id=begun.session_id))
            await client.save("vm-1")
    finally:
        await store.close()


async def refused_for_want_of_space(client: Client, point_id: str) -> None:
    """Everything that has to be recorded is refused with one code and a sentence that says what is wrong."""
    for name, request in (
        ("ForgetPoint", state_pb2.ForgetPointRequest(point_id=point_id)),
        ("ListPoints", state_pb2.ListPointsRequest(vm_id="vm-1")),
        ("BeginObject", state_pb2.BeginObjectRequest(task_id="task-1", nonce=bytes(16))),
    ):
        error = await refused(ErrorCode.DISK_FULL, client.state(name, request))
        assert "the metadata store has no space left" in error.message
    stranger = Client(client.address, token="")
    try:
        await refused(ErrorCode.UNAUTHENTICATED, stranger.points())
    finally:
        await stranger.close()
