"""What is to be done with what nodes list: marks and listings in, plans out. Pure.

A copy that nothing reaches is garbage if its stamp lies below the cut-off, and young otherwise, whole or corrupt. The
node decides in the end: a stamp that came after its listing keeps a block. A corrupt copy of what is reached is let be,
and counts as not there: repair replaces it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from holdfast_core.model.layout import Layout


@dataclass(frozen=True, slots=True)
class ListedPage:
    """Part of what a node holds of one tenant, in order of partitions, then ids.

    Attributes:
        block_ids: ids.
        lengths: sealed bytes of each.
        stamps: collection epoch that each counts as stamped with.
        quarantined: those of the ids whose copies are set aside as corrupt.
    """

    block_ids: Sequence[bytes]
    lengths: Sequence[int]
    stamps: Sequence[int]
    quarantined: Set[bytes] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class PagePlan:
    """What is to be done with one page.

    Attributes:
        garbage: ids of copies to delete.
        garbage_lengths: their sealed bytes, one by one.
        young_copies, young_bytes: what nothing reaches and is too young.
        held: marked ids that the page lists whole copies of.
    """

    garbage: tuple[bytes, ...]
    garbage_lengths: tuple[int, ...]
    young_copies: int
    young_bytes: int
    held: frozenset[bytes]


def plan_page(page: ListedPage, marks: Set[bytes], *, cutoff: int) -> PagePlan:
    """Compare a page with all marks of its partitions."""
    reached = frozenset(marks & set(page.block_ids))
    held = reached - page.quarantined
    if len(reached) == len(page.block_ids):
        return PagePlan(garbage=(), garbage_lengths=(), young_copies=0, young_bytes=0, held=held)
    garbage: list[bytes] = []
    lengths: list[int] = []
    young_copies = young_bytes = 0
    for block_id, length, stamp in zip(page.block_ids, page.lengths, page.stamps, strict=True):
        if block_id in reached:
            continue
        if stamp < cutoff:
            garbage.append(block_id)
            lengths.append(length)
        else:
            young_copies += 1
            young_bytes += length
    return PagePlan(
        garbage=tuple(garbage),
        garbage_lengths=tuple(lengths),
        young_copies=young_copies,
        young_bytes=young_bytes,
        held=held,
    )


@dataclass(frozen=True, slots=True)
class CopiesPlan:
    """How copies of marked blocks stand in some partitions.

    Attributes:
        thin: blocks that fewer owners list than the layout has, in partitions all of whose owners answered.
        nowhere: ids that no node lists; they may be lost only if every node answered.
    """

    thin: int
    nowhere: tuple[bytes, ...]


def plan_copies(marks: Mapping[int, Set[bytes]], held: Mapping[str, Set[bytes]], newest: Layout) -> CopiesPlan:
    """Compare marks by partition with what each node that answered lists of them."""
    thin = 0
    nowhere: list[bytes] = []
    for partition, ids in marks.items():
        owners = newest.owners_of(partition)
        if all(owner in held for owner in owners):
            lacked: set[bytes] = set()
            for owner in owners:
                lacked |= ids - held[owner]
            thin += len(lacked)
            candidates = lacked
        else:
            candidates = set(ids)
        nowhere.extend(candidates.difference(*held.values()))
    return CopiesPlan(thin, tuple(nowhere))


def plan_ranges(counts: Sequence[int], *, marks_max: int) -> list[tuple[int, int]]:
    """Divide partitions, each of which has so many marks, into ranges (first, end) of at most `marks_max` or of one."""
    ranges: list[tuple[int, int]] = []
    first = total = 0
    for partition, count in enumerate(counts):
        if partition > first and total + count > marks_max:
            ranges.append((first, partition))
            first, total = partition, 0
        total += count
    ranges.append((first, len(counts)))
    return ranges
