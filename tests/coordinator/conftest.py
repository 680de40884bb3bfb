"""What the coordinator's tests share: stores, and a coordinator whose first layout has formed."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from tests.coordinator.rig import Client, coordinator


@pytest.fixture
def clock() -> ManualClock:
    """Time that tests move by hand."""
    return ManualClock()


@pytest.fixture
async def store(clock: ManualClock) -> AsyncIterator[SqliteStore]:
    """A metadata store in memory; leases run on `clock`."""
    opened = await SqliteStore.open(":memory:", clock)
    try:
        yield opened
    finally:
        await opened.close()


@pytest.fixture
async def client(store: SqliteStore, clock: ManualClock) -> AsyncIterator[Client]:
    """A client of a coordinator that takes writes, with a VM `vm-1`."""
    async with coordinator(store, clock=clock) as running:
        await running.form_layout()
        await running.register_vm()
        yield running
