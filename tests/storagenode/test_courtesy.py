"""Repair is as fast as it can be while no client is there, lets clients go first, and asks no peer twice."""

from __future__ import annotations

import asyncio

import pytest

from holdfast_storagenode.healing.courtesy import CLIENTS_REMEMBERED_S, Courtesy
from holdfast_storagenode.healing.looking import Deferred
from holdfast_storagenode.healing.plan import with_blocks
from holdfast_storagenode.memory import MemoryStore
from holdfast_storagenode.store import BlockEntry, Holding
from tests.storagenode.blocks import make_blocks
from tests.storagenode.fleet import PARTITIONS, Fleet, everywhere

BLOCKS = make_blocks(60)


async def _lacking_fleet() -> Fleet:
    fleet = Fleet("a", "b", "c")
    fleet.tell(everywhere(1, ["a", "b", "c"]))
    await fleet.beat()
    await fleet.put(["a", "b"], BLOCKS)
    return fleet


async def test_each_partition_is_listed_by_one_peer_once() -> None:
    fleet = await _lacking_fleet()
    await fleet.settle("c")
    assert fleet["c"].ids() == {block.id for block in BLOCKS}
    # Its partitions are turned, so each of the two sources lists half of them, all in one call.
    assert sorted(call for call in fleet.calls if call[2] == "list") == [("c", "a", "list"), ("c", "b", "list")]


async def test_without_clients_nothing_is_waited_and_with_them_a_multiple() -> None:
    fleet = Fleet("a")
    core = fleet["a"].core
    courtesy = Courtesy(core, fleet.clock, gentleness=3.0)
    assert (courtesy.busy(), courtesy.pause_s(2.0)) == (False, 0.0)
    core.client_calls += 1
    assert (courtesy.busy(), courtesy.pause_s(2.0)) == (True, 6.0)
    fleet.clock.advance(CLIENTS_REMEMBERED_S + 0.1)
    assert courtesy.pause_s(2.0) == 0.0


@pytest.mark.parametrize(("clients", "urgent", "at_once"), [(True, False, 1), (True, True, 3), (False, False, 3)])
async def test_beside_clients_one_piece_is_done_at_a_time(clients: bool, urgent: bool, at_once: int) -> None:
    fleet = Fleet("a")
    courtesy = Courtesy(fleet["a"].core, fleet.clock, gentleness=1.0)
    fleet["a"].core.client_calls += clients
    doing, most = 0, 0

    async def work() -> None:
        nonlocal doing, most
        async with courtesy.piece(urgent=urgent):
            doing += 1
            most = max(most, doing)
            await asyncio.sleep(0)
            doing -= 1

    await asyncio.gather(work(), work(), work())
    assert most == at_once


def test_blocks_that_were_left_count_as_a_store_would_count_them() -> None:
    store = MemoryStore(partition_of=lambda _: 0)
    store.put(1, BLOCKS[:20])
    before = store.holdings(0)
    store.put(1, BLOCKS[20:])
    assert with_blocks(before, {1: [block.id for block in BLOCKS[20:]]}) == tuple(store.holdings(0))
    assert with_blocks((), {1: [BLOCKS[0].id]})[0] == Holding(1, 1, BLOCKS[0].id)


def test_what_finds_no_room_is_not_remembered() -> None:
    deferred = Deferred(remembered_max=3)
    entries = [BlockEntry(block.id, 10, 0, 0) for block in BLOCKS[:2]]
    deferred.add(0, "a", 1, entries)
    deferred.add(1, "a", 1, entries)
    assert deferred.take(range(PARTITIONS)) == {("a", 1): entries}
    assert deferred.take(range(PARTITIONS)) == {}
    deferred.add(1, "b", 1, entries)
    assert deferred.take([1]) == {("b", 1): entries}, "there is room again"
