"""The steward over a metadata store: nodes that fail and come back, layouts that settle, and stewards that change."""

from __future__ import annotations

import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.healing.nodes import NodeChange
from holdfast_coordinator.healing.steward import LAYOUTS_RESERVED
from holdfast_coordinator.layouts import LIVING_LAYOUTS_MAX
from holdfast_coordinator.records import load
from holdfast_core.model.limits import STEWARD_TTL_S
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Delete, Put
from holdfast_proto.v1.common_pb2 import NodeHealing, NodeState
from holdfast_proto.v1.records_pb2 import GrantRecord
from tests.coordinator.healing_rig import BACK_AFTER_S, OUT_AFTER_S, Fleet, Seat, entry, granted, seat
from tests.coordinator.ledgers import read_log

FIVE = (1, 2, 3, 4, 5)


@pytest.fixture
async def fleet(store: SqliteStore, clock: ManualClock) -> Fleet:
    """Five nodes whose first layout has formed, and their steward."""
    fleet = Fleet(await seat(store, clock), clock)
    await fleet.run(4, FIVE)
    return fleet


async def test_a_node_that_stays_down_is_left_out_and_taken_back_when_it_is_up_again(fleet: Fleet) -> None:
    await fleet.run(OUT_AFTER_S + 5, (1, 2, 3, 4))
    assert fleet.members() == [1, 2, 3, 4, 5]  # down for less than that: its lease outlived it by ten seconds
    state = await fleet.run(20, (1, 2, 3, 4))
    assert fleet.members() == [1, 2, 3, 4]
    assert state.states["node-5"] == NodeState(out=True)
    await fleet.run(BACK_AFTER_S - 2, FIVE)
    assert fleet.members() == [1, 2, 3, 4]
    state = await fleet.run(10, FIVE)
    assert fleet.members() == [1, 2, 3, 4, 5]
    assert state.states["node-5"] == NodeState()
    assert fleet.epochs == [1, 2, 3]
    assert [(c.reason, list(c.left), list(c.joined)) for c in await fleet.history()] == [
        ("first layout", [], ["node-1", "node-2", "node-3", "node-4", "node-5"]),
        ("node-5 is out", ["node-5"], []),
        ("node-5 is back", [], ["node-5"]),
    ]


async def test_a_node_that_will_be_taken_back_is_not_told_to_let_go_of_what_it_has(fleet: Fleet) -> None:
    await fleet.run(OUT_AFTER_S + 30, (1, 2, 3, 4))
    assert (await fleet.beat(1)).granted_epoch == 2
    assert (await fleet.beat(5)).granted_epoch == 0
    # One that is drained besides does not come back.
    await fleet.seat.parts.nodes.change("node-5", NodeChange(draining=True), entry())
    assert (await fleet.beat(5)).granted_epoch == 2


async def test_a_short_absence_changes_nothing(fleet: Fleet) -> None:
    for _ in range(5):
        await fleet.run(OUT_AFTER_S, (1, 2, 3, 4))
        await fleet.run(4, FIVE)
    assert fleet.epochs == [1]


async def test_nodes_that_fall_one_after_another_go_out_in_one_layout(store: SqliteStore, clock: ManualClock) -> None:
    fleet = Fleet(await seat(store, clock, nodes=9), clock)
    nine = set(range(1, 10))
    await fleet.run(4, nine)
    await fleet.run(4, nine - {9})
    await fleet.run(4, nine - {9, 8})
    await fleet.run(OUT_AFTER_S + 40, nine - {9, 8, 7})
    assert fleet.epochs == [1, 2]
    assert fleet.members() == [1, 2, 3, 4, 5, 6]
    assert [change.reason for change in await fleet.history()][1:] == ["node-7, node-8, node-9 are out"]
    await fleet.run(4, nine - {9, 8})
    await fleet.run(4, nine - {9})
    await fleet.run(BACK_AFTER_S + 30, nine)
    assert fleet.epochs == [1, 2, 3]
    assert fleet.members() == list(range(1, 10))


async def test_where_more_than_a_third_is_down_nothing_moves(fleet: Fleet) -> None:
    await fleet.run(OUT_AFTER_S * 5, (1, 2, 3))
    assert fleet.epochs == [1]
    await fleet.run(OUT_AFTER_S * 2, (1, 2, 3, 4))
    assert fleet.members() == [1, 2, 3, 4]


