"""Sessions over gRPC: who may begin, who holds a VM, and what becomes of those who lost it."""

from __future__ import annotations

from holdfast_core.model.errors import ErrorCode
from holdfast_core.model.limits import CAPABILITY_TTL_S
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1 import state_pb2
from tests.coordinator.rig import Client, coordinator, empty_object_commit, refused, zero_commit

NONCE = b"n" * 16


async def test_the_same_begin_again_is_the_same_session(client: Client) -> None:
    first = await client.begin(nonce=NONCE)
    again = await client.begin(nonce=NONCE)
    assert first.session_id == again.session_id
    assert first.session_id.startswith("snap-")
    assert [point.point_id for point in await client.points()] == []


async def test_the_same_begin_finds_its_parent_again_even_if_a_newer_point_would_fit(client: Client) -> None:
    snapshot = await client.save()
    begun = await client.begin(nonce=NONCE, incremental=True, snapshot_id=snapshot.point_id)
    again = await client.begin(nonce=NONCE, incremental=True, snapshot_id=snapshot.point_id)
    assert begun.session_id == again.session_id
    assert begun.parent == again.parent == snapshot


async def test_a_second_session_is_told_how_long_the_first_has(client: Client, clock: ManualClock) -> None:
    first = await client.begin()
    clock.advance(10)
    error = await refused(ErrorCode.BUSY, client.begin())
    assert error.retryable
    assert error.facts == {"seconds_left": "20", "session_id": first.session_id}
    await client.register_vm("vm-2")
    assert (await client.begin("vm-2")).session_id != first.session_id


async def test_a_session_that_is_kept_alive_lives_and_one_that_is_not_lapses(
    client: Client, clock: ManualClock
) -> None:
    begun = await client.begin()
    for _ in range(3):
        clock.advance(20)
        kept = await client.state("KeepAlive", state_pb2.KeepAliveRequest(session_id=begun.session_id))
        assert kept.session_ttl_ms == 30_000
    clock.advance(31)
    await refused(
        ErrorCode.SESSION_LAPSED, client.state("KeepAlive", state_pb2.KeepAliveRequest(session_id=begun.session_id))
    )
    await refused(ErrorCode.SESSION_LAPSED, client.commit(zero_commit(begun)))
    assert await client.points() == []
    assert (await client.save()).number == 1


async def test_takeover_fences_the_first_session(client: Client) -> None:
    first = await client.begin()
    second = await client.begin(takeover=True)
    keep_alive = state_pb2.KeepAliveRequest(session_id=first.session_id)
    await refused(ErrorCode.SESSION_LAPSED, client.state("KeepAlive", keep_alive))
    await refused(ErrorCode.SESSION_LAPSED, client.commit(zero_commit(first)))
    made = await client.commit(zero_commit(second))
    assert await client.points() == [made]


async def test_abort_frees_the_vm_and_may_be_repeated(client: Client) -> None:
    begun = await client.begin()
    for _ in range(2):
        await client.state("AbortSession", state_pb2.AbortSessionRequest(session_id=begun.session_id))
    await refused(ErrorCode.SESSION_LAPSED, client.commit(zero_commit(begun)))
    assert (await client.save()).number == 1


async def test_an_abort_after_the_commit_changes_nothing(client: Client) -> None:
    begun = await client.begin()
    made = await client.commit(zero_commit(begun))
    await client.state("AbortSession", state_pb2.AbortSessionRequest(session_id=begun.session_id))
    assert await client.points() == [made]


async def test_a_late_abort_of_a_fenced_session_leaves_the_new_holder_alone(client: Client) -> None:
    first = await client.begin()
    second = await client.begin(takeover=True)
    await client.state("AbortSession", state_pb2.AbortSessionRequest(session_id=first.session_id))
    assert (await client.commit(zero_commit(second))).number == 1


async def test_a_fresh_capability_comes_when_the_first_is_past_half_its_life(
    client: Client, clock: ManualClock
) -> None:
    begun = await client.begin()
    keep_alive = state_pb2.KeepAliveRequest(session_id=begun.session_id)
    assert (await client.state("KeepAlive", keep_alive)).capability == ""
    for _ in range(95):
        clock.advance(20)
        kept = await client.state("KeepAlive", keep_alive)
    assert kept.capability
    assert kept.capability_expires_unix_ms == clock.now_unix_ms() + int(CAPABILITY_TTL_S * 1000)


