"""Locks of points: nothing forgets or discards what is locked, whoever asks and whatever the clock does."""

from __future__ import annotations

import asyncio
import random

import pytest

import holdfast_coordinator.discard
from holdfast_coordinator.cautious_clock import CautiousClock
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.records import each
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import POINT_LOCK_S_MAX
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import LockRecord
from tests.coordinator.faults import FaultyStore
from tests.coordinator.lifecycle import discard, keys_about
from tests.coordinator.rig import Client, coordinator, records, refused
from tests.coordinator.test_discard import lineage

SPACE = TenantKeyspace(1)
DAY_MS = 86_400_000


class JumpingClock(ManualClock):
    """A clock whose wall time can be set."""

    ahead_ms = 0

    def now_unix_ms(self) -> int:
        """Return the wall clock as it is set."""
        return super().now_unix_ms() + self.ahead_ms


@pytest.fixture
def clock() -> JumpingClock:
    return JumpingClock()


async def lock(client: Client, point_id: str, until_unix_ms: int) -> LockRecord:
    """Lock a point."""
    request = state_pb2.LockPointRequest(point_id=point_id, until_unix_ms=until_unix_ms)
    held: LockRecord = (await client.state("LockPoint", request)).lock
    return held


async def forget(client: Client, point_id: str) -> None:
    """Forget a point."""
    await client.state("ForgetPoint", state_pb2.ForgetPointRequest(point_id=point_id))


async def unlock(client: Client, point_id: str) -> None:
    """Lift a lock."""
    await client.state("UnlockPoint", state_pb2.UnlockPointRequest(point_id=point_id))


async def locks_in(store: MetadataStore) -> list[str]:
    """Keys of all locks."""
    return [item.key async for item in each(store, SPACE.locks_prefix)]


async def test_a_locked_point_is_not_forgotten_before_its_time(
    client: Client, store: SqliteStore, clock: JumpingClock
) -> None:
    first, second = await lineage(client, backups=1)
    until = clock.now_unix_ms() + DAY_MS
    held = await lock(client, first, until)
    assert (held.point_id, held.until_unix_ms, held.principal, held.set_unix_ms) == (
        *(first, until, "admin"),
        clock.now_unix_ms(),
    )
    error = await refused(ErrorCode.CONFLICT, forget(client, first))
    assert error.facts["locked_until_unix_ms"] == str(until)
    assert "locked until 2023-11-15 22:13:20Z by admin" in error.message
    await forget(client, second)
    clock.advance(86_399.9)
    await refused(ErrorCode.CONFLICT, forget(client, first))
    clock.advance(0.2)
    await forget(client, first)
    assert await locks_in(store) == []


async def test_a_lock_is_only_ever_made_longer(client: Client, clock: JumpingClock) -> None:
    (point,) = await lineage(client, backups=0)
    now = clock.now_unix_ms()
    await lock(client, point, now + 2 * DAY_MS)
    assert (await lock(client, point, now + DAY_MS)).until_unix_ms == now + 2 * DAY_MS
    assert (await lock(client, point, now + 3 * DAY_MS)).until_unix_ms == now + 3 * DAY_MS
    await refused(ErrorCode.INVALID_ARGUMENT, lock(client, point, now))
    await refused(ErrorCode.LIMIT_EXCEEDED, lock(client, point, now + (POINT_LOCK_S_MAX + 1) * 1000))
    await refused(ErrorCode.NOT_FOUND, lock(client, "snap-unknown", now + DAY_MS))
    shown = await client.state("GetPoint", state_pb2.GetPointRequest(point_id=point))
    assert shown.lock.until_unix_ms == now + 3 * DAY_MS
    listed = await client.state("ListPoints", state_pb2.ListPointsRequest(vm_id="vm-1"))
    assert [each.point_id for each in listed.locks] == [point]


async def test_an_administrator_lifts_a_lock_and_the_log_has_it(
    client: Client, store: SqliteStore, clock: JumpingClock
) -> None:
    (point,) = await lineage(client, backups=0)
    until = clock.now_unix_ms() + DAY_MS
    await lock(client, point, until)
    await client.bind(("agent", "backup-writer", "vm/*"))
    agent = Client(client.address, token=await client.new_token("agent"))
    try:
        await refused(ErrorCode.DENIED, unlock(agent, point))
        await lock(agent, point, until + DAY_MS)
    finally:
        await agent.close()
    await unlock(client, point)
    await unlock(client, point)
    await forget(client, point)
    made = [record for record in await records(store) if record.action in ("point.lock", "point.unlock")]
    assert [(r.action, r.outcome, r.principal, r.details.get("until_unix_ms", "")) for r in made] == [
        ("point.lock", "OK", "admin", str(until)),
        ("point.unlock", "DENIED", "agent", ""),
        ("point.lock", "OK", "agent", str(until + DAY_MS)),
        ("point.unlock", "OK", "admin", str(until + DAY_MS)),
        ("point.unlock", "REPEATED", "admin", ""),
    ]
    await refused(ErrorCode.NOT_FOUND, lock(client, point, until))


