"""Commits against real storage nodes: what must be durable, and what becomes of a commit that names more."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from holdfast_coordinator import barrier
from holdfast_core.model.errors import ErrorCode
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.names import split_ids
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import PointRecord
from tests.coordinator.content import Cluster, cluster, put, random_blocks, seal_object, seal_volume
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


@pytest.fixture
def client(running: Cluster) -> Client:
    """A client of the cluster's coordinator."""
    return running.client


async def save_blocks(client: Client, slots: dict[int, bytes], *, total: int = TOTAL, **fields: Any) -> PointRecord:
    """Make a point of these blocks and return it."""
    begun = await client.begin(**fields)
    volume, sealed = seal_volume(ring_of(begun.grant.keys), slots, total=total)
    await put(begun.grant, sealed.everything)
    made: PointRecord = await client.commit(point_commit(begun, [volume]))
    return made


async def test_a_point_whose_blocks_are_all_there_becomes_visible(client: Client) -> None:
    made = await save_blocks(client, random_blocks(1, range(0, TOTAL, 3)))
    assert made.stats.under_replicated_blocks == 0
    assert await client.points() == [made]


async def test_a_block_that_is_nowhere_is_named_and_nothing_becomes_visible(client: Client) -> None:
    begun = await client.begin()
    volume, sealed = seal_volume(ring_of(begun.grant.keys), random_blocks(1, range(10)), total=TOTAL)
    lost = sealed.blocks[4]
    await put(begun.grant, [block for block in sealed.everything if block is not lost])
    error = await refused(ErrorCode.NOT_DURABLE, client.commit(point_commit(begun, [volume])))
    assert error.block_ids == (lost.id,)
    assert await client.points() == []
    await put(begun.grant, [lost])
    assert (await client.commit(point_commit(begun, [volume]))).number == 1


