"""Where every block is now: the checkpointed index under an overlay of what was committed since.

Readers look without a lock, newest first: the active overlay, the one that is being checkpointed, the index. That order
never misses an entry, because an overlay is dropped only after the index holds what it says. Writers hold the engine's
lock. Invariant: the overlays and the index together say exactly what a replay of the log would.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Final, NamedTuple

from holdfast_storagenode.segments.holdings import HoldingsBook
from holdfast_storagenode.segments.index import Checkpoint, Entry, Index, IndexView, partition_range
from holdfast_storagenode.segments.overlay import Overlay
from holdfast_storagenode.segments.record import RECORD_HEADER_BYTES, RecordHeader, RecordType

# Bound once: nearly every record is one, and to name a member of an enumeration costs more than to compare it.
_BLOCK: Final = RecordType.BLOCK
# A listing asks the index for at least so many entries at once.
_PAGE_ENTRIES: Final = 64


@dataclass(slots=True)
class Totals:
    """Sums over the table: blocks held, those of them quarantined, living bytes (whole records) by segment, tenants.

    `tenants` has the count of blocks held of each.
    """

    block_count: int
    quarantined_count: int
    live_bytes: dict[int, int]
    tenants: dict[int, int]


class Placed(NamedTuple):
    """What a record in the log says of one key: the key, the header, and where it begins.

    `intact` is false for a damaged block. A record of stamps makes one of these for each block that it names.
    """

    key: bytes
    header: RecordHeader
    segment: int
    offset: int
    intact: bool = True


class BlockTable:
    """Entries by key. See the module for who may call what."""

    def __init__(self, index: Index) -> None:
        self._index = index
        # The active overlay, and the one that is being checkpointed: one value, so that readers never see half a swap.
        self._overlays = (Overlay(), Overlay())
        self.holdings = HoldingsBook()
        checkpoint = index.checkpoint()
        self.totals = (
            Totals(0, 0, {}, {})
            if checkpoint is None
            else Totals(
                checkpoint.block_count,
                checkpoint.quarantined_count,
                dict(checkpoint.live_bytes),
                dict(checkpoint.tenants),
            )
        )

    @property
    def overlay_entries(self) -> int:
        """Entries that the next checkpoint will write."""
        return len(self._overlays[0].entries)

    def lookup(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return each key's entry, None where there is no block. Needs no lock.

        Raises:
            IndexDamagedError: the index cannot be trusted.
        """
        active, frozen = (overlay.entries for overlay in self._overlays)
        if active.keys().isdisjoint(keys) and frozen.keys().isdisjoint(keys):
            # What a first snapshot asks of every block.
            return self._index.get_many(keys)
        found: list[Entry | None] = []
        absent: list[int] = []
        for at, key in enumerate(keys):
            if key in active:
                found.append(active[key])
            elif key in frozen:
                found.append(frozen[key])
            else:
                absent.append(at)
                found.append(None)
        if absent:
            for at, entry in zip(absent, self._index.get_many([keys[at] for at in absent]), strict=True):
                found[at] = entry
        return found

    def range(
        self, low: bytes, high: bytes, limit: int, *, with_quarantined: bool = False
    ) -> list[tuple[bytes, Entry]]:
        """Return up to `limit` (key, entry) with `low` <= key < `high`, ascending: whole copies, or all.

        Call it under the lock: a checkpoint that ends meanwhile would hide what it wrote.

        Raises:
            IndexDamagedError: the index cannot be trusted.
        """
        listed: list[tuple[bytes, Entry]] = []
        page = max(limit, _PAGE_ENTRIES)
        while len(listed) < limit and low < high:
            stored = self._index.range(low, high, page)
            # What was removed since leaves places free, and the next turn fills them.
            end = high if len(stored) < page else stored[-1][0] + b"\0"
            changes = self._changes(low, end)
            kept = (item for item in stored if item[0] not in changes)
            added = sorted((key, entry) for key, entry in changes.items() if entry is not None)
            merged = heapq.merge(kept, added)
            listed.extend(merged if with_quarantined else (item for item in merged if not item[1].quarantined))
            low = end
        return listed[:limit]

    @contextmanager
    def whole_keys(self, partition: int) -> Iterator[Iterable[bytes]]:
        """Lend the keys of a partition's whole copies as they are now. Enter it under the lock, read without.

        Raises:
            IndexDamagedError: the index cannot be trusted.
        """
        ranges = [partition_range(tenant, partition) for tenant in self.totals.tenants]
        changes: dict[bytes, Entry | None] = {}
        for low, high in ranges:
            changes.update(self._changes(low, high))
        with self._index.view() as view:
            yield _whole(view, ranges, changes)

    def quarantined(self, limit: int) -> list[bytes]:
        """Return the keys of up to `limit` copies that are set aside, ascending. Call it under the lock.

        Raises:
            IndexDamagedError: the index cannot be trusted.
        """
        if not self.totals.quarantined_count:
            return []
        active, frozen = self._overlays
        changes = {**frozen.entries, **active.entries}
        added = sorted(key for key, entry in changes.items() if entry is not None and entry.quarantined)
        with self._index.view() as view:
            kept = (key for key in view.set_aside() if key not in changes)
            return list(islice(heapq.merge(kept, added), limit))

    def apply(self, records: Sequence[Placed]) -> None:
        """Take over records in the order of the log. Call it under the lock."""
        bases = self.lookup([record.key for record in records])
        active = self._overlays[0]
        changed_before = active.entries.get
        for record, base in zip(records, bases, strict=True):
            current = changed_before(record.key, base)
            changed, entry = _next_entry(record, current)
            if changed:
                active.set(record.key, entry)
                if current is not None:
                    self._count(record, current, -1)
                if entry is not None:
                    self._count(record, entry, +1)

    def freeze(self, segment: int, offset: int) -> tuple[Iterable[tuple[bytes, Entry | None]], Checkpoint]:
        """Set the overlay aside and return it with the checkpoint that it makes. Call it under the lock.

        `segment` and `offset` are the end of the log. Only one overlay is set aside at a time: `thaw` ends that.
        """
        active, frozen = self._overlays
        if frozen.entries:
            raise RuntimeError("the last overlay has not been written yet")
        self._overlays = (Overlay(), active)
        totals = self.totals
        return active.entries.items(), Checkpoint(
            segment=segment,
            offset=offset,
            block_count=totals.block_count,
            quarantined_count=totals.quarantined_count,
            live_bytes=dict(totals.live_bytes),
            tenants=dict(totals.tenants),
        )

    def thaw(self, *, written: bool) -> None:
        """Drop the overlay that was set aside, or take it back where the index did not take it. Under the lock."""
        active, frozen = self._overlays
        self._overlays = (active if written else frozen.below(active), Overlay())

    def _changes(self, low: bytes, high: bytes) -> dict[bytes, Entry | None]:
        """Return what was committed since the checkpoint with `low` <= key < `high`, None for what is gone."""
        active, frozen = self._overlays
        return {key: overlay.entries[key] for overlay in (frozen, active) for key in overlay.between(low, high)}

    def _count(self, record: Placed, entry: Entry, sign: int) -> None:
        """Add an entry to the sums (+1) or take it off them (-1)."""
        totals = self.totals
        totals.block_count += sign
        live_bytes, segment = totals.live_bytes, entry.segment
        live = live_bytes.get(segment, 0) + sign * (RECORD_HEADER_BYTES + entry.length)
        live_bytes[segment] = live
        if live == 0:
            del live_bytes[segment]
        tenants, tenant = totals.tenants, record.header.tenant
        held = tenants.get(tenant, 0) + sign
        tenants[tenant] = held
        if held == 0:
            del tenants[tenant]
        if entry.quarantined:
            totals.quarantined_count += sign
        elif self.holdings.partitions:
            self.holdings.note(record.key, sign)


