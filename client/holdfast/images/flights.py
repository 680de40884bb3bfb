"""Fetches under way: who needs a block that is being fetched waits for that fetch and starts no second one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from holdfast_core.model.errors import HoldfastError


class Flight:
    """One fetch of some blocks of an image. A block is handed to those who wait for it as soon as it is there.

    Belongs to an event loop. A reader that gives up takes nothing from the others: each waits on a future of its own.
    """

    def __init__(self, positions: Iterable[int]) -> None:
        """Begin with blocks that are still to come."""
        self.pending = set(positions)
        self._waiting: dict[int, list[asyncio.Future[bytes]]] = {}

    def wait(self, position: int) -> asyncio.Future[bytes]:
        """Return a future of a block that is pending."""
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(position, []).append(future)
        return future

    def deliver(self, position: int, plain: bytes) -> None:
        """Hand a block on."""
        self.pending.discard(position)
        for future in self._waiting.pop(position, ()):
            if not future.done():
                future.set_result(plain)

    def fail(self, position: int, error: HoldfastError) -> None:
        """Tell those who wait for a block that it does not come."""
        self.pending.discard(position)
        for future in self._waiting.pop(position, ()):
            if not future.done():
                future.set_exception(error)
