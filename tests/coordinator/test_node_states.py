"""What operators decide of nodes, over gRPC: drain, undrain, weight, removal, and the history of layouts."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.healing.history import HISTORY_MAX
from holdfast_coordinator.healing.nodes import NodeChange
from holdfast_coordinator.layouts import LIVING_LAYOUTS_MAX
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Delete, Put
from holdfast_proto.v1 import cluster_pb2
from holdfast_proto.v1.common_pb2 import NodeHealing, NodeState
from tests.coordinator.faults import Fault, FaultyStore
from tests.coordinator.healing_rig import Fleet, entry, seat
from tests.coordinator.rig import PARTITIONS, Client, coordinator, records, refused


async def set_node(client: Client, number: int, **fields: Any) -> Any:
    """Change a node."""
    return await client.cluster("SetNode", cluster_pb2.SetNodeRequest(node_id=f"node-{number}", **fields))


async def remove(client: Client, number: int, *, lost: bool = False) -> Any:
    """Remove a node."""
    return await client.cluster("RemoveNode", cluster_pb2.RemoveNodeRequest(node_id=f"node-{number}", lost=lost))


async def living(client: Client) -> list[Any]:
    """Return the living layouts."""
    return list((await client.cluster("GetLayout", cluster_pb2.GetLayoutRequest())).layouts)


async def members(client: Client) -> list[str]:
    """Return the names in the newest layout."""
    return [node.node_id for node in (await living(client))[0].nodes]


async def history(client: Client) -> list[Any]:
    """Return the changes, newest first."""
    answer = await client.cluster("GetLayoutHistory", cluster_pb2.GetLayoutHistoryRequest())
    return list(answer.changes)


async def states(client: Client) -> dict[str, NodeState]:
    """Return what is decided of each node."""
    listed = (await client.cluster("ListNodes", cluster_pb2.ListNodesRequest())).nodes
    return {node.node_id: node.state for node in listed}


@pytest.fixture
async def four(client: Client) -> Client:
    """A client of a cluster with three copies on four nodes."""
    await client.beat(4)
    await client.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=1))
    return client


async def test_draining_makes_a_layout_without_the_node_and_undraining_takes_it_back(four: Client) -> None:
    planned = await set_node(four, 2, draining=True, dry_run=True)
    assert (planned.applied, planned.plan.previous_epoch) == (False, 2)
    assert [node.node_id for node in planned.plan.layout.nodes] == ["node-1", "node-3", "node-4"]
    assert (await living(four))[0].epoch == 2
    assert await states(four) == {f"node-{number}": NodeState() for number in (1, 2, 3, 4)}
    done = await set_node(four, 2, draining=True)
    assert (done.applied, done.plan.layout) == (True, planned.plan.layout)
    assert (await living(four))[0] == planned.plan.layout
    assert (await states(four))["node-2"] == NodeState(draining=True)
    again = await set_node(four, 2, draining=True)
    assert (again.applied, again.plan.slots_moved, again.plan.layout.epoch) == (False, 0, 3)
    back = await set_node(four, 2, draining=False)
    assert back.applied
    assert await members(four) == ["node-1", "node-2", "node-3", "node-4"]
    assert (await states(four))["node-2"] == NodeState()
    assert [(change.reason, list(change.joined), list(change.left)) for change in await history(four)] == [
        ("node-2 undrained", ["node-2"], []),
        ("node-2 drained", [], ["node-2"]),
        ("operator", ["node-4"], []),
        ("first layout", ["node-1", "node-2", "node-3"], []),
    ]


async def test_a_weight_replaces_the_capacity_until_it_is_taken_back(four: Client) -> None:
    done = await set_node(four, 4, weight_bytes=1 << 38)
    assert done.applied
    assert 0 < done.plan.slots_moved < done.plan.slots_total == 3 * PARTITIONS
    weights = {node.node_id: node.capacity_bytes for node in (await living(four))[0].nodes}
    assert weights == {"node-1": 1 << 40, "node-2": 1 << 40, "node-3": 1 << 40, "node-4": 1 << 38}
    await four.beat(4, capacity_bytes=1 << 41)
    plan = await four.cluster("PlanLayout", cluster_pb2.PlanLayoutRequest())
    assert plan.layout.nodes[3].capacity_bytes == 1 << 38
    assert (await set_node(four, 4, weight_bytes=0)).applied
    assert (await living(four))[0].nodes[3].capacity_bytes == 1 << 41
    assert (await states(four))["node-4"] == NodeState()


async def test_a_change_of_one_node_takes_no_other_in(four: Client) -> None:
    await four.beat(5)
    await four.beat(1, capacity_bytes=1 << 41)
    await set_node(four, 2, draining=True)
    newest = (await living(four))[0]
    assert [(node.node_id, node.capacity_bytes) for node in newest.nodes] == [
        ("node-1", 1 << 40),
        ("node-3", 1 << 40),
        ("node-4", 1 << 40),
    ]


async def test_an_operators_plan_leaves_out_who_drains_and_says_so(four: Client) -> None:
    await set_node(four, 2, draining=True)
    await four.beat(5)
    plan = await four.cluster("PlanLayout", cluster_pb2.PlanLayoutRequest())
    assert [node.node_id for node in plan.layout.nodes] == ["node-1", "node-3", "node-4", "node-5"]
    assert plan.explanation[-1] == "node-2 is draining and owns nothing"


async def test_a_node_that_is_needed_is_not_drained(client: Client) -> None:
    error = await refused(ErrorCode.NOT_READY, set_node(client, 2, draining=True))
    assert "3 replicas" in error.message
    await refused(ErrorCode.NOT_READY, set_node(client, 2, draining=True, dry_run=True))
    assert (await states(client))["node-2"] == NodeState()


async def test_a_drain_before_the_first_layout_keeps_the_node_out_of_it(store: SqliteStore, clock: ManualClock) -> None:
    async with coordinator(store, clock=clock) as client:
        await client.beat(1)
        done = await set_node(client, 1, draining=True)
        assert (done.applied, done.HasField("plan")) == (False, False)
        await client.beat(2)
        await client.beat(3)
        assert await living(client) == []
        await client.beat(4)
        assert await members(client) == ["node-2", "node-3", "node-4"]


async def test_changes_of_unknown_nodes_are_refused(client: Client) -> None:
    await refused(ErrorCode.NOT_FOUND, set_node(client, 9, draining=True))
    await refused(ErrorCode.NOT_FOUND, remove(client, 9))
    await refused(ErrorCode.INVALID_ARGUMENT, set_node(client, 1))
    malformed = cluster_pb2.SetNodeRequest(node_id="a/b", draining=True)
    await refused(ErrorCode.INVALID_ARGUMENT, client.cluster("SetNode", malformed))


async def test_too_many_living_layouts_refuse_a_drain_and_leave_the_state(four: Client) -> None:
    for epoch in range(2, LIVING_LAYOUTS_MAX):
        await set_node(four, 1, weight_bytes=(1 << 40) + epoch)
    await refused(ErrorCode.LIMIT_EXCEEDED, set_node(four, 2, draining=True))
    assert (await states(four))["node-2"] == NodeState()


async def test_of_many_changes_at_once_all_happen_one_after_another(store: SqliteStore, clock: ManualClock) -> None:
    async with coordinator(store, clock=clock, nodes=6) as one, coordinator(store, clock=clock, seed=2) as other:
        await one.form_layout(6)
        answers = await asyncio.gather(
            set_node(one, 1, draining=True),
            set_node(other, 2, draining=True),
            set_node(one, 3, weight_bytes=1 << 39),
            set_node(other, 1, weight_bytes=1 << 39),
        )
        assert sum(answer.applied for answer in answers) >= 3
        assert await members(one) == ["node-3", "node-4", "node-5", "node-6"]
        assert (await states(one))["node-1"] == NodeState(draining=True, weight_bytes=1 << 39)
        assert [change.epoch for change in await history(one)] == list(range((await living(one))[0].epoch, 0, -1))


@pytest.mark.parametrize("fault", list(Fault))
async def test_a_drain_that_is_interrupted_anywhere_is_done_whole_or_not_at_all(
    store: SqliteStore, clock: ManualClock, fault: Fault
) -> None:
    faults = FaultyStore(store)
    async with coordinator(faults, clock=clock, nodes=5) as failing, coordinator(store, clock=clock, seed=2) as healthy:
        await healthy.form_layout(5)
        await failing.form_layout(5)
        drain = True
        for at in range(40):
            faults.arm(fault, at=at)
            with suppress(HoldfastError):
                await set_node(failing, 1, draining=drain)
            struck = faults.struck
            faults.arm(None)
            assert ("node-1" not in await members(healthy)) == (await states(healthy))["node-1"].draining
            await set_node(healthy, 1, draining=drain)
            assert ("node-1" in await members(healthy)) == (not drain)
            changes = await history(healthy)
            assert len(changes) == at + 2
            drain = not drain
            if len(await living(healthy)) > 20:
                await _retire(store, healthy)
            if not struck:
                break
        assert 4 < at < 39


async def _retire(store: SqliteStore, client: Client) -> None:
    """End all layouts but the newest, as a steward would."""
    head = await store.get(keyspace.LAYOUT_HEAD)
    assert head is not None
    ends = [Delete(keyspace.layout_epoch(each.epoch)) for each in (await living(client))[1:]]
    await store.txn([], [Put(keyspace.LAYOUT_HEAD, head.value), *ends])


async def test_what_was_decided_is_in_the_log(four: Client, store: SqliteStore) -> None:
    known = len(await records(store))
    await set_node(four, 2, draining=True, dry_run=True)
    await set_node(four, 2, draining=True)
    await set_node(four, 2, draining=True)
    told = [(r.resource, r.outcome, dict(r.details)) for r in (await records(store))[known:]]
    assert told == [
        ("node/node-2", "OK", {"dry_run": "yes"}),
        ("node/node-2", "OK", {"draining": "yes", "weight_bytes": "0", "epoch": "3"}),
        ("node/node-2", "REPEATED", {}),
    ]


@pytest.fixture
async def fleet(store: SqliteStore, clock: ManualClock) -> Fleet:
    """Four nodes, of which the fourth is drained."""
    fleet = Fleet(await seat(store, clock, nodes=4), clock, syncs=False)
    await fleet.run(4, (1, 2, 3, 4))
    await fleet.seat.parts.nodes.change("node-4", NodeChange(draining=True), entry())
    await fleet.run(4, (1, 2, 3, 4))
    return fleet


async def _refused(fleet: Fleet, *, lost: bool = False) -> str:
    with pytest.raises(HoldfastError) as caught:
        await fleet.seat.parts.nodes.remove("node-4", entry(), lost=lost)
    assert caught.value.code is ErrorCode.NOT_READY
    return caught.value.message


async def test_a_node_in_good_order_is_removed_when_it_holds_nothing_and_is_stopped(fleet: Fleet) -> None:
    with pytest.raises(HoldfastError, match="part of the newest layout, 2; drain it first"):
        await fleet.seat.parts.nodes.remove("node-1", entry())
    assert "which is still a source of newer ones" in await _refused(fleet)
    fleet.syncs = True
    await fleet.run(4, (1, 2, 3, 4))
    await fleet.beat(4, block_count=7, healing=NodeHealing(foreign_blocks=7))
    assert "holds 7 blocks that it has not handed over" in await _refused(fleet)
    await fleet.beat(4, NodeHealing(foreign_blocks=0))
    assert "is up and would register again; stop it first" in await _refused(fleet)
    await fleet.run(12, (1, 2, 3))
    await fleet.seat.parts.nodes.remove("node-4", entry())
    state = await fleet.seat.view.fresh()
    assert list(state.records) == ["node-1", "node-2", "node-3"]
    left = (await fleet.seat.store.snapshot([keyspace.NODE_PREFIX])).items
    assert not [item.key for item in left if item.key.endswith("node-4")]
    with pytest.raises(HoldfastError, match="there is no node node-4"):
        await fleet.seat.parts.nodes.remove("node-4", entry(2))


async def test_a_figure_from_before_the_layout_settled_counts_for_nothing(fleet: Fleet) -> None:
    """While it is a source a node calls nothing foreign; it must have spoken again, or hold no block at all."""
    await fleet.beat(4, block_count=9)
    fleet.syncs = True
    await fleet.run(14, (1, 2, 3))
    assert len(fleet.seat.view.state.layout_set.layouts) == 1
    assert "holds 9 blocks" in await _refused(fleet)


async def test_a_lost_node_goes_with_what_it_holds_but_not_while_it_is_up_or_needed(fleet: Fleet) -> None:
    await fleet.beat(4, block_count=9)
    assert "is up" in await _refused(fleet, lost=True)
    await fleet.run(12, (1, 2, 3))
    with pytest.raises(HoldfastError, match="part of the newest layout"):
        await fleet.seat.parts.nodes.remove("node-1", entry(), lost=True)
    await fleet.seat.parts.nodes.remove("node-4", entry(), lost=True)
    answer = await fleet.beat(1)
    assert [node.node_id for node in answer.nodes] == ["node-2", "node-3"]
    assert [layout.epoch for layout in answer.older_layouts] == [1]


@pytest.mark.slow
async def test_history_is_bounded(store: SqliteStore, clock: ManualClock) -> None:
    fleet = Fleet(await seat(store, clock, nodes=4), clock)
    await fleet.run(4, (1, 2, 3, 4))
    for number in range(HISTORY_MAX + 4):
        await fleet.seat.parts.nodes.change("node-1", NodeChange(weight_bytes=number + 1), entry(number))
        for node in (1, 2, 3, 4):
            await fleet.beat(node)
            await fleet.beat(node)
        await fleet.seat.look()
    changes = await fleet.history()
    assert [change.epoch for change in changes] == list(range(6, HISTORY_MAX + 6))
    assert all(change.settled_unix_ms for change in changes)
