"""The writing end of the log: records go to the end of the last segment, become durable by `sync`, or are taken back.

Used by one thread. Invariant: everything before `end` is durable and whole; what was appended after it is not spoken of
until `sync` has moved `end` past it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Final

from holdfast_core.model.limits import KIB, MIB
from holdfast_storagenode.segments.disk import IOVECS_MAX, Disk
from holdfast_storagenode.segments.files import SegmentFiles
from holdfast_storagenode.segments.record import FILE_HEADER_BYTES, RECORD_HEADER_BYTES, SEGMENT_BYTES_TARGET

_RECORDS_PER_WRITE = IOVECS_MAX // 2
# Space that is set aside at a time, by writes that are large enough to tell of a stream.
RESERVED_BYTES: Final = 16 * MIB
_RESERVING_BYTES_MIN: Final = 256 * KIB


class Appender:
    """Appends to the segment `segment` from `offset` on; begins a new one when it has reached its size."""

    def __init__(
        self,
        files: SegmentFiles,
        disk: Disk,
        *,
        segment: int,
        offset: int,
        segment_bytes: int = SEGMENT_BYTES_TARGET,
    ) -> None:
        self._files = files
        self._disk = disk
        self._segment_bytes = segment_bytes
        self._fd = files.open_for_append(segment)
        self._segment = segment
        self._offset = offset
        self._end = (segment, offset)
        # Up to here the file system has set space aside in the segment; 0 where it has not.
        self._reserved_to = 0
        # Segments with bytes that are not durable yet: number, descriptor, and where those bytes begin.
        self._unsynced: list[tuple[int, int, int]] = []

    @property
    def end(self) -> tuple[int, int]:
        """(segment, offset) of the end of what is durable."""
        return self._end

    def append(self, records: Sequence[tuple[bytes, bytes | memoryview]]) -> list[tuple[int, int]]:
        """Write (header, payload) pairs and return (segment, offset) of each; not durable yet.

        Raises:
            OSError: call `rollback`.
        """
        places: list[tuple[int, int]] = []
        at = 0
        while at < len(records):
            if self._offset >= self._segment_bytes:
                self._begin_segment()
            buffers: list[bytes | memoryview] = []
            begin = offset = self._offset
            while at < len(records) and offset < self._segment_bytes and len(buffers) < 2 * _RECORDS_PER_WRITE:
                header, payload = records[at]
                buffers.append(header)
                if payload:
                    buffers.append(payload)
                places.append((self._segment, offset))
                offset += RECORD_HEADER_BYTES + len(payload)
                at += 1
            if not self._unsynced or self._unsynced[-1][0] != self._segment:
                self._unsynced.append((self._segment, self._fd, begin))
            self._reserve(begin, offset)
            self._disk.write_at(self._fd, buffers, begin)
            self._offset = offset
        return places

    def sync(self) -> None:
        """Make everything appended so far durable.

        Raises:
            OSError: nothing may be acknowledged, now or later; call `rollback` and stop writing.
        """
        for _, fd, begin in self._unsynced:
            self._disk.sync(fd)
            self._disk.forget(fd, begin, 0)
        for _, fd, _ in self._unsynced:
            if fd != self._fd:
                os.close(fd)
        self._unsynced.clear()
        self._end = (self._segment, self._offset)

    def rollback(self) -> None:
        """Cut away what was appended since the last `sync`.

        Raises:
            OSError: it may still be there; nothing may be written any more.
        """
        # What was set aside goes with what is cut away.
        self._reserved_to = 0
        for segment, fd, begin in self._unsynced:
            self._disk.truncate(fd, begin)
            if segment == self._segment:
                self._offset = begin
        for segment, fd, _ in self._unsynced:
            if segment != self._segment:
                os.close(fd)
        self._unsynced.clear()
        self._end = (self._segment, self._offset)

    def close(self) -> None:
        """Give back space that was set aside and not written to, and close the descriptors.

        Raises:
            OSError: it was not given back; the descriptors are closed all the same.
        """
        try:
            if self._reserved_to > self._offset:
                self._disk.truncate(self._fd, self._offset)
        finally:
            for fd in {self._fd, *(fd for _, fd, _ in self._unsynced)}:
                os.close(fd)

    def _reserve(self, begin: int, end: int) -> None:
        """Have space set aside for a large write from `begin` to before `end`, and for some that may follow it."""
        if end - begin < _RESERVING_BYTES_MIN or end <= self._reserved_to:
            return
        first = max(begin, self._reserved_to)
        # Nothing is left over when the segment is finished.
        last = max(end, min(first + RESERVED_BYTES, self._segment_bytes))
        if self._disk.reserve(self._fd, first, last - first):
            self._reserved_to = last

    def _begin_segment(self) -> None:
        if not any(segment == self._segment for segment, _, _ in self._unsynced):
            fd, self._fd = self._fd, self._files.create(self._segment + 1)
            os.close(fd)
        else:
            self._fd = self._files.create(self._segment + 1)
        self._segment += 1
        self._offset = FILE_HEADER_BYTES
        self._reserved_to = 0
