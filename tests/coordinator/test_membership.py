"""Nodes and layouts over gRPC: who is up, who may join, and how the layout changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from holdfast_coordinator.layouts import LIVING_LAYOUTS_MAX
from holdfast_core.model.errors import ErrorCode
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_proto.v1 import cluster_pb2
from tests.coordinator.rig import PARTITIONS, Client, coordinator, eventually, refused


async def nodes(client: Client) -> dict[str, Any]:
    """Return the nodes by name."""
    listed = (await client.cluster("ListNodes", cluster_pb2.ListNodesRequest())).nodes
    return {node.node_id: node for node in listed}


async def layouts(client: Client) -> list[Any]:
    """Return the living layouts."""
    return list((await client.cluster("GetLayout", cluster_pb2.GetLayoutRequest())).layouts)


async def status(client: Client) -> Any:
    """Return the cluster's status."""
    return await client.cluster("GetClusterStatus", cluster_pb2.GetClusterStatusRequest())


def _epochs(message: Any) -> list[int]:
    return [layout.epoch for layout in message.layouts]


async def test_a_node_is_up_within_its_lease_and_down_after(client: Client, clock: ManualClock) -> None:
    answer = await client.beat(1, used_bytes=7)
    clock.advance(9)
    assert (await nodes(client))["node-1"].up
    again = await client.beat(1, lease_id=answer.lease_id, used_bytes=8)
    assert again.lease_id == answer.lease_id
    seen = clock.now_unix_ms()
    clock.advance(9)
    assert (await nodes(client))["node-1"].up
    clock.advance(2)
    down = (await nodes(client))["node-1"]
    assert not down.up
    assert (down.used_bytes, down.last_seen_unix_ms) == (8, seen)
    revived = await client.beat(1, lease_id=answer.lease_id)
    assert revived.lease_id != answer.lease_id
    assert (await nodes(client))["node-1"].up


async def test_a_lapsed_lease_leaves_the_layout_alone(client: Client, clock: ManualClock) -> None:
    before = await layouts(client)
    clock.advance(60)
    assert not any(node.up for node in (await nodes(client)).values())
    assert await layouts(client) == before


async def test_a_name_belongs_to_one_directory(client: Client) -> None:
    error = await refused(ErrorCode.ALREADY_EXISTS, client.beat(1, incarnation=b"x" * 16))
    assert "node-1" in error.message
    assert (await nodes(client))["node-1"].address == "127.0.0.1:1025"


async def test_what_a_heartbeat_may_not_say(client: Client) -> None:
    await refused(ErrorCode.INVALID_ARGUMENT, client.beat(9, node_id=""))
    await refused(ErrorCode.INVALID_ARGUMENT, client.beat(9, node_id="a/b"))
    await refused(ErrorCode.INVALID_ARGUMENT, client.beat(9, address="nowhere"))
    await refused(ErrorCode.INVALID_ARGUMENT, client.beat(9, address="127.0.0.1:0"))
    await refused(ErrorCode.INVALID_ARGUMENT, client.beat(9, capacity_bytes=0))
    await refused(ErrorCode.INVALID_ARGUMENT, client.beat(9, incarnation=b""))
    assert "node-9" not in await nodes(client)


async def test_the_first_layout_forms_when_the_expected_nodes_have_registered(
    store: SqliteStore, clock: ManualClock
) -> None:
    async with coordinator(store, clock=clock, nodes=4, replicas=3) as client:
        for number in range(1, 4):
            assert not (await client.beat(number)).HasField("layout")
        before = await status(client)
        assert (before.writable, before.layout_epoch) == (False, 0)
        assert before.state.startswith("3 of 4 storage nodes have registered")
        answer = await client.beat(4)
        assert answer.layout.epoch == 1
        assert (answer.layout.partitions, answer.layout.replicas) == (PARTITIONS, 3)
        after = await status(client)
        assert (after.writable, after.layout_epoch, after.state) == (True, 1, "ready")


async def test_writable_asks_for_a_write_quorum_in_every_partition(client: Client, clock: ManualClock) -> None:
    clock.advance(11)
    assert not (await status(client)).writable
    await client.beat(1)
    one_up = await status(client)
    assert not one_up.writable
    assert "node-2, node-3" in one_up.state
    await client.beat(2)
    assert (await status(client)).writable


async def test_a_later_node_joins_by_an_explicit_plan_alone(client: Client) -> None:
    await client.beat(4)
    assert [layout.epoch for layout in await layouts(client)] == [1]
    plan = await client.cluster("PlanLayout", cluster_pb2.PlanLayoutRequest())
    assert (plan.previous_epoch, plan.layout.epoch) == (1, 2)
    assert plan.slots_total == 3 * PARTITIONS
    assert 0 < plan.slots_moved < plan.slots_total
    assert plan.explanation
    assert [layout.epoch for layout in await layouts(client)] == [1]
    applied = await client.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=1))
    assert applied.layout == plan.layout
    assert [layout.epoch for layout in await layouts(client)] == [2, 1]
    grant = (await client.begin()).grant
    assert [layout.epoch for layout in grant.layouts] == [2, 1]