async def test_no_layout_has_fewer_nodes_than_replicas(store: SqliteStore, clock: ManualClock) -> None:
    fleet = Fleet(await seat(store, clock, nodes=4), clock)
    await fleet.run(4, (1, 2, 3, 4))
    await fleet.run(OUT_AFTER_S + 30, (1, 2, 3))
    await fleet.run(OUT_AFTER_S + 30, (1, 2))
    assert fleet.members() == [1, 2, 3]


async def test_a_new_node_is_not_taken_in_and_a_grown_one_not_reweighed_by_itself(fleet: Fleet) -> None:
    await fleet.beat(1, capacity_bytes=1 << 41)
    fleet.syncs = False
    await fleet.run(OUT_AFTER_S + 30, (1, 2, 3, 4, 6))
    newest = fleet.seat.view.state.layout_set.newest
    assert newest is not None
    assert [(node.node_id, node.capacity_bytes) for node in newest.nodes] == [
        (f"node-{number}", 1 << 40) for number in (1, 2, 3, 4)
    ]


async def test_old_layouts_end_once_every_node_of_the_newest_says_that_it_is_synced(fleet: Fleet) -> None:
    fleet.syncs = False
    before = await fleet.run(OUT_AFTER_S + 30, (1, 2, 3, 4))
    assert [layout.epoch for layout in before.layout_set.layouts] == [2, 1]
    for number in (1, 2, 3):
        await fleet.beat(number, NodeHealing(synced_epoch=2))
    await fleet.seat.look()
    assert len(fleet.seat.view.state.layout_set.layouts) == 2
    assert not await granted(fleet.seat.store)
    assert [bool(change.settled_unix_ms) for change in await fleet.history()] == [True, False]
    await fleet.beat(4, NodeHealing(synced_epoch=2))
    await fleet.seat.look()
    after = fleet.seat.view.state.layout_set
    assert [layout.epoch for layout in after.layouts] == [2]
    assert (after.granted_epoch, after.revision > before.layout_set.revision) == (2, True)
    grant = await load(fleet.seat.store, keyspace.LAYOUT_GRANT, GrantRecord)
    assert grant is not None
    assert list(grant.message.retired_epochs) == [1]
    answer = await fleet.beat(1)
    assert (answer.granted_epoch, answer.layout.epoch, len(answer.older_layouts)) == (2, 2, 0)
    assert [change.settled_unix_ms for change in await fleet.history()][1] == fleet.clock.now_unix_ms()
    kept = (await fleet.seat.store.snapshot([keyspace.LAYOUT_EPOCHS_PREFIX])).items
    assert [item.key for item in kept] == [keyspace.layout_epoch(2)]


async def test_what_a_steward_does_is_in_the_log_as_the_coordinators_own(fleet: Fleet) -> None:
    await fleet.run(OUT_AFTER_S + 30, (1, 2, 3, 4))
    records = (await read_log(fleet.seat.store)).records
    own = [(r.action, r.resource, dict(r.details)) for r in records if r.principal == "coordinator"]
    assert own == [
        ("layout.form", "cluster", {"epoch": "1"}),
        ("layout.change", "cluster", {"epoch": "2", "reason": "node-5 is out"}),
        ("layout.retire", "cluster", {"epoch": "2", "retired": "1"}),
    ]


async def test_a_node_that_is_down_keeps_what_it_said_of_being_synced(fleet: Fleet) -> None:
    fleet.syncs = False
    await fleet.run(OUT_AFTER_S + 30, (1, 2, 3, 4))
    for number in (1, 2, 3, 4):
        await fleet.beat(number, NodeHealing(synced_epoch=2))
    fleet.clock.advance(11)
    await fleet.seat.look()
    await fleet.seat.look()
    assert fleet.seat.view.state.up == frozenset()
    assert len(fleet.seat.view.state.layout_set.layouts) == 1


async def test_the_layout_follows_a_state_that_it_does_not_show(fleet: Fleet) -> None:
    """As a version that writes the state alone, or a race with the first layout, may leave it."""
    await fleet.seat.store.txn([], [Put(keyspace.node_state("node-2"), NodeState(draining=True).SerializeToString())])
    await fleet.run(2, FIVE)
    assert fleet.members() == [1, 3, 4, 5]
    weight = NodeState(weight_bytes=1 << 39).SerializeToString()
    await fleet.seat.store.txn([], [Put(keyspace.node_state("node-3"), weight)])
    await fleet.run(4, FIVE)
    newest = fleet.seat.view.state.layout_set.newest
    assert newest is not None
    assert {node.node_id: node.capacity_bytes for node in newest.nodes}["node-3"] == 1 << 39
    assert fleet.epochs == [1, 2, 3]


