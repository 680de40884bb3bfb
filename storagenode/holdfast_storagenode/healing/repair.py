"""Fetches at once what a node owns and found corrupt, or missed in a read: the queue of single blocks.

What no peer can give is not asked for again until a whole round of comparisons had time to find it. The queue is
bounded; what does not fit is found by the next round too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from holdfast_core.model.limits import ANTI_ENTROPY_INTERVAL_S, SEALED_BYTES_MAX
from holdfast_core.runtime.clock import Clock
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.healing.courtesy import Courtesy
from holdfast_storagenode.healing.pulling import Puller
from holdfast_storagenode.living import Living
from holdfast_storagenode.store import BlockEntry, Verdict

QUEUE_MAX: Final = 8192
IDLE_S: Final = 0.1
RECHECK_S: Final = 60.0

_TRIED_MAX: Final = 65_536
# Their lengths are not known, and a block may have 4 MiB.
_BLOCKS_PER_STEP: Final = 8
_QUARANTINED_MAX: Final = 10_000


class RepairWorker:
    """See the module. Belongs to one event loop."""

    name = "repair"

    def __init__(
        self,
        core: NodeCore,
        puller: Puller,
        *,
        courtesy: Courtesy,
        clock: Clock,
        again_s: float = ANTI_ENTROPY_INTERVAL_S,
    ) -> None:
        """Prepare; what was tried in vain is tried again after `again_s` at the earliest."""
        self._core = core
        self._puller = puller
        self._clock = clock
        self._courtesy = courtesy
        self._again_s = again_s
        self._queue: dict[tuple[int, bytes], None] = {}
        self._tried_s: dict[tuple[int, bytes], float] = {}
        self._recheck_due_s = 0.0
        core.on_loss(self.add)

    def add(self, tenant: int, ids: Sequence[bytes]) -> None:
        """Take note of blocks to fetch; those that were tried in vain a while ago, and too many, are left out."""
        now_s = self._clock.monotonic_s()
        for block_id in ids:
            key = (tenant, block_id)
            tried_s = self._tried_s.get(key)
            if len(self._queue) < QUEUE_MAX and (tried_s is None or now_s >= tried_s + self._again_s):
                self._queue[key] = None

    async def step(self) -> float:
        """Fetch a few blocks of one tenant; return the seconds to wait.

        Raises:
            HoldfastError: what the node's own store raises.
        """
        living = self._core.cluster.living
        if living is None or not self._core.opened:
            return IDLE_S
        await self._recheck()
        if not self._queue:
            return IDLE_S
        began_s = self._clock.monotonic_s()
        tenant = next(iter(self._queue))[0]
        ids = [block_id for owner, block_id in self._queue if owner == tenant][:_BLOCKS_PER_STEP]
        for block_id in ids:
            del self._queue[tenant, block_id]
        await self._repair(living, tenant, ids)
        return self._courtesy.pause_s(self._clock.monotonic_s() - began_s)

    def status(self) -> Mapping[str, int]:
        """Return how many blocks wait."""
        return {"queued": len(self._queue)}

    async def _recheck(self) -> None:
        """From time to time queue what is set aside as corrupt, and forget what somebody brought in the meantime."""
        now_s = self._clock.monotonic_s()
        if now_s < self._recheck_due_s:
            return
        self._recheck_due_s = now_s + RECHECK_S
        store, healing = self._core.store, self._core.healing
        for tenant, block_id in await self._core.executor.run(store.quarantined, limit=_QUARANTINED_MAX):
            self.add(tenant, [block_id])
        by_tenant: dict[int, list[bytes]] = {}
        for tenant, block_id in healing.unrepaired_since():
            by_tenant.setdefault(tenant, []).append(block_id)
        since = healing.unrepaired_since()
        for tenant, ids in by_tenant.items():
            verdicts = await self._core.executor.run(store.has, tenant, ids)
            for block_id, verdict in zip(ids, verdicts, strict=True):
                # What no round of comparisons has named for so long is garbage that went, or not this node's any more.
                old = now_s > since[tenant, block_id] + 2 * self._again_s
                if verdict is Verdict.OK or (verdict is Verdict.MISSING and old):
                    healing.forget(tenant, block_id)

    async def _repair(self, living: Living, tenant: int, ids: Sequence[bytes]) -> None:
        core = self._core
        verdicts = await core.executor.run(core.store.has, tenant, ids)
        corrupt = {block_id for block_id, verdict in zip(ids, verdicts, strict=True) if verdict is Verdict.CORRUPT}
        left = [
            block_id
            for block_id, verdict in zip(ids, verdicts, strict=True)
            if verdict is not Verdict.OK
            and living.owns(core.node_id, living.newest.partition_of(block_id))
            # A collection removed it. If it is needed after all, a listing will say so with its stamp.
            and (block_id in corrupt or core.deleted.outlives(tenant, block_id, stamp=0))
        ]
        for node_id in self._sources(living, left):
            asked = [block_id for block_id in left if node_id in living.owners_of(living.newest.partition_of(block_id))]
            # Their stamps are not known here. Who reads a block may lean on it, so it counts as found now.
            entries = [BlockEntry(block_id, SEALED_BYTES_MAX, 0, core.store.epoch) for block_id in asked]
            lost = set(await self._puller.fetch(node_id, tenant=tenant, entries=entries)) if entries else set()
            left = [block_id for block_id in left if block_id not in asked or block_id in lost]
        for block_id in left:
            self._remember(tenant, block_id)
            if block_id in corrupt:
                core.healing.unrepaired(tenant, block_id, now_s=self._clock.monotonic_s())

    def _sources(self, living: Living, ids: Sequence[bytes]) -> list[str]:
        """Return the nodes that are up and may hold one of `ids`, owners in the newest layout first."""
        owners = [owner for block_id in ids for owner in living.owners_of(living.newest.partition_of(block_id))]
        peers = self._core.cluster.peers
        return [
            owner
            for owner in dict.fromkeys(owners)
            if owner != self._core.node_id and owner in peers and peers[owner].up
        ]

    def _remember(self, tenant: int, block_id: bytes) -> None:
        self._tried_s.pop((tenant, block_id), None)
        self._tried_s[tenant, block_id] = self._clock.monotonic_s()
        if len(self._tried_s) > _TRIED_MAX:
            del self._tried_s[next(iter(self._tried_s))]
