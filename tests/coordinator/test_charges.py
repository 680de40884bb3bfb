"""What a tenant is charged for points and objects, as the coordinator counts it at their commits (ADR 0082)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.lineage import choose_heir
from holdfast_coordinator.points import inherited
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import PointRecord, VolumeRecord
from holdfast_proto.v1.tenants_pb2 import Usage
from tests.coordinator.content import Cluster, cluster, put, random_blocks, seal_object, seal_volume
from tests.coordinator.rig import BLOCK_BYTES, Client, point_commit, ring_of

TOTAL = 300


@pytest.fixture
async def running() -> AsyncIterator[Cluster]:
    """A cluster of three nodes in memory."""
    store = await SqliteStore.open(":memory:", SystemClock())
    try:
        async with cluster(store) as made:
            yield made
    finally:
        await store.close()


async def save(client: Client, slots: dict[int, bytes], *, total: int = TOTAL, **fields: Any) -> PointRecord:
    """Make a point of these blocks and return it."""
    begun = await client.begin(**fields)
    volume, sealed = seal_volume(ring_of(begun.grant.keys), slots, total=total)
    await put(begun.grant, sealed.everything)
    made: PointRecord = await client.commit(point_commit(begun, [volume]))
    return made


async def usage(running: Cluster) -> Usage:
    """Return what the tenant has."""
    item = await running.store.get(TenantKeyspace(1).usage)
    assert item is not None
    return Usage.FromString(item.value)


async def test_a_point_is_charged_with_the_blocks_that_it_newly_names(running: Cluster) -> None:
    client = running.client
    slots = random_blocks(1, range(100))
    snapshot = await save(client, slots)
    lineage: dict[str, Any] = {"incremental": True, "snapshot_id": snapshot.point_id}
    unchanged = await save(client, slots, **lineage)
    changed = await save(client, slots | random_blocks(2, range(95, 110)), **lineage)
    # Damage anywhere makes a commit vouch for everything anew; it is not charged for everything anew.
    await client.register_vm("vm-2")
    other = await save(client, random_blocks(3, range(10)), vm_id="vm-2")
    grant = (await client.begin("vm-2", takeover=True)).grant
    _, sealed = seal_volume(ring_of(grant.keys), random_blocks(3, range(10)), total=TOTAL)
    await running.destroy(grant, sealed.blocks[0].id)
    report = state_pb2.ReportDamageRequest(block_ids=sealed.blocks[0].id, resource_id=other.point_id)
    assert (await client.state("ReportDamage", report)).recorded == 1
    later = await save(client, slots | random_blocks(2, range(95, 112)), **lineage)
    based = await save(client, slots, vm_id="vm-2", base_id=changed.point_id, takeover=True)
    charged = [point.charged_bytes // BLOCK_BYTES for point in (snapshot, unchanged, changed, other, later, based)]
    # The base has other content in five of the positions.
    assert charged == [100, 0, 15, 10, 2, 5]
    assert (await usage(running)).bytes == sum(charged) * BLOCK_BYTES


async def test_a_charge_is_never_more_than_the_volume_is_large(running: Cluster) -> None:
    begun = await running.client.begin()
    volume, sealed = seal_volume(ring_of(begun.grant.keys), random_blocks(1, range(TOTAL)), total=TOTAL)
    # The last block of a volume may be cut short.
    volume.size_bytes -= BLOCK_BYTES - 1
    await put(begun.grant, sealed.everything)
    made = await running.client.commit(point_commit(begun, [volume]))
    assert made.charged_bytes == volume.size_bytes


async def test_what_is_forgotten_is_given_back_once(running: Cluster) -> None:
    client = running.client
    begun = await client.state("BeginObject", state_pb2.BeginObjectRequest(task_id="task-1", nonce=bytes(16)))
    commit, sealed = seal_object(begun, "task-1", [bytes([n]) * 100 for n in range(7)])
    await put(begun.grant, sealed.everything)
    for _ in range(2):
        await client.state("CommitObject", commit)
    assert await usage(running) == Usage(bytes=700, objects=1, vms=1)
    slots = random_blocks(1, range(10))
    snapshot = await save(client, slots)
    lineage: dict[str, Any] = {"incremental": True, "snapshot_id": snapshot.point_id}
    middle = await save(client, slots | random_blocks(2, range(10, 14)), **lineage)
    newest = await save(client, slots | random_blocks(2, range(10, 12)), total=12, **lineage)

    async def forget(point: PointRecord) -> int:
        for _ in range(2):
            await client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=point.point_id))
        return (await usage(running)).bytes // BLOCK_BYTES

    def blocks(points: Sequence[PointRecord]) -> list[int]:
        return [point.charged_bytes // BLOCK_BYTES for point in points]

    assert blocks([snapshot, middle, newest]) == [10, 4, 0]
    # What builds on it keeps its blocks, so its charge stays; but no point is charged more than it holds.
    assert await forget(middle) == 14
    assert blocks(await client.points()) == [10, 4]
    assert await forget(snapshot) == 12
    assert blocks(await client.points()) == [12]
    assert await forget(newest) == 0
    await client.state("ForgetObject", state_pb2.ForgetObjectRequest(storage_id=begun.session_id))
    assert await usage(running) == Usage(vms=1)


@st.composite
def lineages(draw: st.DrawFn) -> list[PointRecord]:
    """Points of one VM, each on top of an earlier one or of none, some of them forgotten."""
    points: list[PointRecord] = []
    for number in range(draw(st.integers(1, 12))):
        parent = draw(st.sampled_from(["", *(point.point_id for point in points)]))
        gone = draw(st.booleans())
        points.append(PointRecord(point_id=f"p{number}", parent_id=parent, number=number, forgotten=gone))
    return points


@given(lineages())
def test_the_heir_is_the_nearest_living_point_that_builds_on_it(points: list[PointRecord]) -> None:
    by_id = {point.point_id: point for point in points}
    for point in points:
        distances = {}
        for other in points:
            steps, at = 0, other.parent_id
            while at and at != point.point_id:
                steps, at = steps + 1, by_id[at].parent_id
            if at and not other.forgotten:
                distances[other.point_id] = (steps, other.number)
        heir = choose_heir(point.point_id, points)
        assert (heir.point_id if heir else None) == min(distances, key=lambda each: distances[each], default=None)


def test_records_that_name_each_other_as_parents_have_no_heir() -> None:
    ring = [PointRecord(point_id=a, parent_id=b, forgotten=True) for a, b in (("a", "b"), ("b", "a"))]
    assert choose_heir("a", ring) is None


def test_an_heir_keeps_what_it_has_and_takes_no_more_than_it_holds() -> None:
    heir = PointRecord(volumes=[VolumeRecord(size_bytes=60), VolumeRecord(size_bytes=40)], charged_bytes=30)
    assert [inherited(heir, charge) for charge in (0, 50, 70, 1000)] == [30, 80, 100, 100]
    heir.charged_bytes = 120
    assert inherited(heir, 10) == 120
