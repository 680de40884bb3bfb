"""Whole collections in a cluster of real parts: what is deleted, and what never is."""

from __future__ import annotations

from holdfast_core.model.errors import ErrorCode
from holdfast_proto.v1 import state_pb2
from tests.collection.rig import Collecting
from tests.coordinator.content import random_blocks
from tests.coordinator.rig import refused


async def test_what_a_forgotten_point_alone_reached_goes_and_everything_else_stays(running: Collecting) -> None:
    shared = random_blocks(1, range(100))
    await running.client.register_vm("vm-2")
    going = await running.save(shared | random_blocks(2, range(200, 260)))
    staying = await running.save(shared | random_blocks(3, range(200, 210)), vm_id="vm-2")
    kept_object = await running.save_object([b"a" * 100, b"b" * 100])
    grant = await running.reader_grant(staying.record)
    await running.forget(going.record.point_id)
    report = await running.collect()
    kept = {*staying.ids, *kept_object.ids}
    gone = set(going.ids) - kept
    assert await running.copies(grant, kept - set(kept_object.ids)) == dict.fromkeys(set(staying.ids), 3)
    assert set((await running.copies(grant, gone)).values()) == {0}
    assert (report.phase, report.failure) == ("done", "")
    assert (report.points, report.objects, report.sessions) == (1, 1, 0)
    assert report.marked_blocks == len(kept)
    assert (report.deleted_copies, report.garbage_copies, report.young_copies) == (3 * len(gone), 3 * len(gone), 0)
    assert report.listed_copies == 3 * (len(kept) + len(gone))
    assert (report.thin_blocks, report.lost_blocks, list(report.nodes_left_out)) == (0, 0, [])


async def test_a_dry_run_says_what_would_go_and_deletes_nothing(running: Collecting) -> None:
    going = await running.save(random_blocks(1, range(20)))
    grant = await running.reader_grant(going.record)
    await running.forget(going.record.point_id)
    planned = await running.collect(dry_run=True)
    assert (planned.dry_run, planned.garbage_copies, planned.deleted_copies) == (True, 3 * len(going.ids), 0)
    assert set((await running.copies(grant, going.ids)).values()) == {3}
    report = await running.collect()
    assert report.epoch == planned.epoch + 1
    assert report.deleted_bytes == planned.garbage_bytes
    assert set((await running.copies(grant, going.ids)).values()) == {0}


async def test_an_open_session_keeps_what_it_leans_on_and_lets_go_when_it_ends(running: Collecting) -> None:
    begun = await running.begin()
    volume, sealed = await running.write(begun, random_blocks(1, range(50)))
    ids = [block.id for block in sealed.everything]
    for _ in range(2):
        report = await running.collect()
        assert (report.deleted_copies, report.young_copies, report.sessions) == (0, 3 * len(ids), 1)
    made = await running.commit(begun, volume)
    assert (await running.collect()).marked_blocks == len(ids)
    grant = await running.reader_grant(made)
    assert set((await running.copies(grant, ids)).values()) == {3}


async def test_what_an_ended_session_left_behind_goes(running: Collecting) -> None:
    begun = await running.begin()
    _, sealed = await running.write(begun, random_blocks(1, range(10)))
    await running.client.state("AbortSession", state_pb2.AbortSessionRequest(session_id=begun.session_id))
    report = await running.collect()
    assert report.deleted_copies == 3 * len(sealed.everything)


async def test_a_session_whose_parent_is_forgotten_meanwhile_keeps_what_it_inherits(running: Collecting) -> None:
    slots = random_blocks(1, range(TOTAL_SLOTS))
    parent = await running.save(slots)
    begun = await running.begin(incremental=True, snapshot_id=parent.record.point_id)
    await running.forget(parent.record.point_id)
    report = await running.collect()
    assert (report.deleted_copies, report.marked_blocks, report.sessions) == (0, len(set(parent.ids)), 1)
    volume, _ = await running.write(begun, slots | random_blocks(2, [3]), nodes=[])
    made = await running.commit(begun, volume)
    await running.collect()
    grant = await running.reader_grant(made)
    inherited = set(parent.ids[: len(slots)]) - {parent.ids[3]}
    assert set((await running.copies(grant, inherited)).values()) == {3}


async def test_bases_of_deltas_are_kept(running: Collecting) -> None:
    first = await running.save(random_blocks(1, range(5)))
    begun = await running.begin(incremental=True, snapshot_id=first.record.point_id)
    base_id = first.sealed.blocks[2].id
    volume, _ = await running.write(begun, random_blocks(2, range(5)), bases={2: base_id})
    made = await running.commit(begun, volume)
    await running.forget(first.record.point_id)
    await running.collect()
    grant = await running.reader_grant(made)
    assert await running.copies(grant, [base_id]) == {base_id: 3}
    other = first.sealed.blocks[1].id
    assert await running.copies(grant, [other]) == {other: 0}


async def test_a_lapsed_session_cannot_commit_what_was_collected(running: Collecting) -> None:
    begun = await running.begin()
    volume, _ = await running.write(begun, random_blocks(1, range(5)))
    await running.client.begin(takeover=True)
    await refused(ErrorCode.SESSION_LAPSED, running.commit(begun, volume))


TOTAL_SLOTS = 200
