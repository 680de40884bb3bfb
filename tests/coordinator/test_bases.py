"""Bases of deltas: to the coordinator a reference like any other, in commits, damage reports, sums and charges."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from holdfast_core.model.errors import ErrorCode
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import PointRecord
from tests.coordinator.content import Cluster, Sealed, cluster, put, random_blocks, seal_volume
from tests.coordinator.rig import BLOCK_BYTES, Client, point_commit, refused, ring_of

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


async def save(
    client: Client, slots: dict[int, bytes], bases: dict[int, bytes] | None = None, **fields: Any
) -> tuple[PointRecord, Sealed]:
    """Make a point of these blocks; return it, and what it is made of."""
    begun = await client.begin(**fields)
    volume, sealed = seal_volume(ring_of(begun.grant.keys), slots, total=TOTAL, bases=bases)
    await put(begun.grant, sealed.everything)
    return await client.commit(point_commit(begun, [volume])), sealed


async def test_a_base_that_is_nowhere_is_named_and_nothing_becomes_visible(running: Cluster) -> None:
    client = running.client
    begun = await client.begin()
    ring = ring_of(begun.grant.keys)
    _, other = seal_volume(ring, random_blocks(9, [5]), total=TOTAL)
    base = other.blocks[0]
    volume, sealed = seal_volume(ring, random_blocks(1, range(10)), total=TOTAL, bases={5: base.id})
    await put(begun.grant, sealed.everything)
    error = await refused(ErrorCode.NOT_DURABLE, client.commit(point_commit(begun, [volume])))
    assert error.block_ids == (base.id,)
    await put(begun.grant, [base], nodes=["node-1"])
    await refused(ErrorCode.NOT_DURABLE, client.commit(point_commit(begun, [volume])))
    assert await client.points() == []
    await put(begun.grant, [base])
    assert (await client.commit(point_commit(begun, [volume]))).number == 1


async def test_a_lost_base_is_damage_of_the_point_that_names_it_so(running: Cluster) -> None:
    client = running.client
    slots = random_blocks(1, range(10))
    snapshot, old = await save(client, slots)
    base = old.blocks[5]
    lineage: dict[str, Any] = {"incremental": True, "snapshot_id": snapshot.point_id}
    changed = slots | random_blocks(2, [5])
    backup, new = await save(client, changed, {5: base.id}, **lineage)
    grant = (await client.begin(takeover=True)).grant
    await running.destroy(grant, base.id)
    report = state_pb2.ReportDamageRequest(block_ids=base.id, resource_id=backup.point_id)
    assert (await client.state("ReportDamage", report)).recorded == 1

    # Who goes on naming it commits only once it is back, although the parent named it too.
    begun = await client.begin(takeover=True, **lineage)
    assert begun.damaged_ids == base.id
    volume, sealed = seal_volume(ring_of(begun.grant.keys), changed, total=TOTAL, bases={5: base.id})
    assert volume.root == backup.volumes[0].root
    error = await refused(ErrorCode.NOT_DURABLE, client.commit(point_commit(begun, [volume])))
    assert error.block_ids == (base.id,)
    await put(begun.grant, [base])
    assert (await client.commit(point_commit(begun, [volume]))).number == 3
    assert (await client.begin(**lineage)).damaged_ids == b""
    assert {block.id for block in sealed.everything} == {block.id for block in new.everything}


async def test_a_base_is_charged_for_unless_the_parent_named_it_there(running: Cluster) -> None:
    client = running.client
    slots = random_blocks(1, range(100))
    snapshot, old = await save(client, slots)
    lineage: dict[str, Any] = {"incremental": True, "snapshot_id": snapshot.point_id}
    at_place = {slot: old.blocks[slot].id for slot in range(20)}
    first, _ = await save(client, slots | random_blocks(2, range(20)), at_place, **lineage)
    assert first.charged_bytes == 20 * BLOCK_BYTES
    # The delta's own base is what its successor is coded against: both points name it there.
    second, _ = await save(client, slots | random_blocks(3, range(20)), at_place, **lineage)
    assert second.charged_bytes == 20 * BLOCK_BYTES
    elsewhere = {slot: old.blocks[slot + 50].id for slot in range(20)}
    third, _ = await save(client, slots | random_blocks(4, range(20)), elsewhere, **lineage)
    assert third.charged_bytes == 40 * BLOCK_BYTES


async def test_sums_count_a_base_that_nothing_else_names_any_more(running: Cluster) -> None:
    client = running.client
    slots = random_blocks(1, range(10))
    snapshot, old = await save(client, slots)
    lineage: dict[str, Any] = {"incremental": True, "snapshot_id": snapshot.point_id}
    bases = {5: old.blocks[5].id}
    _, new = await save(client, slots | random_blocks(2, [5]), bases, **lineage)
    await client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=snapshot.point_id))
    sums = await client.state("GetStats", state_pb2.GetStatsRequest(vm_id="vm-1"))
    assert sums.exclusive_bytes == sum(len(block.data) for block in [*new.everything, old.blocks[5]])
    assert sums.share_blocks == len(new.everything) + 1

    # Another VM that names it shares it.
    await client.register_vm("vm-2")
    _, theirs = await save(client, {5: slots[5]}, vm_id="vm-2")
    sums = await client.state("GetStats", state_pb2.GetStatsRequest(vm_id="vm-1"))
    assert sums.shared_bytes == len(old.blocks[5].data)
    assert theirs.blocks[0].id == old.blocks[5].id