def _whole(
    view: IndexView, ranges: Sequence[tuple[bytes, bytes]], changes: Mapping[bytes, Entry | None]
) -> Iterator[bytes]:
    for low, high in ranges:
        for key, entry in view.range(low, high, None):
            if key not in changes and not entry.quarantined:
                yield key
    for key, changed in changes.items():
        if changed is not None and not changed.quarantined:
            yield key


def _next_entry(record: Placed, current: Entry | None) -> tuple[bool, Entry | None]:
    """Return whether `record` changes the entry of its key, and to what. The one place that says what records mean."""
    header = record.header
    # Stamps never go back while there is a block, whatever copy of it is the one in use.
    stamp = header.stamp if current is None else max(header.stamp, current.stamp)
    if header.type is _BLOCK and record.intact:
        return True, Entry(record.segment, record.offset, header.length, header.kind, False, stamp)
    if header.type is RecordType.TOMBSTONE:
        return current is not None, None
    if header.type is RecordType.STAMP:
        if current is None or stamp == current.stamp:
            return False, current
        return True, current._replace(stamp=stamp)
    if header.type is RecordType.QUARANTINE:
        named = current is not None and (current.segment, current.offset) == (
            header.target_segment,
            header.target_offset,
        )
        if current is None or not named or current.quarantined:
            return False, current
        return True, current._replace(quarantined=True)
    # A corrupt copy that was moved, or a block whose bytes are damaged.
    if header.type is _BLOCK and current is not None and not current.quarantined:
        # Two copies stand in the log when compaction moved one: a damaged later copy never hides a whole earlier one.
        return stamp != current.stamp, current._replace(stamp=stamp)
    return True, Entry(record.segment, record.offset, header.length, header.kind, True, stamp)