async def test_a_plan_that_starts_from_an_old_epoch_conflicts(client: Client) -> None:
    await client.beat(4)
    await client.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=1))
    await client.beat(5)
    for epoch in (0, 1, 3):
        error = await refused(
            ErrorCode.CONFLICT, client.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=epoch))
        )
        assert error.facts == {"epoch": "2"}
    assert [layout.epoch for layout in await layouts(client)] == [2, 1]


async def test_of_two_applies_at_once_one_conflicts(store: SqliteStore, clock: ManualClock) -> None:
    async with coordinator(store, clock=clock) as one, coordinator(store, clock=clock) as other:
        await one.form_layout()
        await one.beat(4)
        results = await asyncio.gather(
            one.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=1)),
            other.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=1, remove_node_ids=["node-1"])),
            return_exceptions=True,
        )
        assert sum(isinstance(result, BaseException) for result in results) == 1
        assert [layout.epoch for layout in await layouts(one)] == [2, 1]


async def test_an_apply_that_changes_nothing_makes_no_epoch(client: Client) -> None:
    applied = await client.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=1))
    assert applied.layout.epoch == 1
    assert [layout.epoch for layout in await layouts(client)] == [1]


async def test_living_layouts_are_bounded(client: Client) -> None:
    for epoch in range(1, LIVING_LAYOUTS_MAX):
        await client.beat(4, capacity_bytes=(1 << 30) * (1 + epoch % 2) * 100)
        applied = await client.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=epoch))
        assert applied.layout.epoch == epoch + 1
    await client.beat(5)
    one_more = cluster_pb2.ApplyLayoutRequest(previous_epoch=LIVING_LAYOUTS_MAX)
    await refused(ErrorCode.LIMIT_EXCEEDED, client.cluster("ApplyLayout", one_more))
    assert len(await layouts(client)) == LIVING_LAYOUTS_MAX


async def test_plans_need_known_and_enough_nodes(client: Client) -> None:
    plan = cluster_pb2.PlanLayoutRequest(remove_node_ids=["node-7"])
    await refused(ErrorCode.NOT_FOUND, client.cluster("PlanLayout", plan))
    plan = cluster_pb2.PlanLayoutRequest(remove_node_ids=["node-1"])
    await refused(ErrorCode.NOT_READY, client.cluster("PlanLayout", plan))


async def test_a_change_of_capacity_counts_from_the_next_plan_on(client: Client) -> None:
    await client.beat(1, capacity_bytes=1 << 41)
    assert (await nodes(client))["node-1"].capacity_bytes == 1 << 41
    assert {node.capacity_bytes for node in (await layouts(client))[0].nodes} == {1 << 40}
    plan = await client.cluster("PlanLayout", cluster_pb2.PlanLayoutRequest())
    assert [node.capacity_bytes for node in plan.layout.nodes] == [1 << 41, 1 << 40, 1 << 40]


async def test_a_watcher_hears_of_nodes_and_layouts(client: Client, clock: ManualClock) -> None:
    watch = client.watch()

    async def hear(condition: Callable[[Any], bool]) -> Any:
        while not condition(heard := await watch.read()):
            pass
        return heard

    first = await watch.read()
    assert _epochs(first) == [1]
    assert [node.up for node in first.nodes] == [True, True, True]
    await client.beat(4)
    await hear(lambda heard: len(heard.nodes) == 4)
    await client.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=1))
    await hear(lambda heard: _epochs(heard) == [2, 1])
    clock.advance(11)
    last = await hear(lambda heard: not any(node.up for node in heard.nodes))
    assert _epochs(last) == [2, 1]
    watch.cancel()


async def test_a_coordinator_hears_of_the_others_layout_without_being_asked(
    store: SqliteStore, clock: ManualClock
) -> None:
    async with coordinator(store, clock=clock) as one, coordinator(store, clock=clock) as other:
        await other.form_layout()
        await one.register_vm()
        assert (await one.save()).number == 1
        await other.beat(4)
        await other.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=1))

        async def heard() -> bool:
            begun = await one.begin(takeover=True)
            return [layout.epoch for layout in begun.grant.layouts] == [2, 1]

        await eventually(heard, "the other coordinator's layout arrives")


async def test_locate_names_the_owners(client: Client) -> None:
    request = cluster_pb2.LocateRequest(block_ids=bytes(32) + b"\xff" * 32)
    located = (await client.cluster("Locate", request)).locations
    assert len(located) == 2
    assert sorted(located[0].node_ids) == ["node-1", "node-2", "node-3"]
    await refused(ErrorCode.INVALID_ARGUMENT, client.cluster("Locate", cluster_pb2.LocateRequest(block_ids=b"x")))
    too_many = cluster_pb2.LocateRequest(block_ids=bytes(32 * 4097))
    await refused(ErrorCode.LIMIT_EXCEEDED, client.cluster("Locate", too_many))


@pytest.mark.parametrize(("nodes_expected", "replicas"), [(1, 1), (2, 2), (5, 3)])
async def test_clusters_of_other_sizes_form(
    store: SqliteStore, clock: ManualClock, nodes_expected: int, replicas: int
) -> None:
    async with coordinator(store, clock=clock, nodes=nodes_expected, replicas=replicas) as client:
        await client.form_layout(nodes_expected)
        assert [len(layout.nodes) for layout in await layouts(client)] == [nodes_expected]
        assert (await status(client)).writable
