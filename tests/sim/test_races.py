"""The races that a collection, a session and a changing layout can run, each in its worst interleaving, scripted."""

from __future__ import annotations

import asyncio

import pytest

from holdfast_proto.v1 import state_pb2 as pb
from tests.sim.clients import Client, GaveUp, Session
from tests.sim.cluster import Shape
from tests.sim.oracle import Ref
from tests.sim.stage import Stage, play


async def _begin(client: Client, snapshot_id: str = "", *, asks: float = 0.0) -> Session:
    """Begin a session that is kept alive, and send all that it has to; `asks` 1 sends only what is not there."""
    request = pb.BeginPointRequest(incremental=bool(snapshot_id), snapshot_id=snapshot_id)
    session = await client.begin(request)
    client.process.spawn(session.keep_alive())
    session.upload.asks = asks
    await session.write_blocks()
    await session.write_index()
    return session


def _refs(session: Session) -> list[Ref]:
    return [(session.upload.tenant, block_id) for block_id in session.sealing.made]


def test_a_session_that_commits_between_the_reading_of_sessions_and_of_roots() -> None:
    async def script(stage: Stage) -> None:
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

    play(script)


def test_a_session_that_commits_after_the_roots_were_read() -> None:
    async def script(stage: Stage) -> None:
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

    play(script)


def test_an_index_rebuilt_while_a_session_leans_on_a_stamp() -> None:
    async def script(stage: Stage) -> None:
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

    play(script)


def test_a_put_against_a_delete_that_is_under_way() -> None:
    async def script(stage: Stage) -> None:
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

    play(script)


def test_a_delete_that_comes_a_collection_late() -> None:
    async def script(stage: Stage) -> None:
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

    play(script)


def test_a_lease_that_lapses_before_a_late_commit() -> None:
    async def script(stage: Stage) -> None:
        client = await stage.client()
        session = await client.begin(pb.BeginPointRequest())
        await session.write_blocks()
        await session.write_index()
        await stage.until(lambda: not stage.checker.open_sessions)
        await stage.collect()
        await stage.collect()
        assert not any(stage.holders(ref) for ref in _refs(session)), "nothing protects what a lapsed session sent"
        with pytest.raises(GaveUp, match="lapsed"):
            await session.commit()
        assert session.session_id not in stage.checker.visible

    play(script)


def test_a_parent_that_is_forgotten_in_mid_session() -> None:
    async def script(stage: Stage) -> None:
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

    play(script)


def test_what_nobody_needs_is_gone_after_two_collections() -> None:
    async def script(stage: Stage) -> None:
        client = await stage.client()
        gone = await client.snapshot()
        refs = sorted(stage.checker.reached())
        await client.forget(gone)
        await stage.collect()
        await stage.collect()
        assert refs
        assert not any(stage.holders(ref) for ref in refs)

    play(script, Shape(nodes=3))
