"""Letting go of blocks that a node owns no longer: only under a grant, and only what all owners have (invariant 9)."""

from __future__ import annotations

import pytest

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_storagenode.healing import drop
from holdfast_storagenode.healing.drop import RETRY_S
from holdfast_storagenode.store import Verdict
from tests.storagenode.blocks import make_blocks
from tests.storagenode.fleet import Fleet, everywhere

BLOCKS = make_blocks(30)
IDS = {block.id for block in BLOCKS}
OLD, NEW = everywhere(1, ["a", "b", "c"]), everywhere(2, ["b", "c", "d"])


async def settled() -> Fleet:
    """A fleet in which everything went over from the old layout to the new, which is granted but not told yet."""
    fleet = Fleet("a", "b", "c", "d")
    fleet.tell(OLD)
    await fleet.beat()
    await fleet.put("abc", BLOCKS)
    fleet.tell(NEW, OLD)
    await fleet.beat()
    await fleet.settle()
    assert [fleet[name].core.healing.synced_epoch for name in "abcd"] == [2] * 4
    return fleet


async def test_without_a_grant_nothing_goes() -> None:
    fleet = await settled()
    assert fleet["a"].core.healing.foreign_blocks == 0, "it owns them in a layout that lives"
    fleet.tell(NEW)
    await fleet.beat()
    await fleet.settle("a")
    assert fleet["a"].ids() == IDS
    assert fleet["a"].core.healing.foreign_blocks == 30
    fleet.tell(NEW, granted=1)
    await fleet.beat()
    await fleet.settle("a")
    assert fleet["a"].ids() == IDS, "the grant is for another layout"


async def test_an_older_layout_that_lives_keeps_everything() -> None:
    fleet = await settled()
    fleet.tell(everywhere(3, ["b", "c", "d"]), NEW, granted=3)
    await fleet.beat()
    await fleet.settle("a")
    assert fleet["a"].ids() == IDS


async def test_under_the_grant_what_all_owners_have_goes() -> None:
    fleet = await settled()
    fleet.epoch = 4
    fleet.tell(NEW, granted=2)
    await fleet.beat()
    await fleet.settle("a")
    assert fleet["a"].ids() == set()
    assert (fleet["a"].core.healing.foreign_blocks, fleet["a"].core.healing.dropped_blocks) == (0, 30)
    assert [fleet[name].ids() for name in "bcd"] == [IDS] * 3
    assert all(set(fleet[name].stamps().values()) == {4} for name in "bcd"), "confirmed and stamped"


async def test_what_an_owner_lacks_is_handed_to_it_first() -> None:
    fleet = await settled()
    fleet["d"].store.delete(1, [block.id for block in BLOCKS[:7]])
    fleet.tell(NEW, granted=2)
    await fleet.beat()
    await fleet.settle("a")
    assert fleet["a"].ids() == set()
    assert fleet["d"].ids() == IDS
    assert fleet["a"].core.healing.handed_blocks == 7


async def test_the_last_copy_of_all_is_handed_to_every_owner() -> None:
    fleet = await settled()
    for name in "bcd":
        fleet[name].store.delete(1, [BLOCKS[0].id])
    fleet.tell(NEW, granted=2)
    await fleet.beat()
    await fleet.settle("a")
    assert fleet["a"].ids() == set()
    assert [BLOCKS[0].id in fleet[name].ids() for name in "bcd"] == [True] * 3


async def test_one_owner_that_does_not_answer_keeps_everything_until_it_does() -> None:
    fleet = await settled()
    fleet.cut.add(("a", "d"))
    fleet.tell(NEW, granted=2)
    await fleet.beat()
    await fleet.settle("a")
    assert fleet["a"].ids() == IDS
    fleet.cut.clear()
    fleet.clock.advance(RETRY_S)
    await fleet.settle("a")
    assert fleet["a"].ids() == set()


async def test_an_owner_that_is_down_is_not_even_asked() -> None:
    fleet = await settled()
    fleet.down.add("d")
    fleet.tell(NEW, granted=2)
    await fleet.beat()
    fleet.calls.clear()
    await fleet.settle("a")
    assert fleet["a"].ids() == IDS
    assert fleet.calls == []


async def test_an_owner_that_knows_another_layout_keeps_everything() -> None:
    fleet = await settled()
    fleet.tell(NEW, granted=2)
    await fleet.beat("a")
    fleet.tell(everywhere(3, ["b", "c", "d"]), NEW)
    await fleet.beat("b", "c", "d")
    confirm = fleet["b"].healing.peer_side.confirm
    with pytest.raises(HoldfastError) as refused:
        await confirm(tenant=1, ids=sorted(IDS), layout_epoch=2, collection_epoch=0)
    assert refused.value.code is ErrorCode.WRONG_EPOCH
    await fleet.settle("a")
    assert fleet["a"].ids() == IDS


async def test_a_layout_that_comes_while_owners_confirm_stops_the_drop() -> None:
    fleet = await settled()
    fleet.tell(NEW, granted=2)
    await fleet.beat()
    real = fleet["d"].healing.peer_side.confirm

    async def confirm(**asked: object) -> list[Verdict]:
        verdicts = await real(**asked)  # type: ignore[arg-type]
        fleet.tell(everywhere(3, ["a", "c", "d"]), NEW)
        await fleet.beat("a")
        return verdicts

    fleet["d"].healing.peer_side.confirm = confirm  # type: ignore[method-assign]
    await fleet.settle("a")
    assert fleet["a"].ids() == IDS


async def test_a_rotten_copy_of_others_goes_once_all_owners_have_the_block() -> None:
    fleet = await settled()
    fleet["a"].store.overwrite(1, BLOCKS[3].id, b"rot")
    fleet["a"].store.has(1, [BLOCKS[3].id], verify=True)
    assert fleet["a"].store.status().quarantined_count == 1
    fleet.tell(NEW, granted=2)
    await fleet.beat()
    await fleet.settle("a")
    assert fleet["a"].store.status().block_count == 0
    assert fleet["a"].core.healing.foreign_blocks == 0


async def test_without_a_coordinator_nothing_goes() -> None:
    fleet = await settled()
    fleet.tell(NEW, granted=2)
    await fleet.beat()
    fleet.coordinator_down = True
    await fleet.settle("a")
    assert fleet["a"].ids() == IDS


@pytest.mark.slow
async def test_many_blocks_go_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = await settled()
    monkeypatch.setattr(drop, "_BLOCKS_PER_STEP", 2)
    fleet.tell(NEW, granted=2)
    await fleet.beat()
    fleet.calls.clear()
    await fleet.settle("a")
    assert fleet["a"].ids() == set()
    assert fleet.calls.count(("a", "b", "confirm")) >= 15
