"""Change hints: which blocks of a volume have to be read, and what of its parent is kept without looking.

A hint is used for one thing alone: not to read what a tracker calls unchanged since exactly the parent. Whatever is
doubtful counts as changed; without a hint, everything does.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, bisect_right
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Final

from holdfast.descriptors import Extent
from holdfast.index import DAMAGE, LEAVES_PER_FETCH, IndexReader, block_count_of
from holdfast.sources import TrackingSource, VolumeSource
from holdfast.sources.told import ToldChanges
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree import ChangedWalk, Place, VolumeLeaf, decode_volume_leaf, volume_height
from holdfast_core.model.tree.shape import leaf_count
from holdfast_core.model.tree.walk import VolumeRef, volume_children
from holdfast_proto.v1.records_pb2 import VolumeRecord

_NODES_KEPT_MAX: Final = 1024

BlockRange = tuple[int, int]
"""First position, and the position behind the last."""


class BlockRanges:
    """A set of block positions, as ranges that are disjoint, ascending and do not touch."""

    __slots__ = ("_ends", "_starts")

    def __init__(self, ranges: Iterable[BlockRange] = ()) -> None:
        """Take ranges in any order, overlapping or not; empty ones are dropped."""
        self._starts: list[int] = []
        self._ends: list[int] = []
        for first, end in sorted(ranges):
            if first >= end:
                continue
            if self._ends and first <= self._ends[-1]:
                self._ends[-1] = max(self._ends[-1], end)
            else:
                self._starts.append(first)
                self._ends.append(end)

    def __iter__(self) -> Iterator[BlockRange]:
        """Iterate over the ranges."""
        return zip(self._starts, self._ends, strict=True)

    def __eq__(self, other: object) -> bool:
        """Tell whether the positions are the same."""
        return isinstance(other, BlockRanges) and (self._starts, self._ends) == (other._starts, other._ends)

    __hash__ = None  # type: ignore[assignment]

    def count(self) -> int:
        """Return the number of positions."""
        return sum(self._ends) - sum(self._starts)

    def intersects(self, first: int, end: int) -> bool:
        """Tell whether any position lies from `first` to before `end`."""
        at = bisect_right(self._ends, first)
        return at < len(self._starts) and self._starts[at] < end

    def within(self, first: int, end: int) -> list[BlockRange]:
        """Return the ranges from `first` to before `end`, cut there."""
        begin, stop = bisect_right(self._ends, first), bisect_left(self._starts, end)
        return [(max(first, self._starts[at]), min(end, self._ends[at])) for at in range(begin, stop)]


@dataclass(frozen=True, slots=True)
class Hint:
    """What a tracker says of a volume.

    Attributes:
        extents: what changed since the parent; None where nobody can tell.
        why_not: why, as a phrase; empty where there is a hint, and where there is nothing that could give one.
    """

    extents: Sequence[Extent] | None = None
    why_not: str = ""


def hint_of(name: str, source: VolumeSource, told: ToldChanges | None, parent_id: str) -> Hint:
    """Ask for what changed since the parent: first what the caller told, then the source. Blocks.

    Raises:
        HoldfastError: what the source raises.
    """
    if not parent_id:
        return Hint()
    why_not = ""
    extents = told.of(name) if told is not None else None
    if told is not None and extents is not None:
        if told.since == parent_id:
            return Hint(extents)
        why_not = f"the changes that were told are since {told.since}, and the parent is {parent_id}"
    extents = source.changed_since(parent_id)
    if extents is None and not why_not and isinstance(source, TrackingSource):
        why_not = source.why_unknown()
    return Hint(extents, "" if extents is not None else why_not)


def changed_blocks(extents: Iterable[Extent], parent: VolumeRecord, size_bytes: int) -> BlockRanges:
    """Return the positions that count as changed: all that a hint touches, and everything from the smaller end on.

    Positions may lie beyond the end of either volume where their sizes differ.
    """
    block_bytes = parent.block_bytes
    ranges = [
        (extent.start // block_bytes, -(-min(extent.end, size_bytes) // block_bytes))
        for extent in extents
        if extent.start < min(extent.end, size_bytes)
    ]
    if parent.size_bytes != size_bytes:
        larger = max(parent.size_bytes, size_bytes)
        ranges.append((min(parent.size_bytes, size_bytes) // block_bytes, -(-larger // block_bytes)))
    return BlockRanges(ranges)


class ChangedPart:
    """A volume as far as it changed: what a span is sealed from when the rest of it is kept.

    Attributes:
        changed: positions that count as changed.
    """

    def __init__(self, source: VolumeSource, changed: BlockRanges, block_bytes: int) -> None:
        """Bind to a volume."""
        self._source = source
        self.changed = changed
        self._block_bytes = block_bytes

    @property
    def size_bytes(self) -> int:
        """Size of the whole volume."""
        return self._source.size_bytes

    def allocated(self, start: int, end: int) -> list[Extent]:
        """Return what is allocated and counts as changed."""
        block_bytes = self._block_bytes
        changed = self.changed.within(start // block_bytes, -(-end // block_bytes))
        if not changed:
            return []
        extents = self._source.allocated(start, end)
        return list(_common(extents, [Extent(low * block_bytes, high * block_bytes) for low, high in changed]))

    def slots(self, leaf_index: int) -> list[tuple[int, int]]:
        """Return the slots of a leaf that count as changed, as ranges."""
        offset = leaf_index * TREE_FAN_OUT
        return [(first - offset, end - offset) for first, end in self.changed.within(offset, offset + TREE_FAN_OUT)]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read the volume."""
        self._source.read_into(offset, buffer)