async def test_a_vm_with_a_locked_point_is_not_discarded(
    client: Client, store: SqliteStore, clock: JumpingClock
) -> None:
    points = await lineage(client, backups=2)
    await lock(client, points[0], clock.now_unix_ms() + DAY_MS)
    await lock(client, points[1], clock.now_unix_ms() + 2 * DAY_MS)
    error = await refused(ErrorCode.CONFLICT, discard(client, points[-1]))
    assert "2 locked points" in error.message
    assert error.facts["locked_until_unix_ms"] == str(clock.now_unix_ms() + 2 * DAY_MS)
    assert len(await client.points()) == 3
    clock.advance(2 * 86_400)
    assert (await discard(client, points[-1])).point_count == 3
    assert await keys_about(store, "vm-1", points) == []
    assert await locks_in(store) == []


@pytest.mark.slow
async def test_many_points_with_ended_locks_are_discarded(
    client: Client, store: SqliteStore, clock: JumpingClock
) -> None:
    points = await lineage(client, backups=70)
    for point in points:
        await lock(client, point, clock.now_unix_ms() + 1000)
    clock.advance(10)
    assert (await discard(client, points[-1])).point_count == 71
    assert await locks_in(store) == []


@pytest.mark.parametrize("ends", ["forget", "discard"])
async def test_a_lock_that_comes_at_the_last_moment_counts(store: SqliteStore, clock: JumpingClock, ends: str) -> None:
    faults = FaultyStore(store)
    async with coordinator(faults, clock=clock) as client, coordinator(store, clock=clock, seed=2) as other:
        await client.form_layout()
        await client.register_vm()
        points = await lineage(client, backups=1)
        until = clock.now_unix_ms() + DAY_MS
        faults.before_next_commit(lambda: lock(other, points[0], until))
        await refused(
            ErrorCode.CONFLICT, forget(client, points[0]) if ends == "forget" else discard(client, points[-1])
        )
        assert len(await other.points()) == 2


async def test_a_vm_that_is_being_discarded_takes_no_lock(
    store: SqliteStore, clock: JumpingClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holdfast_coordinator.discard, "POINTS_PER_TXN", 1)
    faults = FaultyStore(store)
    async with coordinator(faults, clock=clock) as client, coordinator(store, clock=clock, seed=2) as other:
        await client.form_layout()
        await client.register_vm()
        points = await lineage(client, backups=2)
        seen: list[ErrorCode] = []

        async def late() -> None:
            try:
                await lock(other, points[2], clock.now_unix_ms() + DAY_MS)
            except HoldfastError as error:
                seen.append(error.code)

        async def in_between() -> None:
            # Runs before the first portion; what is due is before the second.
            faults.before_next_commit(late)

        faults.before_next_commit(in_between)
        assert (await discard(client, points[-1])).point_count == 3
        assert seen == [ErrorCode.CONFLICT]


async def test_locking_forgetting_and_discarding_race_and_agree(
    client: Client, store: SqliteStore, clock: JumpingClock
) -> None:
    source = random.Random(7)
    for turn in range(12):
        vm_id = f"race-{turn}"
        await client.register_vm(vm_id)
        points = await lineage(client, vm_id, backups=2)
        until = clock.now_unix_ms() + DAY_MS
        calls = [lock(client, points[0], until), forget(client, points[0]), discard(client, points[-1], vm_id=vm_id)]
        order = source.sample(range(3), 3)
        outcomes = await asyncio.gather(*(calls[at] for at in order), return_exceptions=True)
        locked = not isinstance(outcomes[order.index(0)], BaseException)
        gone = await store.get(SPACE.vm(vm_id)) is None
        left = [] if gone else [point.point_id for point in await client.points(vm_id)]
        assert (points[0] in left) == locked, outcomes
        if not locked:
            assert not [key for key in await locks_in(store) if key.endswith(points[0])]


async def test_a_clock_that_is_set_forward_ends_no_lock(client: Client, clock: JumpingClock) -> None:
    (point,) = await lineage(client, backups=0)
    await lock(client, point, clock.now_unix_ms() + DAY_MS)
    clock.ahead_ms = 10 * DAY_MS
    await refused(ErrorCode.CONFLICT, forget(client, point))
    clock.ahead_ms = 0
    clock.advance(86_401)
    await forget(client, point)


def test_a_cautious_clock_goes_forward_by_the_monotonic_clock_alone_and_back_with_the_wall_clock() -> None:
    clock = JumpingClock(unix_ms=1_000_000)
    cautious = CautiousClock(clock)
    clock.advance(5)
    assert cautious.now_unix_ms() == 1_005_000
    clock.ahead_ms = 100_000
    clock.advance(5)
    assert cautious.now_unix_ms() == 1_010_000
    clock.ahead_ms = -3_000
    assert cautious.now_unix_ms() == 1_007_000
    clock.ahead_ms = 0
    clock.advance(1)
    assert cautious.now_unix_ms() == 1_008_000
