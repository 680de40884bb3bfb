"""Writers of overlapping ranges take turns, in the order in which they came; all others go side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class _Hold:
    start: int
    end: int
    released: asyncio.Event = field(default_factory=asyncio.Event)


class RangeLocks:
    """Locks on ranges of one volume. Belongs to an event loop."""

    def __init__(self) -> None:
        """Begin with nothing held."""
        self._holds: list[_Hold] = []

    @asynccontextmanager
    async def hold(self, start: int, end: int) -> AsyncIterator[None]:
        """Hold `start` to before `end`; waits for everyone who came earlier and overlaps."""
        mine = _Hold(start, end)
        before = [each for each in self._holds if each.start < end and start < each.end]
        self._holds.append(mine)
        try:
            for each in before:
                await each.released.wait()
            yield
        finally:
            self._holds.remove(mine)
            mine.released.set()
