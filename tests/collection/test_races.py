"""Collections against everything that may happen beside them: no block that something leans on is ever deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.records import load
from holdfast_core.model.errors import ErrorCode
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Put
from holdfast_proto.v1.blocks_pb2 import VERDICT_OK
from holdfast_proto.v1.collection_pb2 import StartCollectionRequest
from holdfast_proto.v1.records_pb2 import SessionRecord
from tests.collection.hooks import before_first_delete, before_first_listing
from tests.collection.rig import Collecting, collecting
from tests.coordinator.content import random_blocks
from tests.coordinator.rig import eventually, refused

SLOTS = random_blocks(1, range(60))


async def test_a_session_that_commits_between_marking_and_sweeping_loses_nothing(
    running: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = await running.begin()
    volume, sealed = await running.write(begun, SLOTS)
    ids = [block.id for block in sealed.everything]

    async def commit() -> None:
        assert (await running.commit(begun, volume)).number == 1

    before_first_listing(monkeypatch, commit)
    report = await running.collect()
    assert (report.sessions, report.points, report.deleted_copies) == (1, 0, 0)
    assert report.young_copies == 3 * len(ids)
    grant = await running.reader_grant((await running.client.points())[0])
    assert set((await running.copies(grant, ids)).values()) == {3}


async def test_a_session_that_finds_garbage_before_it_is_deleted_keeps_it(
    running: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It began after the marks were made, asks before the delete comes, and sends nothing: the question stamps."""
    gone = await running.save(SLOTS)
    await running.forget(gone.record.point_id)
    made = []

    async def lean() -> None:
        begun = await running.begin()
        async with NodePool() as pool:
            pool.update(begun.grant.nodes)
            for node_id in pool.known():
                verdicts = await pool.has_blocks(node_id, b"".join(gone.ids), begun.grant.capability)
                assert set(verdicts) == {VERDICT_OK}
        made.append(await running.commit(begun, gone.record.volumes[0]))

    before_first_delete(monkeypatch, lean)
    report = await running.collect()
    assert (report.deleted_copies, report.garbage_copies, report.young_copies) == (0, 0, 3 * len(gone.ids))
    grant = await running.reader_grant(made[0])
    assert set((await running.copies(grant, gone.ids)).values()) == {3}


