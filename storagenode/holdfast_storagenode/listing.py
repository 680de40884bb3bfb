"""Listing what a store holds in pages, over all partitions or a range of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    entries = store.scan(
        tenant,
        partition=part.partition,
        end=part.end if part.partition is not None else None,
        after=part.after,
        limit=limit,
        with_quarantined=part.with_quarantined,
    )
    return entries, replace(part, after=entries[-1].block_id) if len(entries) == limit else None
