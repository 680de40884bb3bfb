"""Where every block is now: the checkpointed index under an overlay of what was committed since.

Readers look without a lock, newest first: the active overlay, the one that is being checkpointed, the index. That order
never misses an entry, because an overlay is dropped only after the index holds what it says. Writers hold the engine's
lock. Invariant: the overlays and the index together say exactly what a replay of the log would.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from holdfast_storagenode.segments.index import Checkpoint, Entry, Index
from holdfast_storagenode.segments.record import RECORD_HEADER_BYTES, RecordHeader, RecordType

# Bound once: nearly every record is one, and to name a member of an enumeration costs more than to compare it.
_BLOCK: Final = RecordType.BLOCK

Overlay = dict[bytes, Entry | None]


@dataclass(slots=True)
class Totals:
    """Sums over the table: blocks held, those of them quarantined, and living bytes (whole records) by segment."""

    block_count: int
    quarantined_count: int
    live_bytes: dict[int, int]


class Placed(NamedTuple):
    """A record that is in the log: its key, header, and where it begins. `intact` is false for a damaged block."""

    key: bytes
    header: RecordHeader
    segment: int
    offset: int
    intact: bool = True


class BlockTable:
    """Entries by key. See the module for who may call what."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._active: Overlay = {}
        self._frozen: Overlay = {}
        checkpoint = index.checkpoint()
        self.totals = (
            Totals(0, 0, {})
            if checkpoint is None
            else Totals(checkpoint.block_count, checkpoint.quarantined_count, dict(checkpoint.live_bytes))
        )

    @property
    def overlay_entries(self) -> int:
        """Entries that the next checkpoint will write."""
        return len(self._active)

    def lookup(self, keys: Sequence[bytes]) -> list[Entry | None]:
        """Return each key's entry, None where there is no block. Needs no lock.

        Raises:
            IndexDamagedError: the index cannot be trusted.
        """
        active, frozen = self._active, self._frozen
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

    def range(self, low: bytes, high: bytes, limit: int) -> list[tuple[bytes, Entry]]:
        """Return up to `limit` (key, entry) with `low` <= key < `high`, ascending.

        Call it under the lock: a checkpoint that ends meanwhile would hide what it wrote.
        """
        changes = {
            key: overlay[key] for overlay in (self._frozen, self._active) for key in overlay if low <= key < high
        }
        # Removed and replaced entries take places in the index's part, so ask it for that many more.
        stored = self._index.range(low, high, limit + len(changes))
        kept = (item for item in stored if item[0] not in changes)
        added = sorted((key, entry) for key, entry in changes.items() if entry is not None)
        return [item for item, _ in zip(heapq.merge(kept, added), range(limit), strict=False)]

    def apply(self, records: Sequence[Placed]) -> None:
        """Take over records in the order of the log. Call it under the lock."""
        bases = self.lookup([record.key for record in records])
        for record, base in zip(records, bases, strict=True):
            current = self._active.get(record.key, base)
            changed, entry = _next_entry(record, current)
            if changed:
                if current is not None:
                    self._count(current, -1)
                if entry is not None:
                    self._count(entry, +1)
                self._active[record.key] = entry

    def freeze(self, segment: int, offset: int) -> tuple[Iterable[tuple[bytes, Entry | None]], Checkpoint]:
        """Set the overlay aside and return it with the checkpoint that it makes. Call it under the lock.

        `segment` and `offset` are the end of the log. Only one overlay is set aside at a time: `thaw` ends that.
        """
        if self._frozen:
            raise RuntimeError("the last overlay has not been written yet")
        self._frozen, self._active = self._active, {}
        totals = self.totals
        return self._frozen.items(), Checkpoint(
            segment=segment,
            offset=offset,
            block_count=totals.block_count,
            quarantined_count=totals.quarantined_count,
            live_bytes=dict(totals.live_bytes),
        )

    def thaw(self, *, written: bool) -> None:
        """Drop the overlay that was set aside, or take it back where the index did not take it. Under the lock."""
        if not written:
            self._active = {**self._frozen, **self._active}
        self._frozen = {}

    def _count(self, entry: Entry, sign: int) -> None:
        totals = self.totals
        totals.block_count += sign
        totals.quarantined_count += sign * entry.quarantined
        live = totals.live_bytes.get(entry.segment, 0) + sign * (RECORD_HEADER_BYTES + entry.length)
        totals.live_bytes[entry.segment] = live
        if live == 0:
            del totals.live_bytes[entry.segment]


def _next_entry(record: Placed, current: Entry | None) -> tuple[bool, Entry | None]:
    """Return whether `record` changes the entry of its key, and to what. The one place that says what records mean."""
    header = record.header
    if header.type is _BLOCK and record.intact:
        return True, Entry(record.segment, record.offset, header.length, header.kind)
    if header.type is RecordType.TOMBSTONE:
        return current is not None, None
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
        return False, current
    return True, Entry(record.segment, record.offset, header.length, header.kind, quarantined=True)
