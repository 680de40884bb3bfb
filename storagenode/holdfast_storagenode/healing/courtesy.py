"""Lets clients go first: background work of a node is as fast as it can be while no client asks the node for anything.

While clients do, one piece of it is done at a time, and after each as many times as long as it took is waited.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from holdfast_core.runtime.clock import Clock
from holdfast_storagenode.core import NodeCore

CLIENTS_REMEMBERED_S: Final = 1.0
"""Seconds after a client's last call for which it counts as at work."""

_PAUSE_S_MAX: Final = 10.0


class Courtesy:
    """What a node's workers ask before they take a share of it. Belongs to one event loop."""

    def __init__(self, core: NodeCore, clock: Clock, *, gentleness: float) -> None:
        """Wait `gentleness` times as long as a piece took, while clients are at work."""
        self._core = core
        self._clock = clock
        self._gentleness = gentleness
        self._calls_seen = 0
        self._busy_until_s = 0.0
        self._alone = asyncio.Lock()

    def busy(self) -> bool:
        """Return whether clients are at work."""
        now_s, calls = self._clock.monotonic_s(), self._core.client_calls
        if calls != self._calls_seen:
            self._calls_seen = calls
            self._busy_until_s = now_s + CLIENTS_REMEMBERED_S
        return self._gentleness > 0 and now_s < self._busy_until_s

    def pause_s(self, took_s: float) -> float:
        """Return how long to wait after a piece of work that took `took_s` seconds."""
        return min(_PAUSE_S_MAX, self._gentleness * took_s) if self.busy() else 0.0

    @asynccontextmanager
    async def piece(self, *, urgent: bool = False) -> AsyncIterator[None]:
        """Do a piece of work here, after those of others and before a wait where clients are at work.

        What is `urgent` goes first: nothing is gained by gentleness where one more failure may cost data.
        """
        if urgent or not self.busy():
            yield
            return
        async with self._alone:
            began_s = self._clock.monotonic_s()
            yield
            pause_s = self.pause_s(self._clock.monotonic_s() - began_s)
            if pause_s:
                await self._clock.sleep(pause_s)
