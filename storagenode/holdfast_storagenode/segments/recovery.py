"""What happens at start: the index is judged, the log behind its checkpoint is read back and verified, a torn tail is
cut.

Everything that is read back is synced first and dropped from the page cache: after a process died, what it wrote may
be in memory only, and after a failed sync the memory may hold what the disk does not.

Stamps come back as they were, unless the index had to be made anew or records behind its checkpoint are damaged; then
it is noted, before anything else is written, that they are not known (`epochs`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast_storagenode.segments.disk import Disk
from holdfast_storagenode.segments.epochs import EPOCHS_NAME, Epochs
from holdfast_storagenode.segments.files import SegmentFiles
from holdfast_storagenode.segments.index import Checkpoint, Index, IndexDamagedError, make_key
from holdfast_storagenode.segments.observer import StoreObserver
from holdfast_storagenode.segments.record import FILE_HEADER_BYTES, RecordFormat, RecordType
from holdfast_storagenode.segments.scan import Gap, Scanned, scan_segment
from holdfast_storagenode.segments.table import BlockTable, Placed
from holdfast_storagenode.store import PartitionOf

INDEX_NAME: Final = "index"
# Made when the index was caught lying while it was in use; the next start rebuilds it.
SUSPECT_NAME: Final = "index.damaged"

_APPLY_RECORDS: Final = 1024


@dataclass(frozen=True, slots=True)
class Recovered:
    """The state to go on from: index, table, epochs, length of every segment, and the end of the log.

    `rebuilt` says that the index was made anew and has not been written whole yet.
    """

    index: Index
    table: BlockTable
    epochs: Epochs
    sizes: dict[int, int]
    segment: int
    offset: int
    rebuilt: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Everything that recovery needs to know; `run` does it. `map_bytes` bounds the index's size."""

    directory: Path
    files: SegmentFiles
    record_format: RecordFormat
    disk: Disk
    partition_of: PartitionOf
    observer: StoreObserver
    map_bytes: int
    checkpoint_entries: int

    def run(self) -> Recovered:
        """Bring table and log to agree.

        Raises:
            OSError: the disk cannot be read or made durable.
        """
        epochs = Epochs(self.directory)
        index, reason = self._open_index(epochs)
        segments = self.files.numbers()
        if not segments:
            segments = [self._begin(index, epochs)]
        table = BlockTable(index)
        checkpoint = index.checkpoint()
        start = (segments[0], 0) if checkpoint is None else (checkpoint.segment, checkpoint.offset)
        records = size = 0
        for segment in segments:
            if segment >= start[0]:
                begin = start[1] if segment == start[0] else 0
                last = segment == segments[-1]
                count, length = self._replay(table, index, epochs, segment, max(begin, FILE_HEADER_BYTES), last=last)
                records, size = records + count, size + length
        if reason:
            self.observer.index_rebuilt(reason=reason, blocks=table.totals.block_count)
            (self.directory / SUSPECT_NAME).unlink(missing_ok=True)
        self.observer.replayed(records=records, size_bytes=size)
        sizes = {segment: self.files.size(segment) for segment in segments}
        return Recovered(index, table, epochs, sizes, segments[-1], sizes[segments[-1]], bool(reason))

    def _open_index(self, epochs: Epochs) -> tuple[Index, str]:
        """Return an index to start from, and why it had to be made anew ("" if it had not)."""
        directory = self.directory / INDEX_NAME
        reason = "it was caught with a wrong entry" if (self.directory / SUSPECT_NAME).exists() else ""
        if not reason:
            try:
                index = Index.open(directory, map_bytes=self.map_bytes)
                reason = self._disagreement(index)
                if not reason:
                    if index.checkpoint() is None and self.files.numbers():
                        reason = "it was missing or had no checkpoint yet"
                        self._forget_stamps(epochs, f"the index is made anew: {reason}")
                    elif epochs.was_lost and self.files.numbers():
                        self._forget_stamps(epochs, f"the file {EPOCHS_NAME} is missing or damaged")
                    return index, reason
                index.close()
            except IndexDamagedError as error:
                reason = str(error)
        self._forget_stamps(epochs, f"the index is made anew: {reason}")
        Index.discard(directory)
        return Index.open(directory, map_bytes=self.map_bytes), reason

    def _begin(self, index: Index, epochs: Epochs) -> int:
        """Make the first segment of a log and return its number."""
        epochs.forget()
        os.close(self.files.create(1))
        # So that a crash before the first checkpoint does not look like an index that was lost.
        index.write(
            [],
            Checkpoint(
                segment=1, offset=FILE_HEADER_BYTES, block_count=0, quarantined_count=0, live_bytes={}, tenants={}
            ),
        )
        return 1

    def _forget_stamps(self, epochs: Epochs, reason: str) -> None:
        if epochs.state.known or epochs.was_lost:
            epochs.forget()
            self.observer.stamps_unknown(reason=reason)

    def _disagreement(self, index: Index) -> str:
        """Say why the index cannot be about these segments, or ""."""
        checkpoint: Checkpoint | None = index.checkpoint()
        if checkpoint is None:
            return ""
        segments = set(self.files.numbers())
        lost = ({checkpoint.segment} | set(checkpoint.live_bytes)) - segments
        if lost:
            return f"segment {min(lost)} is gone"
        if self.files.size(checkpoint.segment) < checkpoint.offset:
            return f"segment {checkpoint.segment} is shorter than the index says"
        return ""

    def _replay(
        self, table: BlockTable, index: Index, epochs: Epochs, segment: int, start: int, *, last: bool
    ) -> tuple[int, int]:
        """Apply a segment's records from `start` on; return how many there were and their bytes.

        A gap that reaches the end of the last segment is a torn tail and is cut; any other is stepped over and kept.
        """
        records = size = 0
        batch: list[Placed] = []
        with self.files.reading(segment) as fd:
            self.disk.sync(fd)
            os.posix_fadvise(fd, start, 0, os.POSIX_FADV_DONTNEED)
            end = os.fstat(fd).st_size
            if last and end < FILE_HEADER_BYTES:
                self._finish_creation(segment)
            for item in scan_segment(self.disk, fd, self.record_format, start=start, end=end):
                if isinstance(item, Gap):
                    if last and item.offset + item.length == end:
                        self._cut_tail(segment, item)
                    else:
                        self.observer.gap_found(segment=segment, offset=item.offset, size_bytes=item.length)
                        self._forget_stamps(epochs, f"segment {segment} is damaged at {item.offset}")
                    continue
                if item.header.type is RecordType.STAMP and not item.intact:
                    self._forget_stamps(epochs, f"stamps in segment {segment} at {item.offset} are damaged")
                else:
                    batch.extend(self._placed(segment, item))
                records, size = records + 1, size + item.header.record_bytes
                if len(batch) >= _APPLY_RECORDS:
                    table.apply(batch)
                    batch.clear()
                    self._bound_overlay(table, index, segment, item.offset + item.header.record_bytes)
            table.apply(batch)
        return records, size

    def _placed(self, segment: int, item: Scanned) -> Iterator[Placed]:
        header = item.header
        if not item.intact:
            self.observer.quarantined(
                tenant=header.tenant, block_id=header.block_id, segment=segment, offset=item.offset
            )
        for block_id in item.block_ids():
            key = make_key(header.tenant, self.partition_of(block_id), block_id)
            yield Placed(key, header, segment, item.offset, item.intact)

    def _bound_overlay(self, table: BlockTable, index: Index, segment: int, offset: int) -> None:
        """Write a checkpoint when much has been replayed, so that memory is bounded and a second start goes on here."""
        if table.overlay_entries >= self.checkpoint_entries:
            index.write(*table.freeze(segment, offset))
            table.thaw(written=True)

    def _cut_tail(self, segment: int, tail: Gap) -> None:
        fd = self.files.open_for_append(segment)
        try:
            self.disk.truncate(fd, tail.offset)
            self.disk.sync(fd)
        finally:
            os.close(fd)
        self.observer.tail_cut(segment=segment, offset=tail.offset, size_bytes=tail.length)

    def _finish_creation(self, segment: int) -> None:
        """Complete the header of a segment whose making was interrupted; nothing was ever written behind it."""
        fd = self.files.open_for_append(segment)
        try:
            self.disk.write_at(fd, [self.record_format.file_header(segment)], 0)
            self.disk.sync(fd)
        finally:
            os.close(fd)
