"""What the tests of collection share."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from tests.collection.rig import Collecting, collecting


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    """A metadata store in memory."""
    opened = await SqliteStore.open(":memory:", SystemClock())
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture
async def running(store: SqliteStore) -> AsyncIterator[Collecting]:
    """A cluster of three nodes in memory, without a collection that begins by itself."""
    async with collecting(store) as made:
        yield made
