"""Duties: once an interval over all coordinators, whatever clocks and coordinators do."""

from __future__ import annotations

from contextlib import suppress

import pytest

from holdfast_coordinator import keyspace
from holdfast_coordinator.healing.duties import Due, Duty, is_due
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import STEWARD_TTL_S
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Put
from tests.coordinator.faults import Crash, Fault, FaultyStore
from tests.coordinator.healing_rig import Seat, seat

HOUR_S = 3600.0


class Sweeping:
    """A duty that notes when it was run, and fails when it is told to."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.at_s: list[float] = []
        self.fails = False
        self.duty = Duty("sweeping", HOUR_S, self.run)

    async def run(self) -> None:
        self.at_s.append(self.clock.monotonic_s())
        if self.fails:
            raise HoldfastError(ErrorCode.UNREACHABLE, "the nodes are away")


@pytest.fixture
def sweeping(clock: ManualClock) -> Sweeping:
    return Sweeping(clock)


async def go(clock: ManualClock, seconds: float, *seats: Seat) -> None:
    """Let time go by while coordinators keep their leases and look after their duties."""
    for _ in range(round(seconds / 3)):
        for each in seats:
            await each.parts.lease.step()
            for worker in each.parts.duties:
                await worker.step()
        clock.advance(3.0)


async def test_a_duty_is_run_once_an_interval_counted_from_when_it_was_first_known(
    store: SqliteStore, clock: ManualClock, sweeping: Sweeping
) -> None:
    one = await seat(store, clock, duties=[sweeping.duty])
    await go(clock, HOUR_S - 30, one)
    assert sweeping.at_s == []
    await go(clock, 3 * HOUR_S, one)
    gaps = [later - earlier for earlier, later in zip(sweeping.at_s, sweeping.at_s[1:], strict=False)]
    assert len(sweeping.at_s) == 3
    assert all(HOUR_S <= gap < HOUR_S + 20 for gap in gaps)
    assert one.parts.duties[0].status() == {"runs": 3, "failures": 0}


@pytest.mark.slow
async def test_the_next_steward_goes_on_where_the_last_one_was(
    store: SqliteStore, clock: ManualClock, sweeping: Sweeping
) -> None:
    one = await seat(store, clock, duties=[sweeping.duty])
    two = await seat(store, clock, seed=2, duties=[sweeping.duty])
    await go(clock, HOUR_S + 30, one, two)
    assert len(sweeping.at_s) == 1
    clock.advance(STEWARD_TTL_S)  # the first one has died
    await go(clock, HOUR_S - 60, two)
    assert len(sweeping.at_s) == 1
    await go(clock, 90, two, one)
    assert len(sweeping.at_s) == 2
    assert (one.parts.lease.term, two.parts.lease.term > 0) == (0, True)


async def test_a_run_that_fails_is_told_and_the_next_comes_in_its_time(
    store: SqliteStore, clock: ManualClock, sweeping: Sweeping
) -> None:
    one = await seat(store, clock, duties=[sweeping.duty])
    sweeping.fails = True
    await go(clock, HOUR_S + 30, one)
    assert one.parts.duties[0].status() == {"runs": 1, "failures": 1}
    sweeping.fails = False
    await go(clock, HOUR_S, one)
    assert one.parts.duties[0].status() == {"runs": 2, "failures": 1}


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(Fault))
async def test_no_fault_makes_a_duty_run_twice(
    store: SqliteStore, clock: ManualClock, sweeping: Sweeping, fault: Fault
) -> None:
    runs = 0
    for at in range(10):
        faults = FaultyStore(store)
        one = await seat(faults, clock, seed=10 + at, duties=[sweeping.duty])
        two = await seat(store, clock, seed=50 + at, duties=[sweeping.duty])
        await one.parts.lease.step()
        await go(clock, HOUR_S - 60 if at else HOUR_S, one)
        await one.parts.lease.step()
        clock.advance(60.0)
        await one.parts.lease.step()
        faults.arm(fault, at=at)
        with suppress(Crash, HoldfastError):
            await one.parts.duties[0].step()
        struck = faults.struck
        faults.arm(None)
        clock.advance(STEWARD_TTL_S * 2)
        await go(clock, 60, two)
        # One run at most: where it was claimed and its maker died, it waits for the next time.
        assert len(sweeping.at_s) - runs <= 1
        runs = len(sweeping.at_s)
        await two.parts.lease.close()
        if not struck:
            break
    assert 1 < at < 9


async def test_a_clock_that_was_ahead_costs_one_interval_and_not_years(
    store: SqliteStore, clock: ManualClock, sweeping: Sweeping
) -> None:
    ahead = clock.now_unix_ms() + 10 * 365 * 86_400_000
    await store.txn([], [Put(keyspace.duty("sweeping"), str(ahead).encode())])
    one = await seat(store, clock, duties=[sweeping.duty])
    await go(clock, HOUR_S - 30, one)
    assert sweeping.at_s == []
    await go(clock, 60, one)
    assert len(sweeping.at_s) == 1


async def test_a_clock_that_jumps_ahead_makes_no_second_run(
    store: SqliteStore, clock: ManualClock, sweeping: Sweeping, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await seat(store, clock, duties=[sweeping.duty])
    await go(clock, HOUR_S + 30, one)
    later_ms = clock.now_unix_ms() + 86_400_000
    monkeypatch.setattr(clock, "now_unix_ms", lambda: later_ms)
    await go(clock, 300, one)
    assert len(sweeping.at_s) == 1


@pytest.mark.parametrize(
    ("last_s", "now_s", "due"),
    [
        (0, 10_000, Due.COUNT_ANEW),
        (10_000, 13_599, Due.NO),
        (10_000, 13_600, Due.YES),
        (10_000, 9_900, Due.NO),
        (10_000, 9_800, Due.COUNT_ANEW),
    ],
)
def test_when_a_duty_is_due(last_s: int, now_s: int, due: Due) -> None:
    assert is_due(last_s * 1000, HOUR_S, now_s * 1000) is due