async def test_the_grant_names_layout_nodes_keys_and_capability(client: Client) -> None:
    grant = (await client.begin()).grant
    assert [layout.epoch for layout in grant.layouts] == [1]
    assert [node.node_id for node in grant.nodes] == ["node-1", "node-2", "node-3"]
    assert all(node.up for node in grant.nodes)
    assert grant.capability
    assert grant.layout_revision > 0
    assert len(grant.keys.data_root) == 32


async def test_what_begin_refuses(client: Client) -> None:
    snapshot = await client.save()
    await client.register_vm("vm-2")
    other = await client.save("vm-2")
    base = snapshot.point_id
    await refused(ErrorCode.NOT_FOUND, client.begin("nobody"))
    await refused(ErrorCode.INVALID_ARGUMENT, client.begin("../vm-1"))
    await refused(ErrorCode.INVALID_ARGUMENT, client.begin(nonce=b"short"))
    await refused(ErrorCode.INVALID_ARGUMENT, client.begin(incremental=True))
    await refused(ErrorCode.INVALID_ARGUMENT, client.begin(snapshot_id=base))
    await refused(ErrorCode.INVALID_ARGUMENT, client.begin(incremental=True, snapshot_id="a/b"))
    await refused(ErrorCode.NOT_FOUND, client.begin(incremental=True, snapshot_id="snap-none"))
    await refused(ErrorCode.NOT_FOUND, client.begin(incremental=True, snapshot_id=base, parent_id="bkp-none"))
    await refused(ErrorCode.NOT_FOUND, client.begin(base_id="snap-none"))
    await refused(ErrorCode.MISMATCH, client.begin(incremental=True, snapshot_id=other.point_id))
    await refused(ErrorCode.MISMATCH, client.begin(incremental=True, snapshot_id=base, parent_id=other.point_id))
    assert [point.point_id for point in await client.points()] == [base]
    assert (await client.save(incremental=True, snapshot_id=base)).parent_id == base


async def test_a_nonce_makes_one_thing_only(client: Client) -> None:
    begun = await client.begin(nonce=NONCE)
    await client.register_vm("vm-2")
    await refused(ErrorCode.ALREADY_EXISTS, client.begin("vm-2", nonce=NONCE))
    await client.commit(zero_commit(begun))
    await refused(ErrorCode.ALREADY_EXISTS, client.begin(nonce=NONCE))


async def test_the_base_may_be_a_point_of_another_vm_and_must_live(client: Client) -> None:
    template = await client.save()
    await client.register_vm("vm-2")
    begun = await client.begin("vm-2", base_id=template.point_id)
    assert begun.base == template
    assert not begun.HasField("parent")
    await client.commit(zero_commit(begun))
    await client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=template.point_id))
    await refused(ErrorCode.NOT_FOUND, client.begin("vm-2", base_id=template.point_id))


async def test_an_objects_session_needs_no_vm_and_holds_none(client: Client) -> None:
    request = state_pb2.BeginObjectRequest(task_id="task-1", nonce=NONCE)
    begun = await client.state("BeginObject", request)
    again = await client.state("BeginObject", request)
    assert begun.session_id == again.session_id
    assert begun.session_id.startswith("app-")
    await refused(
        ErrorCode.ALREADY_EXISTS,
        client.state("BeginObject", state_pb2.BeginObjectRequest(task_id="task-2", nonce=NONCE)),
    )
    made = (await client.state("CommitObject", empty_object_commit(begun, "task-1"))).object
    repeated = (await client.state("CommitObject", empty_object_commit(begun, "task-1"))).object
    assert made == repeated
    await refused(ErrorCode.ALREADY_EXISTS, client.state("BeginObject", request))


async def test_sessions_wait_for_the_first_layout(store: SqliteStore, clock: ManualClock) -> None:
    async with coordinator(store, clock=clock) as client:
        await client.register_vm()
        await client.beat(1)
        error = await refused(ErrorCode.NOT_READY, client.begin())
        assert "1 of 3 storage nodes" in error.message
        object_request = state_pb2.BeginObjectRequest(task_id="task-1", nonce=NONCE)
        await refused(ErrorCode.NOT_READY, client.state("BeginObject", object_request))
        await client.form_layout()
        assert (await client.save()).number == 1


async def test_fewer_nodes_than_replicas_take_no_writes_whatever_was_expected(
    store: SqliteStore, clock: ManualClock
) -> None:
    async with coordinator(store, clock=clock, nodes=1, replicas=3) as client:
        await client.register_vm()
        await client.form_layout(2)
        error = await refused(ErrorCode.NOT_READY, client.begin())
        assert "2 of 3 storage nodes" in error.message
