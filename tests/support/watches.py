"""Reading a watch of a metadata store in tests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from holdfast_core.runtime.metadata.store import WatchBatch

_SOON_S: Final = 30.0


async def next_batch(batches: AsyncIterator[WatchBatch]) -> WatchBatch:
    """Return the next batch. Raises TimeoutError if none comes soon."""
    async with asyncio.timeout(_SOON_S):
        return await anext(batches)
