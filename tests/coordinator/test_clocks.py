"""A coordinator whose wall clock is wrong: nodes refuse it, that is said as what it is, and another one goes on."""

from __future__ import annotations

import random

import pytest

from holdfast_core.model.errors import ErrorCode
from holdfast_core.runtime.clock import SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from tests.coordinator.content import cluster, put, seal_volume
from tests.coordinator.rig import coordinator, point_commit, refused, ring_of

HOURS_MS = 5 * 3600 * 1000


class WrongClock(SystemClock):
    """The machine's clock, ahead by `ahead_ms`."""

    __slots__ = ("ahead_ms",)

    def __init__(self, ahead_ms: int) -> None:
        self.ahead_ms = ahead_ms

    def now_unix_ms(self) -> int:
        return super().now_unix_ms() + self.ahead_ms


@pytest.mark.parametrize("ahead_ms", [HOURS_MS, -HOURS_MS], ids=["ahead", "behind"])
async def test_a_commit_by_a_coordinator_with_a_wrong_clock(ahead_ms: int) -> None:
    clock = WrongClock(ahead_ms)
    store = await SqliteStore.open(":memory:", SystemClock())
    try:
        async with cluster(store) as right, coordinator(store, clock=clock, seed=2) as wrong:
            begun = await right.client.begin()
            plains = {slot: random.Random(slot).randbytes(64) for slot in range(9)}
            volume, sealed = seal_volume(ring_of(begun.grant.keys), plains, total=9)
            await put(begun.grant, sealed.everything)
            commit = point_commit(begun, [volume])
            # Not that the tree is corrupt, which nobody could tell here.
            error = await refused(ErrorCode.UNREACHABLE, wrong.commit(commit))
            assert "clock" in error.message
            assert await right.client.points() == []
            # What was minted under the wrong time is not kept for hours once it is right.
            clock.ahead_ms = 0
            assert (await wrong.commit(commit)).number == 1
            assert len(await right.client.points()) == 1
    finally:
        await store.close()
