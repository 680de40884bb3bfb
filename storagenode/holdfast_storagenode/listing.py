"""Listing what a store holds in pages, over all partitions or a range of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from holdfast_storagenode.store import BlockEntry, BlockStore


@dataclass(frozen=True, slots=True)
class ScanPart:
    """What is left to list: from `partition` on to below `end`, or all where it is None, above the id `after`.

    `with_quarantined` says whether copies that are set aside as corrupt are listed, too.
    """

    partition: int | None
    end: int
    after: bytes
    with_quarantined: bool = False


def scan_part(
    store: BlockStore, tenant: int, part: ScanPart, *, limit: int
) -> tuple[list[BlockEntry], ScanPart | None]:
    """List up to `limit` entries of a part; return them and what is left, None where that is nothing."""
    scan = partial(store.scan, tenant, with_quarantined=part.with_quarantined)
    if part.partition is None:
        entries = scan(partition=None, after=part.after, limit=limit)
        return entries, replace(part, after=entries[-1].block_id) if len(entries) == limit else None
    listed: list[BlockEntry] = []
    after = part.after
    for partition in range(part.partition, part.end):
        wanted = limit - len(listed)
        entries = scan(partition=partition, after=after, limit=wanted)
        listed.extend(entries)
        if len(entries) == wanted:
            return listed, replace(part, partition=partition, after=entries[-1].block_id)
        after = b""
    return listed, None