def _common(some: Sequence[Extent], others: Sequence[Extent]) -> Iterator[Extent]:
    """Yield what two ascending lists have in common."""
    at = 0
    for extent in some:
        while at < len(others) and others[at].end <= extent.start:
            at += 1
        upcoming = at
        while upcoming < len(others) and others[upcoming].start < extent.end:
            other = others[upcoming]
            yield Extent(max(extent.start, other.start), min(extent.end, other.end))
            upcoming += 1


class IndexDamaged(Exception):
    """The parent's index cannot be read where the hint touches it, so that there is nothing to keep.

    Attributes:
        block_ids: the nodes.
    """

    def __init__(self, block_ids: tuple[bytes, ...]) -> None:
        """Take the ids of the nodes."""
        super().__init__("the parent's index is damaged")
        self.block_ids = block_ids


class ParentIndex:
    """The parent's index of one volume: fetches nodes, and calls damage by its name.

    What has been fetched is kept up to a bound: a sample and the reading after it go the same ways down the tree.

    Attributes:
        record: the parent's volume.
        block_count: its number of positions.
    """

    def __init__(self, index: IndexReader, record: VolumeRecord, damaged: Collection[bytes]) -> None:
        """Bind to a volume; `damaged` are ids under it that are known to be damaged."""
        self.record = record
        self.block_count = block_count_of(record)
        self.damaged = damaged
        self._index = index
        self._kept: dict[bytes, bytes] = {}

    def root(self) -> list[VolumeRef]:
        """Return the root, or nothing where all is zero."""
        return [VolumeRef(volume_height(self.block_count), 0, self.record.root)] if self.record.root else []

    async def nodes(self, ids: Iterable[bytes]) -> dict[bytes, bytes]:
        """Return plaintexts by id.

        Raises:
            IndexDamaged: one is known to be damaged, or turns out so.
            HoldfastError: UNREACHABLE.
        """
        wanted = list(dict.fromkeys(ids))
        if self.damaged and (known := tuple(node_id for node_id in wanted if node_id in self.damaged)):
            raise IndexDamaged(known)
        missing = [node_id for node_id in wanted if node_id not in self._kept]
        found = {node_id: self._kept[node_id] for node_id in wanted if node_id in self._kept}
        if missing:
            try:
                fetched = await self._index.nodes(missing, what=f"the index of volume {self.record.name}")
            except HoldfastError as error:
                if error.code not in DAMAGE:
                    raise
                raise IndexDamaged(error.block_ids) from error
            if len(self._kept) + len(fetched) <= _NODES_KEPT_MAX:
                self._kept.update(fetched)
            found.update(fetched)
        return found

    def children(self, ref: VolumeRef, plain: bytes) -> list[VolumeRef]:
        """Return the children of an inner node; IndexDamaged if it is malformed."""
        with _naming_damage():
            return volume_children(ref, plain, leaf_count(self.block_count))

    def leaf(self, ref: VolumeRef, plain: bytes) -> VolumeLeaf:
        """Return a leaf; IndexDamaged if it is malformed."""
        with _naming_damage():
            return decode_volume_leaf(ref.node_id, plain, leaf_index=ref.place, block_count_total=self.block_count)

    def feed(self, walk: ChangedWalk, nodes: Mapping[bytes, bytes]) -> None:
        """Feed a walk of this tree; IndexDamaged if a node is malformed."""
        with _naming_damage():
            walk.feed(nodes)


