"""The races that a collection, a session and a changing layout can run, each in its worst interleaving.

Each script passes on the product as it is, whatever it does to it; `test_mutations` plays some of them on a product
that lacks one protection, and there they have to fail.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from holdfast_coordinator import keyspace
from holdfast_core.runtime.metadata.store import Operation, Put
from holdfast_proto.v1 import state_pb2 as pb
from tests.sim.clients import Client, GaveUp, Session
from tests.sim.oracle import Ref
from tests.sim.stage import Stage


async def _begin(client: Client, snapshot_id: str = "", *, asks: float = 0.0) -> Session:
    """Begin a session that is kept alive, and send all that it has to; `asks` 1 sends only what is not there."""
    request = pb.BeginPointRequest(incremental=bool(snapshot_id), snapshot_id=snapshot_id)
    session = await client.begin(request)
    client.process.spawn(session.keep_alive())
    session.upload.asks = asks
    await session.write_blocks()
    await session.write_index()
    return session


async def _gives_up(commit: Awaitable[object]) -> bool:
    try:
        await commit
    except GaveUp as error:
        return "lapsed" in str(error)
    return False


def _refs(session: Session) -> list[Ref]:
    return [(session.upload.tenant, block_id) for block_id in session.sealing.made]


async def a_session_that_commits_between_the_reading_of_sessions_and_of_roots(stage: Stage) -> None:
    """A session that commits between the reading of sessions and of roots."""
    client = await stage.client()
    session = await _begin(client)
    committed = asyncio.Event()

    async def before(name: str, argument: object) -> None:
        # The first collector that is about to read its roots finds the session gone, and the point there.
        if name == "scan" and not committed.is_set():
            committed.set()
            await session.commit()

    for host in stage.cluster.coordinators.values():
        assert host.link is not None
        host.link.before = before
    await stage.collect()
    assert committed.is_set()
    assert await client.restore(session.session_id, session.session_id)


async def a_session_that_commits_after_the_roots_were_read(stage: Stage) -> None:
    """A session that commits after the roots were read."""
    client = await stage.client()
    session = await _begin(client)
    held = stage.hold("ScanBlocks", lambda: session.session_id in stage.checker.visible)
    collecting = stage.loop.create_task(stage.collect())
    await stage.until(lambda: bool(held))
    await session.commit()
    await collecting
    assert await client.restore(session.session_id, session.session_id)
    await stage.collect()
    assert await client.restore(session.session_id, session.session_id)


async def an_index_rebuilt_while_a_session_leans_on_a_stamp(stage: Stage) -> None:
    """An index rebuilt while a session leans on a stamp."""
    client = await stage.client()
    await client.forget(await client.snapshot())
    # Nothing reaches what is there any more; the session finds it and leans on it without sending it.
    session = await _begin(client, asks=1.0)
    for node in list(stage.cluster.nodes.values())[:2]:
        node.crash(stage.cluster.partition_of, rebuild=True)
        node.start()
    await stage.collect()
    await stage.collect()
    await session.commit()
    await stage.collect()
    assert await client.restore(session.session_id, session.session_id)


async def a_put_against_a_delete_that_is_under_way(stage: Stage) -> None:
    """A put against a delete that is under way."""
    client = await stage.client()
    await client.forget(await client.snapshot())
    sent = False
    held = stage.hold("DeleteBlocks", lambda: sent)
    collecting = stage.loop.create_task(stage.collect())
    await stage.until(lambda: len(held) >= 2)
    session = await _begin(client, asks=1.0)
    sent = True
    await collecting
    await session.commit()
    assert await client.restore(session.session_id, session.session_id)


async def a_delete_that_comes_a_collection_late(stage: Stage) -> None:
    """A delete that comes a collection late."""
    client = await stage.client()
    await client.forget(await client.snapshot())
    released = False
    held = stage.hold("DeleteBlocks", lambda: released)
    stage.loop.create_task(stage.operator.collect())
    await stage.until(lambda: len(held) >= 2)
    for host in stage.cluster.coordinators.values():
        host.crash()
        host.start()
    await asyncio.sleep(20.0)
    session = await _begin(client, asks=1.0)
    await session.commit()
    released = True
    await asyncio.sleep(5.0)
    assert await client.restore(session.session_id, session.session_id)


async def a_lease_that_lapses_before_a_late_commit(stage: Stage) -> None:
    """A lease that lapses before a late commit."""
    client = await stage.client()
    session = await client.begin(pb.BeginPointRequest())
    await session.write_blocks()
    await session.write_index()
    await stage.until(lambda: not stage.checker.open_sessions)
    await stage.collect()
    await stage.collect()
    assert not any(stage.holders(ref) for ref in _refs(session)), "nothing protects what a lapsed session sent"
    assert await _gives_up(session.commit())
    assert session.session_id not in stage.checker.visible


async def a_parent_that_is_forgotten_in_mid_session(stage: Stage) -> None:
    """A parent that is forgotten in mid session."""
    client = await stage.client()
    parent = await client.snapshot()
    client.content = {**client.content, 3: b"changed"}
    session = await _begin(client, parent)
    await client.forget(parent)
    await stage.collect()
    await stage.collect()
    await session.commit()
    assert await client.restore(parent, session.session_id)
    await stage.collect()
    assert await client.restore(parent, session.session_id)


async def what_nobody_needs_is_gone_after_two_collections(stage: Stage) -> None:
    """What nobody needs is gone after two collections."""
    client = await stage.client()
    gone = await client.snapshot()
    refs = sorted(stage.checker.reached())
    await client.forget(gone)
    await stage.collect()
    await stage.collect()
    assert refs
    assert not any(stage.holders(ref) for ref in refs)


async def corrupt_copies_of_what_nobody_needs_are_gone_after_two_collections(stage: Stage) -> None:
    """Some are corrupt on one node, which repair makes good before; some on all, which nothing can make good."""
    client = await stage.client()
    gone = await client.snapshot()
    refs = sorted(stage.checker.reached())
    await client.forget(gone)
    for ref in refs[::3]:
        stage.spoil(stage.holders(ref)[0], ref)
    for ref in refs[1::3]:
        for node_id in stage.holders(ref):
            stage.spoil(node_id, ref)
    await stage.collect()
    await stage.collect()
    assert not [ref for ref in refs if stage.keepers(ref)]


async def a_put_against_a_delete_of_corrupt_copies(stage: Stage) -> None:
    """Copies are listed as corrupt garbage; before the delete comes, a session has sent the blocks again."""
    client = await stage.client()
    gone = await client.snapshot()
    refs = sorted(stage.checker.reached())
    await client.forget(gone)
    for ref in refs:
        for node_id in stage.holders(ref):
            stage.spoil(node_id, ref)
    sent = False
    held = stage.hold("DeleteBlocks", lambda: sent)
    collecting = stage.loop.create_task(stage.collect())
    await stage.until(lambda: len(held) >= 2)
    session = await _begin(client, asks=1.0)
    sent = True
    await collecting
    await session.commit()
    assert await client.restore(session.session_id, session.session_id)


async def a_layout_change_while_a_session_leans_on_old_owners(stage: Stage) -> None:
    """A session found blocks on two of three owners; the third, and who pulls from it, has them unstamped."""
    client = await stage.client()
    await client.forget(await client.snapshot())
    # As a collection does that raised the epoch and died.
    stage.cluster.tables.apply([], [Put(keyspace.COLLECTION_EPOCH, b"2")])
    stage.cluster.network.cut([client.process.name], ["node-1"])
    session = await _begin(client, asks=1.0)
    stage.cluster.network.heal()
    # One collection reads its roots before the layout changes, and lists what nodes have when it has settled.
    stage.hold("ScanBlocks", lambda: stage.released)
    collecting = stage.loop.create_task(stage.collect())
    await asyncio.sleep(1.0)
    await stage.set_node("node-2", draining=True)
    await stage.until(lambda: len(stage.checker.living) == 1)
    stage.released = True
    await collecting
    await stage.collect()
    await session.commit()
    assert await client.restore(session.session_id, session.session_id)


async def a_drain_and_a_kill_at_once(stage: Stage) -> None:
    """One node is drained and another lost with its disk in the same moment."""
    client = await stage.client()
    made = await client.snapshot()
    await stage.set_node("node-2", draining=True)
    stage.lose("node-3")
    session = await _begin(client, made)
    await stage.until(lambda: "node-3" not in stage.members())
    await session.commit()
    await stage.until(lambda: len(stage.checker.living) == 1)
    await stage.until(lambda: all(map(stage.checker.whole, stage.checker.reached())))
    assert await client.restore(made, session.session_id)
    await stage.until(lambda: not stage.cluster.nodes["node-2"].disk.used_bytes)


async def a_write_that_is_under_way_when_the_layout_changes(stage: Stage) -> None:
    """Disks stand still in the middle of a write under the old layout; two of its owners leave meanwhile."""
    client = await stage.client()
    session = await client.begin(pb.BeginPointRequest())
    client.process.spawn(session.keep_alive())
    session.upload.timeout_s = 200.0
    session.upload.asks = 0.0
    for host in stage.cluster.nodes.values():
        host.disk.stands_still = True
    writing = client.process.spawn(session.write_blocks())
    await asyncio.sleep(1.0)
    for node_id in ("node-2", "node-3"):
        await stage.set_node(node_id, draining=True)
    await asyncio.sleep(22.0)
    for host in stage.cluster.nodes.values():
        host.disk.stands_still = False
    await writing
    await session.write_index()
    await session.commit()
    await stage.until(lambda: len(stage.checker.living) == 1)
    assert await client.restore(session.session_id, session.session_id)


async def a_commit_whose_transaction_comes_after_its_lease(stage: Stage) -> None:
    """The commit has checked everything; then its session lapses, and two collections pass, before it is applied."""
    client = await stage.client()
    session = await client.begin(pb.BeginPointRequest())
    stage.cluster.network.cut([client.process.name], ["coordinator-1"])
    await session.write_blocks()
    await session.write_index()
    released = asyncio.Event()

    async def before(name: str, argument: object) -> None:
        operations: list[Operation] = argument if name == "txn" and isinstance(argument, list) else []
        if any("/points/" in operation.key for operation in operations):
            await released.wait()

    link = stage.cluster.coordinators["coordinator-2"].link
    assert link is not None
    link.before = before
    committing = client.process.spawn(session.commit())
    await stage.until(lambda: not stage.checker.open_sessions)
    await stage.collect()
    await stage.collect()
    released.set()
    link.before = None
    assert await _gives_up(committing)
    assert session.session_id not in stage.checker.visible


async def a_drop_while_an_owner_lacks_the_block(stage: Stage) -> None:
    """An owner finds its copy rotten just when another node may let go of the block."""
    client = await stage.client()
    made = await client.snapshot()
    stage.hold("confirm", lambda: stage.released)
    await stage.set_node("node-2", draining=True)
    await stage.until(lambda: len(stage.checker.living) == 1)
    for ref in sorted(stage.checker.reached()):
        stage.spoil(stage.checker.living[0].owners_of_block(ref[1])[0], ref)
    stage.released = True
    await stage.until(lambda: not stage.cluster.nodes["node-2"].disk.used_bytes)
    assert await client.restore(made, made)
    await stage.until(lambda: all(map(stage.checker.whole, stage.checker.reached())))


async def what_is_lost_beyond_the_promise_is_told_and_healed(stage: Stage) -> None:
    """All copies of a block rot at once: it is told, recorded, and healed by who sends the content again."""
    client = await stage.client()
    made = await client.snapshot()
    tenant = session_tenant(stage)
    lost = next(ref for ref in sorted(stage.checker.reached()) if stage.is_data(ref))
    for node_id in stage.holders(lost):
        stage.spoil(node_id, lost)
    assert not await client.restore(made, made)
    assert "CORRUPT" in stage.cluster.oracle.complaints.pop()
    report = pb.ReportDamageRequest(resource_id=made, block_ids=lost[1])
    assert (await client.call("ReportDamage", report)).recorded == 1
    assert stage.cluster.tables.now(keyspace.TenantKeyspace(tenant).damage_ids_prefix)
    healed = await client.backup(made)
    assert not stage.cluster.tables.now(keyspace.TenantKeyspace(tenant).damage_ids_prefix)
    assert await client.restore(made, healed)
    assert await client.restore(made, made)


def session_tenant(stage: Stage) -> int:
    """Return the number of the only tenant that has anything."""
    return next(ref[0] for ref in stage.checker.reached())
