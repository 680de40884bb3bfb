"""Gives dead space back: what lives in a segment is appended to the log again, then the file is removed.

Copies are ordinary appends, decided under the same lock as every write, so that replaying the log gives the same
table. The file goes only when a durable checkpoint names nothing in it, and one with a gap stays, because a block
whose record cannot be found may still be read through the index. A crash at any step leaves the old copy, the new
one, or both.

Copies carry their block's stamp on. Records of stamps need no copy: the checkpoint holds what they said, and an index
that is made anew counts every block as stamped anew (`epochs`).

Tombstones must outlive every older copy of their block: one is carried on while the block is gone and an older segment
exists. Corrupt copies are carried on as what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.limits import MIB
from holdfast_storagenode.segments.committer import GroupCommitter, PendingRecord, Ticket
from holdfast_storagenode.segments.disk import Disk
from holdfast_storagenode.segments.files import SegmentFiles
from holdfast_storagenode.segments.index import make_key
from holdfast_storagenode.segments.observer import StoreObserver
from holdfast_storagenode.segments.record import FILE_HEADER_BYTES, RecordFormat, RecordHeader, RecordType
from holdfast_storagenode.segments.scan import Gap, Scanned, scan_segment
from holdfast_storagenode.segments.table import BlockTable
from holdfast_storagenode.store import PartitionOf

_COPY_BYTES: Final = 8 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """Everything that compaction works on. `checkpoint` returns whether the index took it."""

    files: SegmentFiles
    disk: Disk
    record_format: RecordFormat
    committer: GroupCommitter
    table: BlockTable
    partition_of: PartitionOf
    observer: StoreObserver
    checkpoint: Callable[[], bool]

    def choose(self, *, dead_fraction_min: float, passed_over: set[int]) -> int | None:
        """Return the finished segment with the most dead bytes, if they are at least this fraction of its records."""
        with self.committer.lock:
            active = self.committer.end[0]
            live = self.table.totals.live_bytes
            dead = {
                segment: size - FILE_HEADER_BYTES - live.get(segment, 0)
                for segment, size in self.committer.sizes.items()
                if segment != active and segment not in passed_over
            }
            sizes = dict(self.committer.sizes)
        worthy = [
            segment
            for segment, count in dead.items()
            if count >= dead_fraction_min * (sizes[segment] - FILE_HEADER_BYTES)
            and (count > 0 or sizes[segment] <= FILE_HEADER_BYTES)
        ]
        return max(worthy, key=lambda segment: dead[segment], default=None)

    def run(self, segment: int) -> int:
        """Move what lives in `segment` and remove it. Returns the bytes freed; 0 if it had to stay this time.

        Raises:
            HoldfastError: as a write; nothing is lost.
        """
        before = self.committer.sizes[segment]
        oldest = min(self.committer.sizes) == segment
        copied = 0
        batch: list[tuple[Scanned, bytes]] = []
        with self.files.reading(segment) as fd:
            for item in scan_segment(self.disk, fd, self.record_format, end=before):
                if isinstance(item, Gap):
                    return 0
                batch.append((item, bytes(item.payload)))
                if sum(len(payload) for _, payload in batch) >= _COPY_BYTES:
                    copied += self._copy(segment, batch, oldest=oldest)
                    batch.clear()
            copied += self._copy(segment, batch, oldest=oldest)
        if not self.checkpoint():
            return 0
        with self.committer.lock:
            if self.table.totals.live_bytes.get(segment, 0):
                return 0
            del self.committer.sizes[segment]
        self.files.remove(segment)
        freed = max(0, before - copied)
        self.observer.compacted(segment=segment, freed_bytes=freed)
        return freed

    def _copy(self, segment: int, batch: list[tuple[Scanned, bytes]], *, oldest: bool) -> int:
        """Append the records of `batch` that still count and wait until they are durable; return their bytes."""
        ticket = Ticket()
        records: list[PendingRecord] = []
        with self.committer.lock:
            self.committer.check_writable()
            for item, payload in batch:
                header = item.header
                if header.type is RecordType.STAMP:
                    continue
                key = make_key(header.tenant, self.partition_of(header.block_id), header.block_id)
                decided = self.committer.decided(key)
                if decided is not None:
                    # What is being written about this block may yet fail, so it is waited for before the file goes.
                    ticket.builds_on.append(decided)
                moved = self._moved(segment, item, key, oldest=oldest)
                if moved is not None:
                    records.append(PendingRecord(key, moved, payload))
            ticket.take(records)
            self.committer.enqueue(ticket)
        ticket.done.result()
        return ticket.size_bytes

    def _moved(self, segment: int, item: Scanned, key: bytes, *, oldest: bool) -> RecordHeader | None:
        """Return the header to append for a record, None if it no longer counts. Under the lock."""
        if self.committer.decided(key) is not None:
            return None
        header = item.header
        (entry,) = self.table.lookup([key])
        if header.type is RecordType.TOMBSTONE:
            return header if entry is None and not oldest else None
        if header.type is RecordType.QUARANTINE:
            named = entry is not None and (entry.segment, entry.offset) == (header.target_segment, header.target_offset)
            return header if named and header.target_segment != segment else None
        if entry is None or (entry.segment, entry.offset) != (segment, item.offset):
            return None
        sound = item.intact and not entry.quarantined
        stamping = self.committer.stamping(key)
        stamp = entry.stamp if stamping is None else max(entry.stamp, stamping.header.stamp)
        return header._replace(type=RecordType.BLOCK if sound else RecordType.CORRUPT_BLOCK, stamp=stamp)
