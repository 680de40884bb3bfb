"""Time as something that is passed in: the machine's clock, and one that only moves when a test moves it.

Logic that waits, expires or stamps takes a `Clock`; nothing else of Holdfast asks the machine for the time. Deadlines
of calls on the wire are gRPC's own and stay on the real clock.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from typing import Protocol


class Clock(Protocol):
    """What logic may know about time."""

    def now_unix_ms(self) -> int:
        """Return the wall clock in milliseconds since 1970 (UTC); it may jump."""
        ...

    def monotonic_s(self) -> float:
        """Return seconds on a clock that never goes back; only differences mean anything."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait until `monotonic_s` has advanced by `seconds`; at least one turn of the loop, also for 0 and less."""
        ...


class SystemClock:
    """The machine's clock."""

    __slots__ = ()

    def now_unix_ms(self) -> int:
        """Return the wall clock in milliseconds since 1970 (UTC)."""
        return time.time_ns() // 1_000_000

    def monotonic_s(self) -> float:
        """Return the machine's monotonic clock in seconds."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait `seconds`."""
        await asyncio.sleep(max(0.0, seconds))


class ManualClock:
    """A clock that moves only by `advance`; sleepers wake in the order of their deadlines.

    Belongs to one event loop. `advance` wakes sleepers, which then run at the caller's next await; sleeps that they
    begin count from the time the clock has then.
    """

    def __init__(self, *, unix_ms: int = 1_700_000_000_000, monotonic_s: float = 1000.0) -> None:
        self._start_unix_ms = unix_ms
        self._start_s = monotonic_s
        self._now_s = monotonic_s
        self._order = itertools.count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def now_unix_ms(self) -> int:
        """Return the wall clock, which moves in step with the monotonic one."""
        return self._start_unix_ms + round((self._now_s - self._start_s) * 1000)

    def monotonic_s(self) -> float:
        """Return the virtual time in seconds."""
        return self._now_s

    @property
    def sleeper_count(self) -> int:
        """How many sleeps have not ended; a test waits for this before it advances."""
        return sum(1 for _, _, woken in self._sleepers if not woken.done())

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock has been advanced by `seconds`."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._now_s + seconds, next(self._order), woken))
        await woken

    def advance(self, seconds: float) -> None:
        """Move the clock and wake every sleeper whose deadline has come.

        Raises:
            ValueError: `seconds` is negative.
        """
        if seconds < 0:
            raise ValueError("a clock does not go back")
        self._now_s += seconds
        while self._sleepers and self._sleepers[0][0] <= self._now_s:
            _, _, woken = heapq.heappop(self._sleepers)
            if not woken.done():
                woken.set_result(None)
