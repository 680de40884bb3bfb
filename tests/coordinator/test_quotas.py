"""What a tenant may have: at the bound, beyond it, by many at once, and where usage was never written (ADR 0082)."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.audit.metrics import AuditMetrics
from holdfast_coordinator.cautious_clock import CautiousClock
from holdfast_coordinator.keyspace import TenantKeyspace, object_place, point_place
from holdfast_coordinator.locks import Locks
from holdfast_coordinator.points import Points
from holdfast_coordinator.records import each, parse
from holdfast_coordinator.transactions import Outcome
from holdfast_coordinator.usage import UsageChange, changed
from holdfast_coordinator.usage_count import count_usage
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import OBJECT_PREFIX, SNAPSHOT_PREFIX, make_id
from holdfast_core.runtime.clock import Clock, ManualClock, SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Absent, MetadataStore, Put
from holdfast_proto.v1 import state_pb2, tenants_pb2
from holdfast_proto.v1.records_pb2 import ObjectRecord, PointRecord, VmRecord, VolumeRecord
from holdfast_proto.v1.tenants_pb2 import Quota, Usage
from tests.coordinator.content import cluster, put, random_blocks, seal_volume
from tests.coordinator.ledgers import SIGNER, make_entry
from tests.coordinator.rig import (
    BLOCK_BYTES,
    Client,
    coordinator,
    empty_object_commit,
    point_commit,
    refused,
    ring_of,
    zero_commit,
)

SPACE = TenantKeyspace(1)
NO_BOUND = Quota()


@asynccontextmanager
async def memory_store(clock: Clock | None = None) -> AsyncIterator[SqliteStore]:
    """An empty store."""
    store = await SqliteStore.open(":memory:", clock or SystemClock())
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    """An empty store."""
    async with memory_store() as store:
        yield store


def counting_ledger(store: MetadataStore, seed: int = 1) -> Ledger:
    """A ledger that adds up what was never written."""
    return Ledger(
        store,
        signer=lambda: SIGNER,
        clock=ManualClock(),
        random_bytes=random.Random(seed).randbytes,
        metrics=AuditMetrics(CollectorRegistry()),
        count_usage=lambda tenant: count_usage(store, tenant),
    )


async def set_quota(client: Client, **bounds: int) -> None:
    """Bound the tenant `default`."""
    await client.tenants("SetQuota", tenants_pb2.SetQuotaRequest(name="default", quota=Quota(**bounds)))


async def usage_of(client: Client) -> Usage:
    """What the tenant `default` has, as an operator sees it."""
    listed = await client.tenants("ListTenants", tenants_pb2.ListTenantsRequest())
    usage: Usage = next(entry.usage for entry in listed.tenants if entry.tenant.name == "default")
    return usage


async def begin_object(client: Client, number: int) -> state_pb2.BeginObjectResponse:
    """Open a session for an object."""
    nonce = number.to_bytes(16, "big")
    begun = await client.state("BeginObject", state_pb2.BeginObjectRequest(task_id="task-1", nonce=nonce))
    assert isinstance(begun, state_pb2.BeginObjectResponse)
    return begun


@pytest.mark.parametrize(
    ("have", "bound", "more", "allowed"),
    [
        (90, 100, 10, True),
        (90, 100, 11, False),
        (0, 100, 100, True),
        (100, 100, 1, False),
        (100, 100, 0, True),
        (200, 100, 0, True),
        (200, 100, 1, False),
        (200, 100, -50, True),
        (5, 100, -50, True),
        (1 << 60, 0, 1 << 60, True),
    ],
)
@pytest.mark.parametrize("what", ["bytes", "objects", "vms"])
def test_what_grows_stays_within_its_bound(what: str, have: int, bound: int, more: int, *, allowed: bool) -> None:
    usage = Usage(**{what: have})
    quota = Quota(**{what: bound})
    counts = {what: more}
    change = UsageChange(tenant=1, quota=quota, **counts)
    if allowed:
        assert changed(usage, change) == Usage(**{what: max(0, have + more)})
        return
    with pytest.raises(HoldfastError) as caught:
        changed(usage, change)
    assert caught.value.code is ErrorCode.QUOTA_EXCEEDED
    assert caught.value.facts["bound"] == str(bound)


async def test_vms_up_to_the_bound_and_none_beyond(store: SqliteStore) -> None:
    async with coordinator(store) as client:
        await set_quota(client, vms=2)
        await client.register_vm("vm-1")
        await client.register_vm("vm-2")
        error = await refused(ErrorCode.QUOTA_EXCEEDED, client.register_vm("vm-3"))
        assert error.facts == {"what": "VMs", "bound": "2", "have": "2", "more": "1"}
        # What is registered already may be registered again, and changed.
        await client.register_vm("vm-1")
        await client.register_vm("vm-1", replace=True, volumes=("root", "data"))
        assert await usage_of(client) == Usage(vms=2)
        await set_quota(client, vms=3)
        await client.register_vm("vm-3")
        assert await usage_of(client) == Usage(vms=3)


async def test_commits_at_once_never_pass_the_bound(store: SqliteStore) -> None:
    async with coordinator(store) as one, coordinator(store, seed=2) as two:
        await one.form_layout()
        clients = [one, two]
        begun = [(client := clients[n % 2], await begin_object(client, n)) for n in range(12)]
        await set_quota(one, objects=5)

        async def knows_the_quota(client: Client) -> bool:
            listed = await client.tenants("ListTenants", tenants_pb2.ListTenantsRequest())
            return any(entry.tenant.quota.objects == 5 for entry in listed.tenants)

        assert all([await knows_the_quota(client) for client in clients])

        async def commit(client: Client, session: state_pb2.BeginObjectResponse) -> ErrorCode | None:
            try:
                await client.state("CommitObject", empty_object_commit(session, "task-1"))
            except HoldfastError as error:
                return error.code
            return None

        done = await asyncio.gather(*(commit(*each) for each in begun))
        assert (done.count(None), done.count(ErrorCode.QUOTA_EXCEEDED)) == (5, 7)
        assert await usage_of(two) == Usage(objects=5)
        # Sent again, a commit that was done is answered and charges nothing; one that was refused stays refused.
        assert await asyncio.gather(*(commit(*each) for each in begun)) == done
        assert await usage_of(one) == Usage(objects=5)
        await refused(ErrorCode.QUOTA_EXCEEDED, begin_object(one, 99))


async def test_a_point_that_is_refused_can_be_committed_once_there_is_room(store: SqliteStore) -> None:
    async with cluster(store) as running:
        client = running.client
        await set_quota(client, bytes=10 * BLOCK_BYTES)
        begun = await client.begin()
        volume, sealed = seal_volume(ring_of(begun.grant.keys), random_blocks(1, range(11)), total=20)
        await put(begun.grant, sealed.everything)
        commit = point_commit(begun, [volume])
        error = await refused(ErrorCode.QUOTA_EXCEEDED, client.commit(commit))
        assert error.facts["more"] == str(11 * BLOCK_BYTES)
        assert await client.points() == []
        assert await usage_of(client) == Usage(vms=1)
        await set_quota(client, bytes=11 * BLOCK_BYTES)
        point = await client.commit(commit)
        assert await usage_of(client) == Usage(vms=1, bytes=11 * BLOCK_BYTES)
        # All is used up: not even the next session begins.
        await refused(ErrorCode.QUOTA_EXCEEDED, client.begin(incremental=True, snapshot_id=point.point_id))
        await client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=point.point_id))
        assert await usage_of(client) == Usage(vms=1)
        await client.begin()


async def test_a_lowered_quota_refuses_more_and_removes_nothing(store: SqliteStore) -> None:
    async with coordinator(store) as client:
        await client.form_layout()
        await client.register_vm()
        for number in range(3):
            session = await begin_object(client, number)
            await client.state("CommitObject", empty_object_commit(session, "task-1"))
        await set_quota(client, objects=1, vms=1)
        await refused(ErrorCode.QUOTA_EXCEEDED, begin_object(client, 3))
        await client.save()  # nothing that is used up
        listed = await client.state("ListObjects", state_pb2.ListObjectsRequest(task_id="task-1"))
        assert len(listed.objects) == 3
        for left, stored in ((2, listed.objects[0]), (1, listed.objects[1]), (0, listed.objects[2])):
            await client.state("ForgetObject", state_pb2.ForgetObjectRequest(storage_id=stored.storage_id))
            assert await usage_of(client) == Usage(objects=left, vms=1)
        session = await begin_object(client, 4)
        await client.state("CommitObject", empty_object_commit(session, "task-1"))


async def test_only_commits_charge() -> None:
    clock = ManualClock()
    async with memory_store(clock) as store, coordinator(store, clock=clock, session_ttl_s=5.0) as client:
        await client.form_layout()
        await client.register_vm()
        aborted, lapsed = await begin_object(client, 1), await begin_object(client, 2)
        await client.state("AbortSession", state_pb2.AbortSessionRequest(session_id=aborted.session_id))
        fenced, taken = await client.begin(), await client.begin(takeover=True)
        clock.advance(6.0)
        for point in (fenced, taken):
            await refused(ErrorCode.SESSION_LAPSED, client.commit(zero_commit(point)))
        for session in (aborted, lapsed):
            commit = client.state("CommitObject", empty_object_commit(session, "task-1"))
            await refused(ErrorCode.SESSION_LAPSED, commit)
        assert await usage_of(client) == Usage(vms=1)


async def make_old(store: MetadataStore) -> Usage:
    """Write what a version without usage left: two VMs, three objects, a point with a charge and one without."""
    operations = [Put(SPACE.vm(name), VmRecord(vm_id=name).SerializeToString()) for name in ("a", "b")]
    for number, size in enumerate((100, 20, 3)):
        storage_id = make_id(OBJECT_PREFIX, bytes([number]) * 16)
        record = ObjectRecord(storage_id=storage_id, task_id="t", size_bytes=size, created_unix_ms=number)
        place = object_place("t", number, storage_id)
        operations.append(Put(SPACE.object(place), record.SerializeToString()))
        operations.append(Put(SPACE.object_id(storage_id), place.encode()))
    for number, charge in enumerate((0, 7000)):
        point = PointRecord(point_id=f"p{number}", vm_id="a", number=number, charged_bytes=charge)
        operations.append(Put(SPACE.point(point_place("a", number)), point.SerializeToString()))
    await store.txn([], operations)
    return Usage(bytes=7123, objects=3, vms=2)


async def test_a_tenant_of_before_usage_was_written_is_counted(store: SqliteStore) -> None:
    expected = await make_old(store)
    async with coordinator(store) as client:
        assert await usage_of(client) == expected
        await set_quota(client, vms=2)
        await refused(ErrorCode.QUOTA_EXCEEDED, client.register_vm("c"))
        storage_id = make_id(OBJECT_PREFIX, bytes(16))
        await client.state("ForgetObject", state_pb2.ForgetObjectRequest(storage_id=storage_id))
        assert await usage_of(client) == Usage(bytes=7023, objects=2, vms=2)
        item = await store.get(SPACE.usage)
        assert item is not None
        assert Usage.FromString(item.value) == await count_usage(store, 1)


async def test_two_that_count_at_once_count_each_change_once(store: SqliteStore) -> None:
    expected = await make_old(store)
    ledgers = [counting_ledger(store, seed) for seed in (1, 2)]

    async def register(number: int) -> None:
        change = UsageChange(tenant=1, quota=NO_BOUND, vms=1)
        key = SPACE.vm(f"new-{number}")
        vm = VmRecord(vm_id=f"new-{number}").SerializeToString()
        outcome = await ledgers[number % 2].apply(make_entry(f"{number}"), [Absent(key)], [Put(key, vm)], change)
        assert outcome is Outcome.APPLIED

    await asyncio.gather(*(register(number) for number in range(20)))
    expected.vms += 20
    assert await ledgers[0].usage(1) == expected == await count_usage(store, 1)


@dataclass(frozen=True)
class Lineage:
    """Points of one VM, each on an earlier one or on none, with charges, and an order to forget them in."""

    points: list[PointRecord]
    order: list[int]


@st.composite
def lineages(draw: st.DrawFn) -> Lineage:
    points: list[PointRecord] = []
    for number in range(draw(st.integers(1, 8))):
        parent = draw(st.sampled_from(["", *(point.point_id for point in points)]))
        size = draw(st.integers(0, 1000))
        points.append(
            PointRecord(
                point_id=make_id(SNAPSHOT_PREFIX, number.to_bytes(16, "big")),
                vm_id="vm-1",
                number=number,
                parent_id=parent,
                volumes=[VolumeRecord(name="root", size_bytes=size)],
                charged_bytes=draw(st.integers(0, size)),
            )
        )
    return Lineage(points, draw(st.permutations(range(len(points)))))


@pytest.mark.slow
@settings(max_examples=40)
@given(lineages())
def test_charges_add_up_to_the_usage_whatever_is_forgotten(lineage: Lineage) -> None:
    async def run() -> None:
        async with memory_store() as store:
            for point in lineage.points:
                place = point_place(point.vm_id, point.number)
                puts = [
                    Put(SPACE.point(place), point.SerializeToString()),
                    Put(SPACE.point_id(point.point_id), place.encode()),
                ]
                await store.txn([], puts)
            ledger = counting_ledger(store)
            locks = Locks(store, SPACE, CautiousClock(SystemClock()))
            points = Points(store, SPACE, ledger, locks=locks, quota=Quota(bytes=1))
            before = (await ledger.usage(1)).bytes
            for step, number in enumerate(lineage.order):
                for repeat in range(2):
                    await points.forget(lineage.points[number].point_id, make_entry(f"{step}.{repeat}"))
                after = (await ledger.usage(1)).bytes
                left = [parse(item, PointRecord).message async for item in each(store, SPACE.points_prefix)]
                assert after == sum(point.charged_bytes for point in left) <= before
                for point in left:
                    assert point.charged_bytes <= sum(volume.size_bytes for volume in point.volumes)
                before = after
            assert before == 0

    asyncio.run(run())