async def test_a_drained_node_that_goes_out_and_comes_back_stays_drained(fleet: Fleet) -> None:
    await fleet.run(OUT_AFTER_S + 30, (1, 2, 3, 4))
    await fleet.seat.parts.nodes.change("node-5", NodeChange(draining=True), entry())
    state = await fleet.run(BACK_AFTER_S + 20, FIVE)
    assert fleet.members() == [1, 2, 3, 4]
    assert state.states["node-5"] == NodeState(draining=True)
    assert fleet.epochs == [1, 2]


async def test_changes_by_itself_leave_room_for_the_operators(fleet: Fleet) -> None:
    fleet.syncs = False
    for epoch in range(1, LIVING_LAYOUTS_MAX - LAYOUTS_RESERVED):
        change = NodeChange(weight_bytes=(1 << 40) + epoch)
        assert (await fleet.seat.parts.nodes.change("node-1", change, entry(epoch))).applied
    living = len(fleet.seat.view.state.layout_set.layouts)
    assert living == LIVING_LAYOUTS_MAX - LAYOUTS_RESERVED
    await fleet.run(OUT_AFTER_S + 30, (1, 2, 3, 4))
    assert len(fleet.seat.view.state.layout_set.layouts) == living
    fleet.syncs = True
    await fleet.run(10, (1, 2, 3, 4, 5))
    await fleet.run(OUT_AFTER_S + 30, (1, 2, 3, 4))
    assert fleet.members() == [1, 2, 3, 4]


async def test_of_two_coordinators_one_is_steward_and_the_other_follows(
    fleet: Fleet, store: SqliteStore, clock: ManualClock
) -> None:
    other = await seat(store, clock, seed=2)
    assert fleet.seat.parts.lease.term
    await fleet.run(30, FIVE, also=[other])
    assert (fleet.seat.parts.lease.term > 0, other.parts.lease.term) == (True, 0)
    await fleet.seat.parts.lease.close()
    await other.look()
    await fleet.seat.look()
    assert (fleet.seat.parts.lease.term, other.parts.lease.term > 0) == (0, True)


async def test_a_new_steward_counts_from_when_it_began_to_look(
    fleet: Fleet, store: SqliteStore, clock: ManualClock
) -> None:
    await fleet.run(OUT_AFTER_S, (1, 2, 3, 4))
    successor = await seat(store, clock, seed=2)
    clock.advance(STEWARD_TTL_S)  # the first one has died
    heir = Fleet(successor, clock, known=fleet.known)
    await heir.run(OUT_AFTER_S - 2, (1, 2, 3, 4))
    assert heir.members() == [1, 2, 3, 4, 5]
    await heir.run(20, (1, 2, 3, 4))
    assert heir.members() == [1, 2, 3, 4]


async def _lose(fleet: Fleet, other: Seat) -> None:
    """Let another coordinator become steward without the first one noticing."""
    item = await fleet.seat.store.get(keyspace.STEWARD)
    assert item is not None
    await fleet.seat.store.txn([], [Delete(keyspace.STEWARD)])
    await other.parts.lease.step()
    assert other.parts.lease.term > fleet.seat.parts.lease.term > 0


async def test_a_steward_that_was_replaced_and_does_not_know_changes_nothing(
    fleet: Fleet, store: SqliteStore, clock: ManualClock
) -> None:
    other = await seat(store, clock, seed=2)
    await fleet.run(OUT_AFTER_S + 8, (1, 2, 3, 4))
    await _lose(fleet, other)
    for _ in range(20):
        for number in (1, 2, 3, 4):
            await fleet.beat(number)
        await fleet.seat.parts.steward.step()
        clock.advance(0.2)
    assert (await fleet.seat.view.fresh()).layout_set.newest.epoch == 1  # type: ignore[union-attr]
    fleet.syncs = False
    await fleet.seat.parts.nodes.change("node-5", NodeChange(draining=True), entry())
    for number in (1, 2, 3, 4):
        await fleet.beat(number, NodeHealing(synced_epoch=2))
    await fleet.seat.parts.steward.step()
    assert len((await fleet.seat.view.fresh()).layout_set.layouts) == 2
    await other.look()
    assert len((await fleet.seat.view.fresh()).layout_set.layouts) == 1


async def test_a_steward_that_slept_does_not_count_the_time(fleet: Fleet, clock: ManualClock) -> None:
    await fleet.run(30, (1, 2, 3, 4))
    clock.advance(OUT_AFTER_S * 3)
    await fleet.run(OUT_AFTER_S - 2, (1, 2, 3, 4))
    assert fleet.epochs == [1]
