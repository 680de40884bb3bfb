"""Moves old records from the metadata store into the cluster: sealed, replicated, and read as before (ADR 0080).

Invariants:
    * Batches are deleted only after the segment that holds them was written to a quorum, read back, and recorded.
    * What is sealed was found to be what was signed; records that are not stay where they are, for all to see.
    * Segments are made oldest first and leave no gap. Two coordinators may make the same one; it is the same.
"""

from __future__ import annotations

from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.head import load_head
from holdfast_coordinator.audit.metrics import AuditMetrics
from holdfast_coordinator.audit.reader import AuditReader
from holdfast_coordinator.audit.segments import SegmentBlocks
from holdfast_coordinator.collection.epochs import present_epoch
from holdfast_coordinator.records import parse
from holdfast_coordinator.transactions import attempt
from holdfast_core.model.audit.merkle import Frontier, leaf_hash
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import AUDIT_SEGMENT_RECORDS, AUDIT_UNSEALED_RECORDS_MIN
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metadata.store import Absent, Delete, Exists, MetadataStore, Put
from holdfast_proto.v1.audit_pb2 import AuditSegment, AuditSegmentContent

INTERVAL_S: Final = 60.0
_PAGE_ITEMS: Final = 1000
_DELETIONS: Final = 100


class Sealing:
    """One coordinator's share of the sealing. Belongs to one event loop."""

    def __init__(
        self, store: MetadataStore, reader: AuditReader, blocks: SegmentBlocks, *, clock: Clock, metrics: AuditMetrics
    ) -> None:
        """Bind to the store, to a reader of the log, and to where segments are written."""
        self._store = store
        self._reader = reader
        self._blocks = blocks
        self._clock = clock
        self._metrics = metrics
        self._sealed = 0
        self._tidied = -1

    async def run(self) -> None:
        """Seal what is old enough, once a minute, until cancelled. What does not work now is tried again."""
        log = get_log("audit")
        while True:
            await self._clock.sleep(INTERVAL_S)
            try:
                await self.seal_due()
            except HoldfastError as error:
                log.warning("audit records stay in the metadata store", code=error.code.name, why=error.message)

    async def seal_due(self) -> int:
        """Seal all that is old enough and return how many records are sealed now.

        Raises:
            HoldfastError: NOT_READY, NO_QUORUM or UNREACHABLE for now; CORRUPT if the metadata store holds other
                records than were signed.
        """
        await self._find_sealed()
        await self._tidy()
        size = (await load_head(self._store)).size
        while size - self._sealed >= AUDIT_SEGMENT_RECORDS + AUDIT_UNSEALED_RECORDS_MIN:
            await self._seal(self._sealed, size)
            await self._find_sealed()
            await self._tidy()
        self._metrics.unsealed(size - self._sealed)
        return self._sealed

    async def _find_sealed(self) -> None:
        """Look for segments behind those that are known."""
        more = True
        while more:
            after = keyspace.audit_segment(self._sealed - AUDIT_SEGMENT_RECORDS) if self._sealed else ""
            page = await self._store.page(keyspace.AUDIT_SEGMENTS_PREFIX, after=after, limit=_PAGE_ITEMS)
            for item in page.items:
                segment = parse(item, AuditSegment).message
                self._sealed = segment.first + segment.count
            more = page.more

    async def _seal(self, first: int, size: int) -> None:
        batches = await self._reader.area(first, size)
        before = tree = await self._reader.frontier(first)
        for batch in batches:
            tree = tree.extended(map(leaf_hash, batch.lines))
            if (tree.size, tree.root) != (batch.head.size, batch.head.root):
                raise HoldfastError(
                    ErrorCode.CORRUPT,
                    f"the metadata store holds other records than were signed, between {batch.first} and "
                    f"{tree.size - 1} or before; export and verify the log",
                    facts={"sequence": str(batch.first)},
                )
        leaves = [leaf_hash(line) for batch in batches for line in batch.lines]
        content = AuditSegmentContent(batches=batches)
        # Nothing reaches the blocks before they are recorded. If a collection begins in between, the record is refused,
        # and the next round puts them again, under its epoch (docs/healing.md).
        collection_epoch, same_epoch = await present_epoch(self._store)
        block_ids, key_epoch = await self._blocks.write(content, collection_epoch=collection_epoch)
        segment = AuditSegment(
            first=before.size,
            count=AUDIT_SEGMENT_RECORDS,
            root=Frontier().extended(leaves).root,
            block_ids=block_ids,
            key_epoch=key_epoch,
            last_unix_ms=batches[-1].head.time_unix_ms,
        )
        if await self._blocks.read(segment) != content:
            raise HoldfastError(ErrorCode.CORRUPT, f"the segment of records {first} on reads back as something else")
        key = keyspace.audit_segment(first)
        # Refused or lost: somebody else made it, or a collection began, or the next look tells.
        await attempt(self._store, [Absent(key), same_epoch], [Put(key, segment.SerializeToString())])
        self._metrics.sealed()

    async def _tidy(self) -> None:
        """Delete batches that segments hold, also those of a coordinator that died before it could."""
        bound = keyspace.audit_batch(self._sealed)
        while self._tidied != self._sealed:
            page = await self._store.page(keyspace.AUDIT_BATCHES_PREFIX, after="", limit=_DELETIONS)
            old = [item.key for item in page.items if item.key < bound]
            if not old:
                self._tidied = self._sealed
                return
            last = keyspace.audit_segment(self._sealed - AUDIT_SEGMENT_RECORDS)
            await attempt(self._store, [Exists(last)], [Delete(key) for key in old])
