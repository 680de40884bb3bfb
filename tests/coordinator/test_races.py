"""What happens between a commit's check and its transaction: each must be noticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_core.model.errors import ErrorCode
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Put
from holdfast_proto.v1 import cluster_pb2, state_pb2
from tests.coordinator.content import random_blocks, seal_volume
from tests.coordinator.faults import FaultyStore
from tests.coordinator.lifecycle import discard, origin_of, register, rule_of, store_files, vm_of
from tests.coordinator.rig import Client, coordinator, point_commit, refused, ring_of, zero_commit


@dataclass
class Race:
    """A coordinator whose commits are overtaken, and another that overtakes them."""

    slow: Client
    quick: Client
    faults: FaultyStore
    store: SqliteStore


@pytest.fixture
async def race(store: SqliteStore, clock: ManualClock) -> AsyncIterator[Race]:
    faults = FaultyStore(store)
    async with coordinator(faults, clock=clock) as slow, coordinator(store, clock=clock) as quick:
        await quick.form_layout()
        await quick.register_vm()
        yield Race(slow, quick, faults, store)


async def test_a_layout_that_changes_meanwhile_is_checked_again(race: Race) -> None:
    await race.quick.beat(4)
    begun = await race.slow.begin()
    race.faults.before_next_commit(
        lambda: race.quick.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=1))
    )
    made = await race.slow.commit(zero_commit(begun))
    assert made.number == 1
    assert await race.quick.points() == [made]
    layouts = (await race.slow.cluster("GetLayout", cluster_pb2.GetLayoutRequest())).layouts
    assert [layout.epoch for layout in layouts] == [2, 1]


async def test_a_takeover_at_the_last_moment_fences(race: Race) -> None:
    begun = await race.slow.begin()
    race.faults.before_next_commit(lambda: race.quick.begin(takeover=True, nonce=b"t" * 16))
    await refused(ErrorCode.SESSION_LAPSED, race.slow.commit(zero_commit(begun)))
    assert await race.quick.points() == []
    second = await race.quick.begin(takeover=True, nonce=b"t" * 16)
    assert (await race.quick.commit(zero_commit(second))).number == 1


async def test_a_lease_that_ends_at_the_last_moment_ends_the_commit(race: Race, clock: ManualClock) -> None:
    begun = await race.slow.begin()

    async def lapse() -> None:
        clock.advance(31)

    race.faults.before_next_commit(lapse)
    await refused(ErrorCode.SESSION_LAPSED, race.slow.commit(zero_commit(begun)))
    assert await race.quick.points() == []


async def test_the_same_commit_on_another_coordinator_wins_and_both_answer_alike(race: Race) -> None:
    begun = await race.slow.begin()
    request = zero_commit(begun)
    race.faults.before_next_commit(lambda: race.quick.commit(request))
    assert [await race.slow.commit(request)] == await race.quick.points()


async def test_an_abort_at_the_last_moment_counts(race: Race) -> None:
    begun = await race.slow.begin()
    abort = state_pb2.AbortSessionRequest(session_id=begun.session_id)
    race.faults.before_next_commit(lambda: race.quick.state("AbortSession", abort))
    await refused(ErrorCode.SESSION_LAPSED, race.slow.commit(zero_commit(begun)))
    assert await race.quick.points() == []


async def test_damage_that_is_recorded_at_the_last_moment_is_seen(race: Race) -> None:
    """Nobody is behind these nodes, so a tree that must be walked cannot be: the commit must not pass unwalked."""
    space = TenantKeyspace(1)
    begun = await race.slow.begin()
    volume, sealed = seal_volume(ring_of(begun.grant.keys), random_blocks(1, range(3)), total=10)
    zero = zero_commit(begun)

    async def record() -> None:
        lost = sealed.blocks[0].id
        await race.store.txn([], [Put(space.damaged_block(lost), b"snap-1"), Put(space.damage_head, b"")])

    race.faults.before_next_commit(record)
    made = await race.slow.commit(zero)
    assert made.number == 1
    assert race.faults.calls > 0
    after = await race.slow.begin(incremental=True, snapshot_id=made.point_id)
    assert after.damaged_ids == sealed.blocks[0].id
    await refused(ErrorCode.UNREACHABLE, race.slow.commit(point_commit(after, [volume])))


async def kept_vm(race: Race) -> tuple[str, str]:
    """Let vm-1 have a keep rule that is fulfilled; return its newest point and the object."""
    await register(race.quick, vm_of(keep=[rule_of()]), replace=True)
    newest = (await race.quick.save()).point_id
    return newest, await store_files(race.quick, origin_of(rule_of(), newest))


@pytest.mark.parametrize("what", ["object", "point", "session", "rule"])
async def test_what_changes_at_the_last_moment_saves_the_vm(race: Race, what: str) -> None:
    newest, kept = await kept_vm(race)

    async def change() -> None:
        if what == "object":
            await race.quick.state("ForgetObject", state_pb2.ForgetObjectRequest(storage_id=kept))
        elif what == "point":
            await race.quick.save(incremental=True, snapshot_id=newest)
        elif what == "session":
            await race.quick.begin()
        else:
            await register(race.quick, vm_of(keep=[rule_of(include=["**"])]), replace=True)

    race.faults.before_next_commit(change)
    expected = ErrorCode.BUSY if what == "session" else ErrorCode.CONFLICT
    await refused(expected, discard(race.slow, newest, [kept]))
    assert newest in {point.point_id for point in await race.quick.points()}
    assert not (await race.quick.state("GetVm", state_pb2.GetVmRequest(vm_id="vm-1"))).vm.discarding_unix_ms


async def test_a_layout_that_changes_while_a_vm_is_discarded_is_checked_again(race: Race) -> None:
    newest, kept = await kept_vm(race)

    async def apply() -> None:
        await race.quick.beat(4)
        await race.quick.cluster("ApplyLayout", cluster_pb2.ApplyLayoutRequest(previous_epoch=1))

    race.faults.before_next_commit(apply)
    receipt = await discard(race.slow, newest, [kept])
    assert (receipt.point_count, len(receipt.kept)) == (1, 1)


async def test_a_base_that_is_discarded_at_the_last_moment_does_not_hinder_the_commit(race: Race) -> None:
    template = (await race.quick.save()).point_id
    await register(race.quick, vm_of("vm-2", template_id=template))
    begun = await race.slow.begin("vm-2")
    assert begun.base.point_id == template
    race.faults.before_next_commit(lambda: discard(race.quick, template))
    assert (await race.slow.commit(zero_commit(begun))).number == 1


@pytest.mark.slow
async def test_a_template_that_is_discarded_at_the_last_moment_is_left_out(race: Race) -> None:
    template = (await race.quick.save()).point_id
    await register(race.quick, vm_of("vm-2", template_id=template))
    request = state_pb2.DiscardVmRequest(vm_id="vm-1", newest_point_id=template)
    begun, _ = await asyncio.gather(race.slow.begin("vm-2"), race.quick.state("DiscardVm", request))
    assert begun.base.point_id in ("", template)
    assert (await race.slow.commit(zero_commit(begun))).number == 1
