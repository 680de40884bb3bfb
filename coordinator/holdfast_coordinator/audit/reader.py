"""Reading the audit log: records, heads and proofs, wherever the records are.

The log is read in areas of 4,096 records that begin at multiples of as many. An area is a complete subtree of the
Merkle tree, and is either a sealed segment, whose root is known without reading it, or a run of batches in the metadata
store. While it moves from one to the other it is both; the segment counts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Sequence
from typing import Final, Protocol

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.head import Head, load_head
from holdfast_coordinator.records import load, parse
from holdfast_core.model.audit.merkle import Frontier, Range, complete_subtrees, leaf_hash, tree_root
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import AUDIT_SEGMENT_RECORDS
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1.audit_pb2 import AuditBatch, AuditKey, AuditSegment, AuditSegmentContent, SignedHead
from holdfast_proto.v1.records_pb2 import WrappedSecret

_PAGE_ITEMS: Final = 256
# Opened segments that are kept; about 2 MiB each.
_SEGMENTS_KEPT: Final = 2
# An area that is being sealed while it is read is found whole at the second look.
_LOOKS_MAX: Final = 3


class SegmentSource(Protocol):
    """Where sealed segments are read from."""

    async def read(self, segment: AuditSegment) -> AuditSegmentContent:
        """Return what a segment holds."""
        ...


def area_of(sequence: int) -> int:
    """Return where the area of a record begins."""
    return sequence - sequence % AUDIT_SEGMENT_RECORDS


class AuditReader:
    """Reads the log of one cluster. Belongs to one event loop; calls may overlap.

    Everything raises UNREACHABLE as the store, and CORRUPT, MISSING or UNREACHABLE for blocks of segments.
    """

    def __init__(self, store: MetadataStore, segments: SegmentSource) -> None:
        """Bind to the metadata store and to where old records are."""
        self._store = store
        self._segments = segments
        self._kept: OrderedDict[int, Sequence[AuditBatch]] = OrderedDict()

    async def head(self) -> Head:
        """Return the newest head. Raises CORRUPT if its parts do not fit together."""
        return await load_head(self._store)

    async def keys(self) -> list[AuditKey]:
        """Return the public halves of all keys that heads were ever signed with, oldest first."""
        items = (await self._store.snapshot([keyspace.AUDIT_KEYS_PREFIX])).items
        return [
            AuditKey(
                key_id=item.key.removeprefix(keyspace.AUDIT_KEYS_PREFIX),
                public_key=parse(item, WrappedSecret).message.public_key,
            )
            for item in sorted(items, key=lambda item: item.create_revision)
        ]

    async def segment(self, first: int) -> AuditSegment | None:
        """Return the sealed segment that begins there, None if that area is not sealed."""
        stored = await load(self._store, keyspace.audit_segment(first), AuditSegment)
        return None if stored is None else stored.message

    async def area(self, first: int, size: int) -> Sequence[AuditBatch]:
        """Return the batches of the area that begins at `first`, as far as a log of `size` records has it.

        Raises:
            HoldfastError: CORRUPT if records are missing that the log must have.
        """
        end = min(first + AUDIT_SEGMENT_RECORDS, size)
        for _ in range(_LOOKS_MAX):
            batches = await self._sealed(first)
            if batches is None:
                batches = await self._unsealed(first, end)
            batches = [batch for batch in batches if batch.first < end]
            if _covers(batches, first, end):
                return batches
        raise HoldfastError(
            ErrorCode.CORRUPT, f"the metadata store lacks records of the audit log between {first} and {end - 1}"
        )

    async def batches(self, first: int, size: int) -> AsyncIterator[AuditBatch]:
        """Yield the batches of a log of `size` records, beginning with the one that record `first` is in."""
        for start in range(area_of(first), size, AUDIT_SEGMENT_RECORDS):
            for batch in await self.area(start, size):
                if batch.first + len(batch.lines) > first:
                    yield batch

    async def batch_of(self, sequence: int, size: int) -> AuditBatch:
        """Return the batch that a record of a log of `size` records is in.

        Raises:
            HoldfastError: NOT_FOUND if the log has no such record.
        """
        if not 0 <= sequence < size:
            raise HoldfastError(
                ErrorCode.NOT_FOUND,
                f"the audit log has {size} records, counted from 0, and none with number {sequence}",
            )
        area = await self.area(area_of(sequence), size)
        return next(batch for batch in reversed(area) if batch.first <= sequence)

    async def head_at(self, size: int) -> SignedHead | None:
        """Return the head that was signed at just this size of the log, None if there is none."""
        newest = await self.head()
        if not 0 < size <= newest.size:
            return None
        batch = await self.batch_of(size - 1, newest.size)
        return batch.head if batch.head.size == size else None

    async def frontier(self, size: int) -> Frontier:
        """Return the tree over the first `size` records."""
        roots = _Roots(self)
        return Frontier(size, tuple([await roots.subtree(*each) for each in complete_subtrees(0, size)]))

    async def path(self, ranges: Sequence[Range]) -> list[bytes]:
        """Return the roots over these ranges of records: the hashes of a proof."""
        roots = _Roots(self)
        found = {each: await roots.subtree(*each) for span in ranges for each in complete_subtrees(*span)}
        return [tree_root(start, end, lambda *each: found[each]) for start, end in ranges]

    async def _sealed(self, first: int) -> Sequence[AuditBatch] | None:
        kept = self._kept.get(first)
        if kept is not None:
            self._kept.move_to_end(first)
            return kept
        segment = await self.segment(first)
        if segment is None:
            return None
        batches = tuple((await self._segments.read(segment)).batches)
        self._kept[first] = batches
        while len(self._kept) > _SEGMENTS_KEPT:
            self._kept.popitem(last=False)
        return batches

    async def _unsealed(self, first: int, end: int) -> Sequence[AuditBatch]:
        batches: list[AuditBatch] = []
        after = keyspace.audit_batch(first - 1) if first else ""
        while True:
            page = await self._store.page(keyspace.AUDIT_BATCHES_PREFIX, after=after, limit=_PAGE_ITEMS)
            for item in page.items:
                if item.key >= keyspace.audit_batch(end):
                    return batches
                batches.append(parse(item, AuditBatch).message)
                after = item.key
            if not page.more:
                return batches


class _Roots:
    """Roots of complete subtrees for one proof; an area is read once at most."""

    def __init__(self, reader: AuditReader) -> None:
        self._reader = reader
        self._leaves: dict[int, list[bytes]] = {}

    async def subtree(self, start: int, end: int) -> bytes:
        """Return the root over a complete subtree."""
        if end - start < AUDIT_SEGMENT_RECORDS:
            area = area_of(start)
            leaves = await self._leaves_of(area, end)
            return Frontier().extended(leaves[start - area : end - area]).root
        areas = range(start, end, AUDIT_SEGMENT_RECORDS)
        # The roots of the areas stand in the tree above them as leaves do in a tree.
        return Frontier().extended([await self._area(first) for first in areas]).root

    async def _area(self, first: int) -> bytes:
        segment = await self._reader.segment(first)
        if segment is not None:
            return segment.root
        leaves = await self._leaves_of(first, first + AUDIT_SEGMENT_RECORDS)
        return Frontier().extended(leaves).root

    async def _leaves_of(self, area: int, end: int) -> list[bytes]:
        leaves = self._leaves.get(area, [])
        if len(leaves) < end - area:
            size = (await self._reader.head()).size
            batches = await self._reader.area(area, size)
            leaves = self._leaves[area] = [leaf_hash(line) for batch in batches for line in batch.lines]
        return leaves


def _covers(batches: Sequence[AuditBatch], first: int, end: int) -> bool:
    at = first
    for batch in batches:
        if batch.first != at:
            return False
        at += len(batch.lines)
    return at >= end