@pytest.mark.parametrize("at", [0, 290])
async def test_owners_are_asked_while_the_index_is_read_on(
    client: Client, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(barrier, "ASKED_IDS", 100)
    monkeypatch.setattr(barrier, "NODES_PER_READ", 1)
    begun = await client.begin()
    # What comes again in another leaf is asked about once and charged once, whatever was asked about in between.
    slots = random_blocks(1, range(TOTAL)) | {slot + 150: block for slot, block in random_blocks(1, range(9)).items()}
    volume, sealed = seal_volume(ring_of(begun.grant.keys), slots, total=TOTAL)
    lost = sealed.blocks[at]
    await put(begun.grant, [block for block in sealed.everything if block.id != lost.id])
    error = await refused(ErrorCode.NOT_DURABLE, client.commit(point_commit(begun, [volume])))
    assert error.block_ids == (lost.id,)
    await put(begun.grant, [lost])
    made = await client.commit(point_commit(begun, [volume]))
    assert made.charged_bytes == (TOTAL - 9) * BLOCK_BYTES


async def test_an_index_node_that_is_nowhere_is_named(client: Client) -> None:
    begun = await client.begin()
    volume, sealed = seal_volume(ring_of(begun.grant.keys), random_blocks(1, [1, 200]), total=TOTAL)
    leaf = sealed.index[0]
    await put(begun.grant, [*sealed.blocks, *sealed.index[1:]])
    error = await refused(ErrorCode.NOT_DURABLE, client.commit(point_commit(begun, [volume])))
    assert error.block_ids == (leaf.id,)
    assert await client.points() == []


async def test_one_copy_is_not_durable_and_a_write_quorum_is(client: Client) -> None:
    begun = await client.begin()
    volume, sealed = seal_volume(ring_of(begun.grant.keys), random_blocks(1, range(10)), total=TOTAL)
    await put(begun.grant, sealed.everything, nodes=["node-2"])
    error = await refused(ErrorCode.NOT_DURABLE, client.commit(point_commit(begun, [volume])))
    assert set(error.block_ids) == {block.id for block in sealed.everything}
    await put(begun.grant, sealed.everything, nodes=["node-3"])
    made = await client.commit(point_commit(begun, [volume]))
    assert made.stats.under_replicated_blocks == len(sealed.everything)


async def test_a_node_that_is_gone_leaves_the_quorum_to_decide(running: Cluster) -> None:
    client = running.client
    begun = await client.begin()
    ring = ring_of(begun.grant.keys)
    volume, sealed = seal_volume(ring, random_blocks(1, range(10)), total=TOTAL)
    await put(begun.grant, sealed.everything)
    await running.nodes["node-1"].stop(0.2)
    assert (await client.commit(point_commit(begun, [volume]))).number == 1
    begun = await client.begin()
    volume, sealed = seal_volume(ring, random_blocks(2, range(10)), total=TOTAL)
    await put(begun.grant, sealed.everything, nodes=["node-2", "node-3"])
    await running.nodes["node-2"].stop(0.2)
    await refused(ErrorCode.UNREACHABLE, client.commit(point_commit(begun, [volume])))
    assert len(await client.points()) == 1
    await running.nodes["node-2"].start()
    await running.nodes["node-1"].start()


async def test_a_backup_is_checked_for_what_it_newly_names(client: Client) -> None:
    slots = random_blocks(1, range(TOTAL))
    snapshot = await save_blocks(client, slots)
    begun = await client.begin(incremental=True, snapshot_id=snapshot.point_id)
    ring = ring_of(begun.grant.keys)
    changed = slots | random_blocks(2, [7, 299])
    volume, sealed = seal_volume(ring, changed, total=TOTAL)
    known = {block.id for block in seal_volume(ring, slots, total=TOTAL)[1].everything}
    new = [block for block in sealed.everything if block.id not in known]
    # Two blocks, the leaves that name them, and the root; the middle leaf is the parent's.
    assert len(new) == 5
    lost = next(block for block in new if block in sealed.blocks)
    await put(begun.grant, [block for block in new if block is not lost])
    error = await refused(ErrorCode.NOT_DURABLE, client.commit(point_commit(begun, [volume])))
    assert error.block_ids == (lost.id,)
    await put(begun.grant, [lost])
    made = await client.commit(point_commit(begun, [volume]))
    assert (made.number, made.parent_id) == (2, snapshot.point_id)


@pytest.mark.parametrize("total", [1, 128, 129, 128 * 128 + 5])
async def test_a_volume_may_grow_and_shrink_between_points(client: Client, total: int) -> None:
    snapshot = await save_blocks(client, random_blocks(1, range(0, TOTAL, 7)))
    backup = await save_blocks(
        client, random_blocks(1, [0]), total=total, incremental=True, snapshot_id=snapshot.point_id
    )
    again = await save_blocks(
        client, random_blocks(1, range(0, TOTAL, 7)), incremental=True, snapshot_id=snapshot.point_id
    )
    assert [backup.number, again.number] == [2, 3]


async def test_what_a_commit_may_not_say(client: Client) -> None:
    begun = await client.begin()
    ring = ring_of(begun.grant.keys)
    volume, sealed = seal_volume(ring, random_blocks(1, range(10)), total=TOTAL)
    await put(begun.grant, sealed.everything)
    good = point_commit(begun, [volume])

    async def refuse(code: ErrorCode, **changes: object) -> None:
        wrong = type(volume)()
        wrong.CopyFrom(volume)
        for name, value in changes.items():
            setattr(wrong, name, value)
        await refused(code, client.commit(point_commit(begun, [wrong])))

    await refuse(ErrorCode.INVALID_ARGUMENT, name="")
    await refuse(ErrorCode.INVALID_ARGUMENT, name="a/b")
    await refuse(ErrorCode.INVALID_ARGUMENT, block_bytes=1000)
    await refuse(ErrorCode.INVALID_ARGUMENT, root=b"short")
    await refuse(ErrorCode.INVALID_ARGUMENT, root=b"")
    await refuse(ErrorCode.INVALID_ARGUMENT, block_count=TOTAL + 1)
    await refuse(ErrorCode.INVALID_ARGUMENT, consistency=0)
    await refuse(ErrorCode.LIMIT_EXCEEDED, size_bytes=1 << 60)
    # The tree holds more positions than this size has.
    await refuse(ErrorCode.CORRUPT, size_bytes=5 * volume.block_bytes, block_count=5)
    await refused(ErrorCode.INVALID_ARGUMENT, client.commit(point_commit(begun, [])))
    forged = state_pb2.CommitPointRequest()
    forged.CopyFrom(good)
    forged.mac = bytes(32)
    await refused(ErrorCode.INVALID_ARGUMENT, client.commit(forged))
    forged.mac = b"x"
    await refused(ErrorCode.INVALID_ARGUMENT, client.commit(forged))
    other_parent = state_pb2.CommitPointRequest()
    other_parent.CopyFrom(good)
    other_parent.parent_id = "snap-other"
    await refused(ErrorCode.MISMATCH, client.commit(other_parent))
    # A data block is no index node.
    await refuse(ErrorCode.CORRUPT, root=sealed.blocks[0].id)
    assert await client.points() == []
    assert (await client.commit(good)).number == 1


async def test_an_object_is_checked_too(client: Client) -> None:
    source = random.Random(3)
    cuts = [source.randbytes(100 + number) for number in range(200)]
    request = state_pb2.BeginObjectRequest(task_id="task-1", nonce=source.randbytes(16))
    begun = await client.state("BeginObject", request)
    commit, sealed = seal_object(begun, "task-1", cuts)
    lost = sealed.blocks[150]
    await put(begun.grant, [block for block in sealed.everything if block is not lost])
    error = await refused(ErrorCode.NOT_DURABLE, client.state("CommitObject", commit))
    assert error.block_ids == (lost.id,)
    await put(begun.grant, [lost])
    commit.size_bytes += 1
    await refused(ErrorCode.INVALID_ARGUMENT, client.state("CommitObject", commit))
    commit.size_bytes -= 1
    commit.block_count -= 1
    await refused(ErrorCode.CORRUPT, client.state("CommitObject", commit))
    commit.block_count += 1
    made = (await client.state("CommitObject", commit)).object
    assert (made.size_bytes, made.block_count) == (sum(map(len, cuts)), 200)


async def test_a_session_commits_only_what_it_is_for(client: Client) -> None:
    point = await client.begin()
    request = state_pb2.BeginObjectRequest(task_id="task-1", nonce=bytes(16))
    thing = await client.state("BeginObject", request)
    commit, _ = seal_object(thing, "task-1", [])
    commit.session_id = point.session_id
    await refused(ErrorCode.MISMATCH, client.state("CommitObject", commit))
    volume, _ = seal_volume(ring_of(point.grant.keys), {}, total=TOTAL)
    wrong = point_commit(point, [volume])
    wrong.session_id = thing.session_id
    await refused(ErrorCode.MISMATCH, client.commit(wrong))


async def test_damage_is_recorded_only_when_the_owners_confirm_it(running: Cluster) -> None:
    client = running.client
    slots = random_blocks(1, range(10))
    snapshot = await save_blocks(client, slots)
    ring = ring_of((await client.begin(takeover=True)).grant.keys)
    _, sealed = seal_volume(ring, slots, total=TOTAL)
    there, gone, later = (block.id for block in sealed.blocks[:3])
    grant = (await client.begin(takeover=True)).grant
    await running.destroy(grant, gone)
    report = state_pb2.ReportDamageRequest(block_ids=there + gone, resource_id=snapshot.point_id)
    assert (await client.state("ReportDamage", report)).recorded == 1
    begun = await client.begin(takeover=True, incremental=True, snapshot_id=snapshot.point_id)
    assert begun.damaged_ids == gone
    await running.destroy(grant, later)
    await running.nodes["node-3"].stop(0.2)
    report.block_ids = later
    assert (await client.state("ReportDamage", report)).recorded == 0
    unknown = state_pb2.ReportDamageRequest(block_ids=gone, resource_id="snap-none")
    await refused(ErrorCode.NOT_FOUND, client.state("ReportDamage", unknown))


async def test_a_report_counts_only_for_what_its_resource_names(running: Cluster) -> None:
    client = running.client
    await client.register_vm("vm-2")
    wide = random_blocks(1, range(0, TOTAL, 3))
    mine = await save_blocks(client, wide)
    theirs = await save_blocks(client, random_blocks(2, range(10)), vm_id="vm-2")
    grant = (await client.begin()).grant
    _, own = seal_volume(ring_of(grant.keys), wide, total=TOTAL)
    _, foreign = seal_volume(ring_of(grant.keys), random_blocks(2, range(10)), total=TOTAL)
    # The second leaf of the index is lost with all that it names; of what it names nobody can tell any more.
    leaf, below, beside = own.index[1].id, own.blocks[TREE_FAN_OUT // 3 + 1].id, own.blocks[0].id
    nobodys, another = bytes([9]) * 32, foreign.blocks[0].id
    for block_id in (leaf, below, beside, another):
        await running.destroy(grant, block_id)
    for point, named in ((mine, {leaf, beside}), (theirs, {another})):
        block_ids = b"".join([leaf, below, beside, another, nobodys])
        report = state_pb2.ReportDamageRequest(block_ids=block_ids, resource_id=point.point_id)
        assert (await client.state("ReportDamage", report)).recorded == len(named)
    begun = await client.begin("vm-2", incremental=True, snapshot_id=theirs.point_id)
    assert set(split_ids(begun.damaged_ids)) == {leaf, beside, another}


async def test_a_point_that_names_a_damaged_block_commits_only_once_it_is_back(running: Cluster) -> None:
    client = running.client
    slots = random_blocks(1, range(10))
    snapshot = await save_blocks(client, slots)
    begun = await client.begin(incremental=True, snapshot_id=snapshot.point_id)
    ring = ring_of(begun.grant.keys)
    changed = slots | random_blocks(2, [200])
    volume, sealed = seal_volume(ring, changed, total=TOTAL)
    # Lost behind our back: reported under an id that this point inherits, after the nodes were emptied of it.
    lost = sealed.blocks[3]
    await running.destroy(begun.grant, lost.id)
    report = state_pb2.ReportDamageRequest(block_ids=lost.id, resource_id=snapshot.point_id)
    assert (await client.state("ReportDamage", report)).recorded == 1
    await put(begun.grant, [block for block in sealed.everything if block is not lost])
    error = await refused(ErrorCode.NOT_DURABLE, client.commit(point_commit(begun, [volume])))
    assert error.block_ids == (lost.id,)
    await put(begun.grant, [lost])
    assert (await client.commit(point_commit(begun, [volume]))).number == 2
    after = await client.begin(incremental=True, snapshot_id=snapshot.point_id)
    assert after.damaged_ids == b""


async def test_sums_tell_what_is_a_vms_own_and_what_it_shares(client: Client) -> None:
    common, own = random_blocks(1, range(200)), random_blocks(2, range(200, 250))
    first = await save_blocks(client, common | own)
    await save_blocks(client, common | random_blocks(3, range(210, 220)), incremental=True, snapshot_id=first.point_id)
    await client.register_vm("vm-2")
    ring = ring_of((await client.begin("vm-2")).grant.keys)
    alone = await client.state("GetStats", state_pb2.GetStatsRequest(vm_id="vm-1"))
    assert alone.shared_bytes == 0
    await save_blocks(client, common, vm_id="vm-2", takeover=True)

    def blocks_of(slots: dict[int, bytes]) -> dict[bytes, int]:
        return {block.id: len(block.data) for block in seal_volume(ring, slots, total=TOTAL)[1].everything}

    mine = blocks_of(common | own) | blocks_of(common | random_blocks(3, range(210, 220)))
    theirs = blocks_of(common)
    one = await client.state("GetStats", state_pb2.GetStatsRequest(vm_id="vm-1"))
    assert one.exclusive_bytes == sum(length for block_id, length in mine.items() if block_id not in theirs)
    assert one.shared_bytes == sum(length for block_id, length in mine.items() if block_id in theirs)
    assert one.exclusive_bytes + one.shared_bytes == alone.exclusive_bytes
    everything = await client.state("GetStats", state_pb2.GetStatsRequest())
    assert (everything.exclusive_bytes, everything.shared_bytes) == (sum((mine | theirs).values()), 0)


async def test_sums_of_the_records_come_even_if_no_node_answers(running: Cluster) -> None:
    await save_blocks(running.client, random_blocks(1, range(10)))
    for node in running.nodes.values():
        await node.stop(0.2)
    sums = await running.client.state("GetStats", state_pb2.GetStatsRequest(vm_id="vm-1"))
    assert sums.point_count == 1
    assert not sums.HasField("exclusive_bytes")
    assert not sums.HasField("shared_bytes")
