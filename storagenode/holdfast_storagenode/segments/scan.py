"""Reads a segment from front to back without an index: records, and gaps where there is none.

After damage the next record is the next place with a whole header; its checksum is keyed, so nothing that a tenant
stored can pass for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.block import block_id
from holdfast_core.model.limits import MIB, SEALED_BYTES_MAX
from holdfast_core.model.names import split_ids
from holdfast_storagenode.segments.disk import Disk
from holdfast_storagenode.segments.record import (
    FILE_HEADER_BYTES,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    RecordFormat,
    RecordHeader,
    RecordType,
)

_WINDOW_BYTES: Final = max(8 * MIB, RECORD_HEADER_BYTES + SEALED_BYTES_MAX)


@dataclass(frozen=True, slots=True)
class Scanned:
    """A record at `offset`. `intact` says that its bytes match its id (always true where none are carried)."""

    offset: int
    header: RecordHeader
    payload: memoryview
    intact: bool

    def block_ids(self) -> list[bytes]:
        """Return the ids of the blocks that the record is about."""
        if self.header.type is RecordType.STAMP:
            return split_ids(bytes(self.payload))
        return [self.header.block_id]


@dataclass(frozen=True, slots=True)
class Gap:
    """`length` bytes from `offset` that hold no whole record."""

    offset: int
    length: int


class _Window:
    """Reads of a file through a window that moves forward; a view lives until the next call."""

    def __init__(self, disk: Disk, fd: int, end: int) -> None:
        self._disk = disk
        self._fd = fd
        self._end = end
        self._begin = 0
        self._view = memoryview(b"")

    def view(self, offset: int, length: int) -> memoryview:
        """Return up to `length` bytes from `offset`; fewer where the file ends."""
        at = offset - self._begin
        if at < 0 or at + length > len(self._view):
            wanted = max(0, min(max(length, _WINDOW_BYTES), self._end - offset))
            self._view = memoryview(self._disk.read_at(self._fd, wanted, offset))
            self._begin, at = offset, 0
        return self._view[at : at + length]


def scan_segment(
    disk: Disk, fd: int, record_format: RecordFormat, *, start: int = FILE_HEADER_BYTES, end: int
) -> Iterator[Scanned | Gap]:
    """Yield what stands between `start` and `end`, in order and without overlap; payloads live until the next step."""
    window = _Window(disk, fd, end)
    offset = start
    while offset < end:
        header = _header_at(window, record_format, offset, end)
        if header is None:
            following = _next_header(window, record_format, offset + 1, end)
            yield Gap(offset, following - offset)
            offset = following
            continue
        payload = window.view(offset, header.record_bytes)[RECORD_HEADER_BYTES:]
        hashed = header.type is RecordType.BLOCK or header.type is RecordType.STAMP
        whole = not hashed or block_id(payload) == header.block_id
        yield Scanned(offset, header, payload, whole and header.type is not RecordType.CORRUPT_BLOCK)
        offset += header.record_bytes


def _header_at(window: _Window, record_format: RecordFormat, offset: int, end: int) -> RecordHeader | None:
    header = record_format.parse(window.view(offset, RECORD_HEADER_BYTES))
    return header if header is not None and offset + header.record_bytes <= end else None


def _next_header(window: _Window, record_format: RecordFormat, offset: int, end: int) -> int:
    """Return where the next whole record begins, or `end`."""
    while offset < end:
        length = min(_WINDOW_BYTES, end - offset)
        at = bytes(window.view(offset, length)).find(RECORD_MAGIC)
        if at >= 0:
            if _header_at(window, record_format, offset + at, end) is not None:
                return offset + at
            offset += at + 1
        elif length == end - offset:
            break
        else:
            # The magic may straddle the windows.
            offset += length - len(RECORD_MAGIC) + 1
    return end
