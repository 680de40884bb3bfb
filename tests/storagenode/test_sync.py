"""Sync over a change of layouts, and rounds of comparisons within one: real nodes, no network."""

from __future__ import annotations

import pytest

from holdfast_core.model.block import Kind
from holdfast_core.model.limits import ANTI_ENTROPY_INTERVAL_S
from holdfast_storagenode.healing.peers import Fetched
from holdfast_storagenode.healing.workers import HealingOptions
from holdfast_storagenode.store import Verdict
from tests.storagenode.blocks import make_block, make_blocks
from tests.storagenode.fleet import Fleet, capability, everywhere, table

BLOCKS = make_blocks(60)
IDS = {block.id for block in BLOCKS}


async def fleet_of_three() -> Fleet:
    fleet = Fleet("a", "b", "c", "d")
    fleet.tell(everywhere(1, ["a", "b", "c"]))
    await fleet.beat()
    return fleet


async def test_owners_of_one_layout_come_to_hold_the_same() -> None:
    fleet = await fleet_of_three()
    await fleet.put(["a", "b"], BLOCKS[:40], stamp=3)
    await fleet.put(["c"], BLOCKS[30:])
    await fleet.settle()
    assert [fleet[name].ids() for name in "abcd"] == [IDS, IDS, IDS, set()]
    assert fleet["c"].core.healing.repaired_blocks == 30
    assert fleet["c"].core.healing.repaired_bytes == sum(len(block.data) for block in BLOCKS[:30])
    told = fleet["c"].core.healing.message(collection_epoch=0)
    assert (told.synced_epoch, told.partitions, told.partitions_synced, told.partitions_at_risk) == (1, 8, 8, 0)


async def test_what_is_pulled_keeps_the_stamp_of_its_source() -> None:
    fleet = await fleet_of_three()
    fleet.epoch = 9
    await fleet.put(["a"], BLOCKS[:1], stamp=4)
    await fleet.put(["a"], BLOCKS[1:2], stamp=7)
    await fleet.beat()
    await fleet.settle()
    assert fleet["b"].stamps() == {BLOCKS[0].id: 4, BLOCKS[1].id: 7}


async def test_a_new_owner_holds_all_and_says_so_only_then() -> None:
    fleet = await fleet_of_three()
    await fleet.put(["a", "b"], BLOCKS)
    fleet.tell(everywhere(2, ["b", "c", "d"]), everywhere(1, ["a", "b", "c"]))
    await fleet.beat("d")
    await fleet.settle("d")
    healing = fleet["d"].core.healing
    assert healing.synced_epoch == 0, "no old owner fences the new layout yet"
    assert healing.partitions_at_risk == 0
    await fleet.beat("a", "b")
    fleet.clock.advance(3)
    await fleet.settle("d")
    assert fleet["d"].ids() == IDS
    assert (healing.synced_epoch, healing.partitions_synced) == (2, 8)


async def test_a_write_under_way_keeps_the_fence_open_and_the_sync_waiting() -> None:
    fleet = await fleet_of_three()
    await fleet.put(["a", "c"], BLOCKS)
    held = fleet["a"].core._fence
    held.enter(1, newest=1)
    fleet.tell(everywhere(2, ["b", "c", "d"]), everywhere(1, ["a", "b", "c"]))
    fleet.down.add("b")
    await fleet.beat()
    assert fleet["a"].core.fenced_epoch == 1
    await fleet.settle("d")
    assert fleet["d"].core.healing.synced_epoch == 0, "of the old owners only c fences"
    held.leave(1)
    fleet.clock.advance(3)
    await fleet.settle("d")
    assert fleet["d"].core.healing.synced_epoch == 2
    assert fleet["d"].ids() == IDS


async def test_a_block_that_two_old_owners_acknowledged_survives_the_loss_of_one() -> None:
    """The reason for R - W + 1: with the copies on a and b, c alone knows nothing of them."""
    fleet = await fleet_of_three()
    await fleet.put(["a", "b"], BLOCKS)
    fleet.tell(everywhere(2, ["c", "d", "e"]), everywhere(1, ["a", "b", "c"]))
    fleet.down |= {"a", "b"}
    await fleet.beat()
    await fleet.settle("d")
    healing = fleet["d"].core.healing
    assert (healing.synced_epoch, healing.partitions_at_risk, healing.partitions_synced) == (0, 8, 0)
    assert fleet["c"].core.healing.synced_epoch == 0
    fleet.down.remove("b")
    await fleet.beat()
    fleet.clock.advance(3)
    await fleet.settle("d", "c")
    assert fleet["d"].ids() == fleet["c"].ids() == IDS
    assert (healing.synced_epoch, healing.partitions_at_risk) == (2, 0)


