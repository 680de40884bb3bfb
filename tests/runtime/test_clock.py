"""The virtual clock moves only when told, and wakes sleepers in order; the real one keeps time."""

from __future__ import annotations

import asyncio

import pytest

from holdfast_core.runtime.clock import Clock, ManualClock, SystemClock


async def test_sleepers_wake_in_order_of_their_deadlines() -> None:
    clock = ManualClock(unix_ms=1000, monotonic_s=5.0)
    woken: list[float] = []

    async def sleeper(seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(seconds)

    async with asyncio.TaskGroup() as group:
        for seconds in (3.0, 1.0, 2.0):
            group.create_task(sleeper(seconds))
        await asyncio.sleep(0)
        assert clock.sleeper_count == 3
        clock.advance(0.5)
        await asyncio.sleep(0)
        assert woken == []
        clock.advance(1.5)
        await asyncio.sleep(0)
        assert woken == [1.0, 2.0]
        clock.advance(60)
    assert woken == [1.0, 2.0, 3.0]
    assert clock.now_unix_ms() == 1000 + 62_000
    assert clock.monotonic_s() == 67.0


async def test_a_cancelled_sleep_is_forgotten() -> None:
    clock = ManualClock()
    task = asyncio.ensure_future(clock.sleep(10))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert clock.sleeper_count == 0
    clock.advance(20)


async def test_a_sleep_of_nothing_only_yields() -> None:
    clock = ManualClock()
    await clock.sleep(0)
    await clock.sleep(-1)
    assert clock.monotonic_s() == ManualClock().monotonic_s()


def test_a_clock_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="does not go back"):
        ManualClock().advance(-1)


async def test_the_machines_clock() -> None:
    clock: Clock = SystemClock()
    before = clock.monotonic_s()
    await clock.sleep(0.01)
    assert clock.monotonic_s() - before >= 0.009
    assert clock.now_unix_ms() > 1_700_000_000_000
