"""Listing what a store holds in pages, over all partitions or a range of them."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast_storagenode.store import BlockEntry, BlockStore


@dataclass(frozen=True, slots=True)
class ScanPart:
    """What is left to list: from `partition` on to below `end`, or all where it is None, above the id `after`."""

    partition: int | None
    end: int
    after: bytes


def scan_part(
    store: BlockStore, tenant: int, part: ScanPart, *, limit: int
) -> tuple[list[BlockEntry], ScanPart | None]:
    """List up to `limit` entries of a part; return them and what is left, None where that is nothing."""
    if part.partition is None:
        entries = store.scan(tenant, partition=None, after=part.after, limit=limit)
        return entries, ScanPart(None, 0, entries[-1].block_id) if len(entries) == limit else None
    listed: list[BlockEntry] = []
    after = part.after
    for partition in range(part.partition, part.end):
        wanted = limit - len(listed)
        entries = store.scan(tenant, partition=partition, after=after, limit=wanted)
        listed.extend(entries)
        if len(entries) == wanted:
            return listed, ScanPart(partition, part.end, entries[-1].block_id)
        after = b""
    return listed, None