async def test_owners_that_were_removed_for_good_are_not_waited_for() -> None:
    fleet = await fleet_of_three()
    await fleet.put("abc", BLOCKS[:20])
    await fleet.put("bc", BLOCKS[20:])
    fleet.tell(everywhere(2, ["d", "e", "f"]), everywhere(1, ["a", "b", "c"]))
    fleet.down |= {"b", "c"}
    await fleet.beat()
    await fleet.settle("d")
    healing = fleet["d"].core.healing
    assert (healing.synced_epoch, healing.partitions_at_risk) == (0, 8)
    # The one that was looked at and one that is gone are not the one that is left.
    fleet.down.remove("c")
    fleet.down.add("a")
    fleet.removed |= {"a", "b"}
    fleet.cut.add(("d", "c"))
    await fleet.beat()
    fleet.clock.advance(3)
    await fleet.settle("d")
    assert healing.synced_epoch == 0
    fleet.cut.clear()
    fleet.clock.advance(3)
    await fleet.settle("d")
    assert fleet["d"].ids() == IDS
    assert (healing.synced_epoch, healing.partitions_at_risk) == (2, 0)


async def test_the_floor_is_read_after_the_fences_and_raised_before_the_sync_counts() -> None:
    fleet = await fleet_of_three()
    fleet.epoch = 2
    await fleet.beat()
    await fleet.put(["a", "b", "c"], BLOCKS)
    fleet.tell(everywhere(2, ["b", "c", "d"]), everywhere(1, ["a", "b", "c"]))
    await fleet.beat()
    # A session began under this epoch before the owners fenced, and leaned on copies of the old layout alone.
    fleet.epoch = 6
    await fleet.settle("d")
    assert set(fleet["d"].stamps().values()) == {6}
    assert fleet["d"].core.healing.synced_epoch == 2
    later = make_block(999)
    await fleet.put(["d"], [later], layout_epoch=2)
    assert fleet["d"].stamps()[later.id] >= 6


async def test_without_a_coordinator_blocks_come_but_no_sync_counts() -> None:
    fleet = await fleet_of_three()
    await fleet.put(["a", "b"], BLOCKS)
    fleet.tell(everywhere(2, ["b", "c", "d"]), everywhere(1, ["a", "b", "c"]))
    await fleet.beat()
    fleet.coordinator_down = True
    await fleet.settle("d")
    assert fleet["d"].ids() == IDS
    assert fleet["d"].core.healing.synced_epoch == 0
    fleet.coordinator_down = False
    fleet.clock.advance(3)
    await fleet.settle("d")
    assert fleet["d"].core.healing.synced_epoch == 2


async def test_each_older_layout_has_to_be_covered() -> None:
    fleet = Fleet("a", "b", "c", "d", "e", "f", "g")
    fleet.tell(everywhere(1, ["a", "b", "c"]))
    await fleet.beat()
    await fleet.put(["a", "b"], BLOCKS[:30])
    fleet.tell(everywhere(2, ["d", "e", "f"]), everywhere(1, ["a", "b", "c"]))
    await fleet.beat()
    await fleet.put(["d", "e"], BLOCKS[30:], layout_epoch=2)
    fleet.tell(everywhere(3, ["e", "f", "g"]), everywhere(2, ["d", "e", "f"]), everywhere(1, ["a", "b", "c"]))
    fleet.down |= {"b", "c"}
    await fleet.beat()
    await fleet.settle("g")
    assert fleet["g"].ids() == IDS, "what can be reached is pulled all the same"
    assert fleet["g"].core.healing.synced_epoch == 0
    assert fleet["g"].core.healing.partitions_at_risk == 8
    fleet.down.remove("c")
    await fleet.beat()
    fleet.clock.advance(3)
    await fleet.settle("g")
    assert fleet["g"].core.healing.synced_epoch == 3


async def test_a_peer_with_wrong_bytes_gives_nothing_and_covers_nothing() -> None:
    fleet = await fleet_of_three()
    await fleet.put(["a", "b"], BLOCKS)
    fleet.tell(everywhere(2, ["b", "c", "d"]), everywhere(1, ["a", "b", "c"]))
    fleet.down.add("c")
    await fleet.beat()

    def lie(node: str, block_id: bytes, item: Fetched) -> Fetched:
        return bytes(len(item)) if node == "a" and not isinstance(item, Verdict) else item

    fleet.meddle = lie
    fleet.cut.add(("d", "b"))
    await fleet.settle("d")
    healing = fleet["d"].core.healing
    assert fleet["d"].ids() == set()
    assert (healing.wrong_blocks >= 60, healing.synced_epoch) == (True, 0)
    assert healing.message(collection_epoch=0).unrepaired_blocks == 60
    fleet.cut.clear()
    fleet.clock.advance(3)
    await fleet.settle("d")
    assert fleet["d"].ids() == IDS, "b gives what a does not"
    assert healing.message(collection_epoch=0).unrepaired_blocks == 0


