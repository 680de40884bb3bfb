"""Clocks of the simulated world: one true time, and for each process a wall clock that is wrong in its own way."""

from __future__ import annotations

import asyncio
from typing import Final

from tests.sim.loop import SimLoop

EPOCH_UNIX_MS: Final = 1_700_000_000_000


class SimClock:
    """A process's clock: monotonic seconds are the loop's, the wall clock is off by `skew_ms` and may jump."""

    def __init__(self, loop: SimLoop, *, skew_ms: int = 0) -> None:
        """Run on the loop's time."""
        self._loop = loop
        self.skew_ms = skew_ms

    def now_unix_ms(self) -> int:
        """Return what this process takes the time to be."""
        return EPOCH_UNIX_MS + round(self._loop.time() * 1000) + self.skew_ms

    def monotonic_s(self) -> float:
        """Return the loop's time in seconds."""
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        """Wait virtual seconds."""
        await asyncio.sleep(max(0.0, seconds))
