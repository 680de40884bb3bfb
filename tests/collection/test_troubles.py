"""Collections of what is damaged, of several tenants, and by coordinators that die."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest
from google.protobuf.message import Message

from holdfast_coordinator import keyspace
from holdfast_coordinator.collection.epochs import EPOCH_FIRST, epoch_of
from holdfast_coordinator.collection.tenure import TTL_S
from holdfast_core.model.errors import HoldfastError
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1 import collection_pb2, state_pb2
from holdfast_proto.v1.blocks_pb2 import ScanBlocksResponse
from holdfast_proto.v1.tenants_pb2 import CreateTenantRequest
from holdfast_storagenode import service
from holdfast_storagenode.service import send_message
from tests.collection.rig import Collecting
from tests.coordinator.content import Cluster, random_blocks
from tests.coordinator.faults import Crash, Fault, FaultyStore
from tests.coordinator.rig import Client, coordinator, eventually

SLOTS = random_blocks(1, range(60))
CALLS_MAX = 80


@pytest.fixture
async def other(running: Collecting) -> AsyncIterator[Collecting]:
    """The same cluster, from a second tenant that has a VM of the same name."""
    await running.client.tenants("CreateTenant", CreateTenantRequest(name="other"))
    client = Client(running.client.address, tenant="other")
    await client.register_vm()
    try:
        yield Collecting(Cluster(client, running.cluster.nodes, running.cluster.store))
    finally:
        await client.close()


async def test_a_tree_that_cannot_be_read_stops_its_tenant_and_no_other(running: Collecting, other: Collecting) -> None:
    kept, gone = await running.save(SLOTS), await running.save(random_blocks(2, range(60)))
    await running.forget(gone.record.point_id)
    gone_too = await other.save(random_blocks(3, range(30)))
    await other.forget(gone_too.record.point_id)
    grant = await running.reader_grant(kept.record)
    await running.cluster.destroy(grant, kept.sealed.index[0].id)
    report = await running.collect()
    assert [skipped.tenant for skipped in report.tenants_left_out] == ["default"]
    assert kept.record.point_id in report.tenants_left_out[0].reason
    assert report.deleted_copies == 3 * len(gone_too.ids)
    assert set((await running.copies(grant, gone.ids)).values()) == {3}
    # Whoever forgets the point that is broken lets the rest go.
    await running.forget(kept.record.point_id)
    report = await running.collect()
    assert (list(report.tenants_left_out), report.marked_blocks) == ([], 0)
    assert set((await running.copies(grant, gone.ids)).values()) == {0}


async def test_a_block_that_is_on_no_node_is_recorded_as_damage(running: Collecting) -> None:
    kept = await running.save(SLOTS)
    grant = await running.reader_grant(kept.record)
    lost = kept.sealed.blocks[7].id
    await running.cluster.destroy(grant, lost)
    assert (await running.collect(dry_run=True)).lost_blocks == 1
    assert not (await _explained(running, lost)).damaged
    report = await running.collect()
    assert (report.lost_blocks, report.thin_blocks) == (1, 1)
    explained = await _explained(running, lost)
    assert explained.damaged
    assert {copy.state for copy in explained.copies} == {"missing"}


async def test_corrupt_copies_of_garbage_go_and_those_of_what_is_needed_stay(running: Collecting) -> None:
    """One is corrupt on every node, so that nobody could ever replace it; one on one node alone."""
    kept, gone = await running.save(SLOTS), await running.save(random_blocks(2, range(60)))
    grant = await running.reader_grant(kept.record)
    nodes = sorted(running.cluster.nodes)
    for node_id in nodes:
        running.rot(node_id, [gone.sealed.blocks[3].id, kept.sealed.blocks[3].id])
    running.rot(nodes[0], [gone.sealed.blocks[4].id, kept.sealed.blocks[4].id])
    await running.forget(gone.record.point_id)
    count = len(kept.ids) + len(gone.ids)
    planned = await running.collect(dry_run=True)
    assert (planned.listed_copies, planned.garbage_copies) == (3 * count, 3 * len(gone.ids))
    assert (planned.thin_blocks, planned.lost_blocks) == (2, 1)
    # A copy that is not whole is no copy of what is needed, and takes space where nothing needs it.
    report = await running.collect()
    assert (report.garbage_copies, report.deleted_copies) == (3 * len(gone.ids), 3 * len(gone.ids))
    assert report.deleted_bytes == planned.garbage_bytes
    assert (report.thin_blocks, report.lost_blocks, list(report.nodes_left_out)) == (2, 1, [])
    for node_id in nodes:
        status = running.store_of(node_id).status()
        assert status.quarantined_count == (2 if node_id == nodes[0] else 1)
        assert status.block_count == len(kept.ids)
    found = await running.copies(grant, [kept.sealed.blocks[3].id, kept.sealed.blocks[4].id])
    assert sorted(found.values()) == [0, 2]
    for lost, states in ((kept, {"corrupt"}), (gone, {"missing"})):
        explained = await _explained(running, lost.sealed.blocks[3].id)
        assert {copy.state for copy in explained.copies} == states


async def test_a_node_that_calls_corrupt_what_it_does_not_list_is_left_out(
    running: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = await running.save(SLOTS)
    await running.forget(gone.record.point_id)

    async def send(context: service.Context, message: Message | bytes) -> None:
        if isinstance(message, ScanBlocksResponse):
            message.quarantined.append(len(message.lengths))
        await send_message(context, message)

    monkeypatch.setattr(service, "send_message", send)
    report = await running.collect()
    assert list(report.nodes_left_out) == sorted(running.cluster.nodes)
    assert (report.phase, report.deleted_copies, report.lost_blocks) == ("done", 0, 0)


async def test_what_is_on_too_few_owners_is_counted(running: Collecting) -> None:
    begun = await running.begin()
    volume, sealed = await running.write(begun, SLOTS, nodes=["node-1", "node-2"])
    await running.commit(begun, volume)
    report = await running.collect(dry_run=True)
    assert (report.thin_blocks, report.lost_blocks) == (len(sealed.everything), 0)


async def test_an_old_session_holds_up_its_own_tenant_alone(running: Collecting, other: Collecting) -> None:
    old = await running.save(SLOTS)
    await running.begin()  # stays open under the first epoch
    for seed in range(2, 4):
        gone = await other.save(random_blocks(seed, range(20)))
        await other.forget(gone.record.point_id)
        report = await running.collect()
        assert report.deleted_copies == 3 * len(gone.ids)
        assert report.cutoff == EPOCH_FIRST
    await running.forget(old.record.point_id)
    report = await running.collect()
    assert (report.deleted_copies, report.young_copies) == (0, 3 * len(old.ids))


async def test_why_and_reclaimable_tell_of_points_objects_and_sessions(running: Collecting) -> None:
    first = await running.save(SLOTS)
    second = await running.save(SLOTS | random_blocks(2, [0, 299]), incremental=True, snapshot_id=first.record.point_id)
    begun = await running.begin(incremental=True, snapshot_id=first.record.point_id)
    block = first.sealed.blocks[10]
    found = await _explained(running, block.id)
    assert {(holder.resource_id, holder.role) for holder in found.holders} == {
        (first.record.point_id, "data"),
        (second.record.point_id, "data"),
        (begun.session_id, "data"),
    }
    assert {holder.offset_bytes for holder in found.holders if holder.volume} == {10 * 65536}
    assert [(copy.node_id, copy.state, copy.owner) for copy in found.copies] == [
        (f"node-{number}", "ok", True) for number in (1, 2, 3)
    ]
    await running.client.state("AbortSession", state_pb2.AbortSessionRequest(session_id=begun.session_id))
    request = collection_pb2.GetReclaimableRequest(vm_id="vm-1")
    answer = await running.client.collection("GetReclaimable", request)
    both = {block.id: len(block.data) for saved in (first, second) for block in saved.sealed.everything}
    assert (answer.blocks, answer.bytes, answer.copies_bytes) == (
        len(both),
        sum(both.values()),
        3 * sum(both.values()),
    )
    alone = {point.point_id: point.blocks for point in answer.points}
    assert alone[first.record.point_id] == len(set(first.ids) - set(second.ids))
    assert alone[second.record.point_id] == len(set(second.ids) - set(first.ids))
    await running.forget(second.record.point_id)
    assert (await running.collect()).deleted_copies == 3 * alone[second.record.point_id]


async def test_who_may_not_list_a_vm_hears_nothing_of_its_points(running: Collecting) -> None:
    await running.client.register_vm("vm-2")
    await running.save(SLOTS)
    mine = await running.save(SLOTS, vm_id="vm-2")
    token = await running.client.new_token("eve")
    await running.client.bind(
        ("eve", "asks", "tenant/*"),
        ("eve", "lists", "vm/vm-2"),
        roles={"asks": ["stats.read"], "lists": ["point.list", "stats.read"]},
    )
    client = Client(running.client.address, token=token)
    try:
        answer = await client.collection(
            "ExplainBlock", collection_pb2.ExplainBlockRequest(block_id=mine.sealed.blocks[0].id)
        )
        assert [holder.resource_id for holder in answer.holders] == [mine.record.point_id]
        with pytest.raises(HoldfastError, match="does not hold"):
            await client.collection("GetReclaimable", collection_pb2.GetReclaimableRequest(vm_id="vm-1"))
        with pytest.raises(HoldfastError, match="does not hold"):
            await client.collection("StartCollection", collection_pb2.StartCollectionRequest())
    finally:
        await client.close()


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(Fault))
async def test_a_coordinator_that_dies_anywhere_in_a_collection_leaves_nothing_behind(fault: Fault) -> None:
    """There are no nodes behind the names: every node is left out, and the calls of the store are what is tried."""
    clock = ManualClock()
    store = await SqliteStore.open(":memory:", clock)
    faults = FaultyStore(store)
    try:
        async with coordinator(store, clock=clock, seed=2) as healthy:
            await healthy.form_layout()
            epoch = EPOCH_FIRST
            for at in range(CALLS_MAX):
                # What ends its background work is told when it is stopped.
                with suppress(Crash):
                    async with coordinator(faults, clock=clock) as failing:
                        faults.arm(fault, at=at)
                        await _tried(failing)
                        await _idle(faults)
                        struck = faults.struck
                        faults.arm(None)
                # Whatever it left behind ends with its lease.
                clock.advance(TTL_S + 1)
                begun = await healthy.collection("StartCollection", collection_pb2.StartCollectionRequest())
                assert not begun.joined
                assert begun.epoch > epoch
                epoch = begun.epoch

                async def ended(epoch: int = epoch) -> bool:
                    answer = await healthy.collection("GetCollection", collection_pb2.GetCollectionRequest())
                    return not answer.HasField("running") and answer.last.epoch == epoch

                await eventually(ended, "the healthy coordinator's collection ends")
                assert epoch_of(await store.get(keyspace.COLLECTION_EPOCH)) == epoch
                if not struck:
                    break
            assert 8 < at < CALLS_MAX - 1
    finally:
        await store.close()


async def _tried(client: Client) -> None:
    try:
        await client.collection("StartCollection", collection_pb2.StartCollectionRequest())
    except HoldfastError:
        return


async def _idle(faults: FaultyStore) -> None:
    """Wait until a store has not been called for a while."""
    calls = -1
    while calls != faults.calls:
        calls = faults.calls
        await asyncio.sleep(0.05)


async def _explained(running: Collecting, block_id: bytes) -> collection_pb2.ExplainBlockResponse:
    answer: collection_pb2.ExplainBlockResponse = await running.client.collection(
        "ExplainBlock", collection_pb2.ExplainBlockRequest(block_id=block_id)
    )
    return answer