async def test_what_a_collection_removed_here_is_not_brought_back() -> None:
    fleet = await fleet_of_three()
    fleet.epoch = 5
    await fleet.put(["a", "b", "c"], BLOCKS[:2], stamp=3)
    await fleet.put(["a"], BLOCKS[1:2], stamp=5)
    await fleet.beat()
    await fleet["b"].core.delete(capability(), [BLOCKS[0].id, BLOCKS[1].id], cutoff=4)
    assert fleet["b"].ids() == set()
    await fleet.settle("b")
    assert fleet["b"].ids() == {BLOCKS[1].id}, "the one that somebody leaned on since"
    assert fleet["b"].stamps() == {BLOCKS[1].id: 5}


async def test_a_stamp_that_no_coordinator_knows_is_not_believed() -> None:
    fleet = await fleet_of_three()
    fleet.epoch = 2
    fleet["a"].store.put(1, BLOCKS, stamp=4_000_000_000)
    await fleet.settle("b")
    assert set(fleet["b"].stamps().values()) == {2}


async def test_few_live_owners_come_first_and_the_index_before_volumes() -> None:
    owners = [("a", "b", "c"), ("a", "b", "d")] * 4
    fleet = Fleet("a", "b", "c", "d")
    layout = table(1, owners, nodes=["a", "b", "c", "d"])
    fleet.tell(layout)
    await fleet.beat()
    blocks = [make_block(number, kind=kind) for number in range(30) for kind in Kind]
    await fleet.put(["b"], blocks)
    fleet.down.add("d")
    await fleet.beat()
    seen: list[bytes] = []
    real = fleet["a"].store.put

    def put(tenant: int, given: object, *, stamp: int = 0) -> list[Verdict]:
        seen.extend(block.id for block in given)  # type: ignore[attr-defined]
        return real(tenant, given, stamp=stamp)  # type: ignore[arg-type]

    fleet["a"].store.put = put  # type: ignore[method-assign, assignment]
    await fleet.settle("a")
    kind_of = {block.id: kind for block, kind in zip(blocks, list(Kind) * 30, strict=True)}
    order = [
        (len(set(layout.owners_of_block(block_id)) - {"d"}), kind_of[block_id] is Kind.VOLUME) for block_id in seen
    ]
    assert set(seen) == set(kind_of)
    assert order == sorted(order)
    assert len(set(order)) == 4


async def test_rounds_come_by_time_after_a_return_and_not_otherwise() -> None:
    fleet = await fleet_of_three()
    await fleet.settle("a")
    fleet.calls.clear()
    await fleet.settle("a")
    assert fleet.calls == []
    fleet.down.add("b")
    await fleet.beat()
    await fleet.settle("a")
    assert fleet.calls == []
    fleet.down.clear()
    await fleet.beat()
    await fleet.settle("a")
    assert ("a", "b", "compare") in fleet.calls
    fleet.calls.clear()
    fleet.clock.advance(ANTI_ENTROPY_INTERVAL_S)
    await fleet.settle("a")
    assert {call[1] for call in fleet.calls} == {"b", "c"}
    fleet.calls.clear()
    fleet.nodes["a"].core.lapses += 1
    await fleet.settle("a")
    assert {call[1] for call in fleet.calls} == {"b", "c"}
    fleet.calls.clear()
    await fleet.settle("a")
    assert fleet.calls == []


@pytest.mark.parametrize(("live", "clients"), [(1, True), (3, True), (3, False)])
async def test_work_is_gentle_while_clients_are_there_and_copies_are_enough(live: int, clients: bool) -> None:
    fleet = Fleet("a", "b", "c", options=HealingOptions(gentleness=2.0))
    fleet.tell(everywhere(1, ["a", "b", "c"]))
    fleet.down |= set() if live == 3 else {"b", "c"}
    await fleet.beat("a")
    store = fleet["a"].store
    real = store.holdings

    def slow(partition: int) -> object:
        fleet.clock.advance(0.5)
        fleet["a"].core.client_calls += clients
        return real(partition)

    store.holdings = slow  # type: ignore[method-assign, assignment]
    pause_s = await fleet["a"].sync.step()
    assert (pause_s > 0) == (live == 3 and clients)


@pytest.mark.slow
async def test_a_grant_may_come_and_go_while_the_layouts_stay() -> None:
    fleet = await fleet_of_three()
    knowledge = fleet["a"].core.cluster
    for granted in (1, 0, 1):
        fleet._answer.granted_epoch = granted
        await fleet.beat("a")
        assert knowledge.living is not None
        assert knowledge.living.granted_epoch == granted