@contextmanager
def _naming_damage() -> Iterator[None]:
    try:
        yield
    except HoldfastError as error:
        if error.code is not ErrorCode.CORRUPT:
            raise
        raise IndexDamaged(error.block_ids) from error


@dataclass(frozen=True, slots=True)
class ParentPlace:
    """A place of the parent's tree; `leaf` is None where the whole subtree is kept."""

    place: Place
    leaf: VolumeLeaf | None


async def parent_places(
    parent: ParentIndex, *, size_bytes: int, changed: BlockRanges
) -> AsyncGenerator[ParentPlace, None]:
    """Yield the places of the parent's tree in order; leaves that are touched are fetched, one group ahead.

    Raises:
        IndexDamaged: a node that is needed is known to be damaged, or turns out so.
        HoldfastError: UNREACHABLE.
    """

    def touched(first_leaf: int, end_leaf: int) -> bool:
        return changed.intersects(first_leaf * TREE_FAN_OUT, end_leaf * TREE_FAN_OUT)

    blocks = -(-size_bytes // parent.record.block_bytes)
    walk = ChangedWalk(parent.record.root, parent.block_count, blocks, touched)
    async with aclosing(_groups(walk, parent)) as groups:
        async for group in groups:
            for place in group:
                yield place


async def damaged_positions(parent: ParentIndex) -> BlockRanges:
    """Return the positions of the parent whose entries name an id that is known to be damaged; reads all of its index.

    Raises:
        IndexDamaged: a node cannot be read.
        HoldfastError: UNREACHABLE.
    """
    found: list[BlockRange] = []
    everything = BlockRanges([(0, parent.block_count)])
    async with aclosing(parent_places(parent, size_bytes=parent.record.size_bytes, changed=everything)) as places:
        async for place in places:
            if place.leaf is not None:
                first = place.place.first_leaf * TREE_FAN_OUT
                found.extend((first + slot, first + slot + 1) for slot in _damaged_slots(place.leaf, parent.damaged))
    return BlockRanges(found)


def _damaged_slots(leaf: VolumeLeaf, damaged: Collection[bytes]) -> Iterator[int]:
    for slot, block_id, base_id in zip(leaf.slots, leaf.block_ids, leaf.base_ids, strict=True):
        if block_id in damaged or base_id in damaged:
            yield slot


async def _groups(walk: ChangedWalk, parent: ParentIndex) -> AsyncGenerator[list[ParentPlace], None]:
    """Yield places in groups of so many leaves as are fetched at once; the next group is fetched while one is used."""
    ahead: asyncio.Task[list[ParentPlace]] | None = None
    waiting: list[Place] = []
    try:
        while True:
            while sum(place.touched for place in waiting) < LEAVES_PER_FETCH and not walk.done:
                parent.feed(walk, await parent.nodes(walk.wanted()))
                waiting.extend(walk.take())
            waiting.extend(walk.take())
            count = _group_length(waiting)
            group, waiting = waiting[:count], waiting[count:]
            upcoming = asyncio.create_task(_leaves(parent, group)) if group else None
            current, ahead = ahead, upcoming
            if current is not None:
                yield await current
            if upcoming is None:
                return
    finally:
        if ahead is not None and not ahead.done():
            ahead.cancel()
            await asyncio.wait([ahead])


async def _leaves(parent: ParentIndex, group: Sequence[Place]) -> list[ParentPlace]:
    plain = await parent.nodes(place.ref.node_id for place in group if place.touched)
    return [
        ParentPlace(place, parent.leaf(place.ref, plain[place.ref.node_id]) if place.touched else None)
        for place in group
    ]


def _group_length(places: Sequence[Place]) -> int:
    """Return how many places make a group: no more leaves than are fetched at once."""
    leaves = 0
    for at, place in enumerate(places):
        leaves += place.touched
        if leaves > LEAVES_PER_FETCH:
            return at
    return len(places)