async def test_a_put_of_what_is_about_to_be_deleted_keeps_it(
    running: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = await running.save(SLOTS)
    await running.forget(gone.record.point_id)
    made = []

    async def send_again() -> None:
        begun = await running.begin()
        volume, _ = await running.write(begun, SLOTS)
        made.append(await running.commit(begun, volume))

    before_first_delete(monkeypatch, send_again)
    assert (await running.collect()).deleted_copies == 0
    grant = await running.reader_grant(made[0])
    assert set((await running.copies(grant, gone.ids)).values()) == {3}


async def test_what_is_sent_again_in_the_place_of_corrupt_copies_that_are_about_to_be_deleted_is_kept(
    running: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = await running.save(SLOTS)
    await running.forget(gone.record.point_id)
    for node_id in running.cluster.nodes:
        running.rot(node_id, gone.ids[::2])
    made = []

    async def send_again() -> None:
        begun = await running.begin()
        volume, _ = await running.write(begun, SLOTS)
        made.append(await running.commit(begun, volume))

    before_first_delete(monkeypatch, send_again)
    report = await running.collect()
    assert (report.deleted_copies, report.young_copies) == (0, 3 * len(gone.ids))
    grant = await running.reader_grant(made[0])
    assert set((await running.copies(grant, gone.ids)).values()) == {3}


async def test_what_is_found_corrupt_after_a_session_leaned_on_it_is_kept(
    running: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing reaches it yet, but its stamp stays with it: two other owners have it, and repair will bring it."""
    begun = await running.begin()
    volume, sealed = await running.write(begun, SLOTS)
    ids = [block.id for block in sealed.everything]
    running.rot("node-2", ids[:5])
    report = await running.collect()
    assert (report.deleted_copies, report.young_copies) == (0, 3 * len(ids))
    assert running.store_of("node-2").status().quarantined_count == 5
    grant = await running.reader_grant(await running.commit(begun, volume))
    report = await running.collect()
    assert (report.deleted_copies, report.young_copies, report.thin_blocks) == (0, 0, 5)
    assert running.store_of("node-2").status().quarantined_count == 5
    assert sorted((await running.copies(grant, ids)).values())[:6] == [*[2] * 5, 3]


async def test_what_rots_between_its_listing_and_its_delete_goes(
    running: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = await running.save(SLOTS)
    await running.forget(gone.record.point_id)

    async def rot() -> None:
        for node_id in running.cluster.nodes:
            running.rot(node_id, gone.ids[:5])

    before_first_delete(monkeypatch, rot)
    assert (await running.collect()).deleted_copies == 3 * len(gone.ids)
    assert {running.store_of(node_id).status().quarantined_count for node_id in running.cluster.nodes} == {0}


async def test_what_is_deleted_before_a_commit_is_missed_by_it(
    running: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other order: nothing is visible that names a block which is gone."""
    gone = await running.save(SLOTS)
    await running.forget(gone.record.point_id)
    await running.collect()
    begun = await running.begin()
    error = await refused(ErrorCode.NOT_DURABLE, running.commit(begun, gone.record.volumes[0]))
    assert set(error.block_ids) <= set(gone.ids)
    volume, _ = await running.write(begun, SLOTS)
    assert (await running.commit(begun, volume)).number == 2


async def test_a_session_whose_lease_ends_beside_a_collection_cannot_commit(
    running: Collecting, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = await running.begin()
    volume, sealed = await running.write(begun, SLOTS)
    session = await load(store, keyspace.TenantKeyspace(1).session(begun.session_id), SessionRecord)
    assert session is not None
    await store.revoke_lease(session.message.lease_id)
    assert (await running.collect()).deleted_copies == 3 * len(sealed.everything)
    await refused(ErrorCode.SESSION_LAPSED, running.commit(begun, volume))


async def test_a_session_of_before_there_were_epochs_holds_everything(running: Collecting, store: SqliteStore) -> None:
    gone = await running.save(SLOTS)
    begun = await running.begin()
    space = keyspace.TenantKeyspace(1)
    session = await load(store, space.session(begun.session_id), SessionRecord)
    assert session is not None
    session.message.collection_epoch = 0
    await store.txn([], [Put(session.key, session.message.SerializeToString(), session.message.lease_id)])
    await running.forget(gone.record.point_id)
    report = await running.collect()
    assert (report.cutoff, report.deleted_copies, report.young_copies) == (0, 0, 3 * len(gone.ids))


async def test_a_second_collector_joins_and_another_kind_waits(
    running: Collecting, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = []

    async def start_again() -> None:
        answers.append(await running.start())
        await refused(ErrorCode.BUSY, running.start(dry_run=True))

    before_first_listing(monkeypatch, start_again)
    begun = await running.start()
    report = await running.ended(begun.epoch)
    assert not begun.joined
    assert [(answer.epoch, answer.joined) for answer in answers] == [(begun.epoch, True)]
    assert report.phase == "done"


async def test_a_collector_that_lost_its_lease_deletes_no_more(
    running: Collecting, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = await running.save(SLOTS)
    await running.forget(gone.record.point_id)
    epochs = []

    async def supersede() -> None:
        item = await store.get(keyspace.COLLECTION_RUNNING)
        assert item is not None
        await store.revoke_lease(item.lease_id)
        epochs.append((await running.client.collection("StartCollection", StartCollectionRequest())).epoch)

    before_first_listing(monkeypatch, supersede)
    first = await running.start()
    report = await running.ended(first.epoch + 1)
    assert epochs == [first.epoch + 1]
    # All of it was deleted by the second one: the first stopped before its first batch.
    assert (report.phase, report.deleted_copies) == ("done", 3 * len(gone.ids))


@pytest.mark.slow
async def test_a_node_that_is_down_is_left_out_and_swept_next_time(running: Collecting) -> None:
    gone, kept = await running.save(SLOTS), await running.save(random_blocks(2, range(60)))
    grant = await running.reader_grant(kept.record)
    await running.forget(gone.record.point_id)
    down = running.cluster.nodes["node-3"]
    await down.stop(0.2)
    report = await running.collect()
    assert list(report.nodes_left_out) == ["node-3"]
    assert (report.deleted_copies, report.lost_blocks) == (2 * len(gone.ids), 0)
    await down.start()
    await eventually(running.cluster.is_ready, "the node is back")
    grant = await running.reader_grant(kept.record)
    assert set((await running.copies(grant, gone.ids, nodes=["node-3"])).values()) == {1}
    report = await running.collect()
    assert (report.deleted_copies, list(report.nodes_left_out)) == (len(gone.ids), [])
    assert set((await running.copies(grant, kept.ids)).values()) == {3}


async def test_an_index_that_is_rebuilt_while_a_session_leans_on_a_stamp_loses_nothing(
    store: SqliteStore, tmp_path: Path
) -> None:
    async with collecting(store, folder=tmp_path) as running:
        gone = await running.save(SLOTS)
        await running.forget(gone.record.point_id)
        assert (await running.collect(dry_run=True)).garbage_copies == 3 * len(gone.ids)
        begun = await running.begin()
        async with NodePool() as pool:
            pool.update(begun.grant.nodes)
            for node_id in pool.known():
                await pool.has_blocks(node_id, b"".join(gone.ids), begun.grant.capability)
        for node_id, node in running.cluster.nodes.items():
            await node.stop(0.2)
            files = [file for file in (tmp_path / node_id / "index").iterdir() if file.name == "data.mdb"]
            assert len(files) == 1
            files[0].unlink()
            await node.start()
        await eventually(running.cluster.is_ready, "the nodes are back")
        report = await running.collect()
        assert (report.deleted_copies, report.young_copies) == (0, 3 * len(gone.ids))
        made = await running.commit(begun, gone.record.volumes[0])
        grant = await running.reader_grant(made)
        assert set((await running.copies(grant, gone.ids)).values()) == {3}
