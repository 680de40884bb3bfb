"""Lets go of blocks whose partitions a node owns in no living layout, under a grant alone (invariant 9).

A block goes only if the newest layout that the node knows is the granted one, no older one lives, and all owners in it
confirm the block as durable and stamped, under that layout. What an owner lacks is handed to it first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.limits import BATCH_BLOCKS_MAX, BATCH_BYTES_TARGET
from holdfast_core.runtime.blocks.groups import plain_task_group
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import Log
from holdfast_storagenode.batch import batch_of
from holdfast_storagenode.core import NodeCore
from holdfast_storagenode.healing.peers import FreshEpoch, Peers
from holdfast_storagenode.living import Living
from holdfast_storagenode.store import BlockStore, Verdict

RETRY_S: Final = 10.0
RECOUNT_S: Final = 60.0
_BLOCKS_PER_STEP: Final = 1024
_QUARANTINED_MAX: Final = 10_000


@dataclass(frozen=True, slots=True)
class _Page:
    """Some of one tenant's blocks in a foreign partition."""

    tenant: int
    partition: int
    ids: tuple[bytes, ...]


class Dropper:
    """Goes through a node's foreign blocks; driven by the sync worker."""

    def __init__(self, core: NodeCore, peers: Peers, *, fresh_epoch: FreshEpoch, clock: Clock, log: Log) -> None:
        """Prepare; nothing is known to be foreign yet."""
        self._core = core
        self._peers = peers
        self._fresh_epoch = fresh_epoch
        self._clock = clock
        self._log = log
        self._counted: Living | None = None
        self._recount_due_s = 0.0
        self._partitions: list[int] = []
        self._at: tuple[int, bytes] = (0, b"")
        self._quarantined: list[tuple[int, bytes]] = []
        self._trouble = ""

    def counted(self, living: Living) -> bool:
        """Return whether the foreign blocks were counted under these layouts."""
        return self._counted is living

    async def observe(self, living: Living) -> None:
        """Count foreign blocks where the layouts changed, or it is time to look again.

        Raises:
            HoldfastError: what the store raises.
        """
        now_s = self._clock.monotonic_s()
        if self.counted(living) and (now_s < self._recount_due_s or self._partitions):
            return
        store, foreign = self._core.store, living.foreign_to(self._core.node_id)
        counts = await self._core.executor.run(_counts, store, foreign)
        places = frozenset(foreign)
        quarantined = await self._core.executor.run(store.quarantined, limit=_QUARANTINED_MAX)
        self._quarantined = [
            (tenant, block_id) for tenant, block_id in quarantined if living.newest.partition_of(block_id) in places
        ]
        self._core.healing.foreign_blocks = sum(counts.values()) + len(self._quarantined)
        self._partitions = sorted(counts, reverse=True)
        self._at = (0, b"")
        self._counted = living
        self._recount_due_s = now_s + (RETRY_S if self._partitions or self._quarantined else RECOUNT_S)

    async def step(self, living: Living) -> bool:
        """Let go of some blocks that all owners have; returns whether there was anything to do.

        Raises:
            HoldfastError: what the store raises; UNREACHABLE where no coordinator tells the collection epoch.
        """
        page = await self._next_page()
        if page is None:
            return False
        peers = self._core.cluster.peers
        down = [owner for owner in living.newest.owners_of(page.partition) if owner not in peers or not peers[owner].up]
        if down:
            self._note(f"storage node {down[0]} is down, and owns some of them")
            return True
        epoch = await self._fresh_epoch()
        confirmed = await self._confirmed(living, page, epoch)
        # Nothing is awaited between this look and the delete's being handed over.
        if self._core.cluster.living is not living or not living.may_drop:
            return False
        if confirmed:
            gone = await self._core.executor.run(self._core.store.delete, page.tenant, confirmed)
            count = sum(verdict is Verdict.OK for verdict in gone)
            healing = self._core.healing
            healing.dropped_blocks += count
            healing.foreign_blocks = max(0, healing.foreign_blocks - count)
        return True

    async def _next_page(self) -> _Page | None:
        """Return the next foreign blocks in the order of partitions, tenants and ids; quarantined ones at the end."""
        while self._partitions:
            partition = self._partitions[-1]
            page, self._at = await self._core.executor.run(_page, self._core.store, partition, self._at)
            if page is not None:
                return page
            self._partitions.pop()
            self._at = (0, b"")
        if not self._quarantined:
            return None
        tenant, block_id = self._quarantined.pop()
        return _Page(tenant, self._core.cluster.partition_of(block_id), (block_id,))

    async def _confirmed(self, living: Living, page: _Page, epoch: int) -> list[bytes]:
        """Return the ids of a page that every owner in the newest layout holds durably, and has stamped."""
        owners = living.newest.owners_of(page.partition)
        answers: dict[str, frozenset[bytes]] = {}

        async def ask(owner: str) -> None:
            try:
                answers[owner] = await self._held_by(owner, living, page, epoch)
                self._note("")
            except HoldfastError as error:
                self._note(error.message)

        async with plain_task_group() as group:
            for owner in owners:
                group.create_task(ask(owner))
        if len(answers) < len(owners):
            return []
        return [block_id for block_id in page.ids if all(block_id in held for held in answers.values())]

    async def _held_by(self, owner: str, living: Living, page: _Page, epoch: int) -> frozenset[bytes]:
        """Return what an owner holds of a page, after it was handed what it lacked."""
        held = await self._confirm(owner, living, page.tenant, page.ids, epoch)
        lacking = [block_id for block_id in page.ids if block_id not in held]
        if lacking:
            await self._hand(owner, living, page.tenant, lacking, epoch)
            held |= await self._confirm(owner, living, page.tenant, lacking, epoch)
        return held

    async def _confirm(
        self, owner: str, living: Living, tenant: int, ids: Sequence[bytes], epoch: int
    ) -> frozenset[bytes]:
        verdicts = await self._peers.confirm(
            owner, tenant=tenant, ids=ids, layout_epoch=living.newest.epoch, collection_epoch=epoch
        )
        return frozenset(block_id for block_id, verdict in zip(ids, verdicts, strict=True) if verdict is Verdict.OK)

    async def _hand(self, owner: str, living: Living, tenant: int, ids: Sequence[bytes], epoch: int) -> None:
        left = list(ids)
        while left:
            found = await self._core.executor.run(
                self._core.store.get, tenant, left[:BATCH_BLOCKS_MAX], bytes_max=BATCH_BYTES_TARGET
            )
            left = left[len(found) :]
            blocks = [(item.id, item.data) for item in found if not isinstance(item, Verdict)]
            if blocks:
                batch = batch_of(living.newest.epoch, blocks)
                await self._peers.hand(owner, tenant=tenant, batch=batch, collection_epoch=epoch)
                self._core.healing.handed_blocks += len(blocks)

    def _note(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            self._log.warning("blocks of others stay", why=trouble)
        self._trouble = trouble


def _counts(store: BlockStore, partitions: Sequence[int]) -> Mapping[int, int]:
    """Return how many whole blocks are held of each partition, without those of which there are none."""
    counts = {partition: sum(held.count for held in store.holdings(partition)) for partition in partitions}
    return {partition: count for partition, count in counts.items() if count}


def _page(store: BlockStore, partition: int, at: tuple[int, bytes]) -> tuple[_Page | None, tuple[int, bytes]]:
    """Return some blocks of a partition above (tenant, id), None where there are none, and where they end."""
    tenant, after = at
    for held in store.holdings(partition):
        if held.tenant < tenant:
            continue
        entries = store.scan(
            held.tenant, partition=partition, after=after if held.tenant == tenant else b"", limit=_BLOCKS_PER_STEP
        )
        if entries:
            ids = tuple(entry.block_id for entry in entries)
            return _Page(held.tenant, partition, ids), (held.tenant, ids[-1])
    return None, at
