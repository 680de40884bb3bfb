"""Segment files by number, and a bounded cache of descriptors for reading them."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast_storagenode.durable import sync_directory
from holdfast_storagenode.segments.disk import Disk
from holdfast_storagenode.segments.record import RecordFormat

DESCRIPTORS_MAX: Final = 64

_NAME = re.compile(r"(\d{8})\.seg\Z")


@dataclass(slots=True)
class _Open:
    """One cached descriptor and how many readers hold it now."""

    fd: int
    readers: int = 0


class SegmentFiles:
    """The segment files of one directory. Thread-safe."""

    def __init__(self, directory: Path, record_format: RecordFormat, disk: Disk) -> None:
        self.directory = directory
        self._format = record_format
        self._disk = disk
        self._lock = threading.Lock()
        self._open: OrderedDict[int, _Open] = OrderedDict()

    def path(self, segment: int) -> Path:
        """Return the path of a segment."""
        return self.directory / f"{segment:08}.seg"

    def numbers(self) -> list[int]:
        """Return the numbers of the segments that exist, ascending."""
        matches = (_NAME.match(name) for name in os.listdir(self.directory))
        return sorted(int(match.group(1)) for match in matches if match)

    def size(self, segment: int) -> int:
        """Return the length of a segment's file in bytes."""
        return self.path(segment).stat().st_size

    def create(self, segment: int) -> int:
        """Make a segment with its file header, make its name durable, return a descriptor for writing.

        Raises:
            OSError: nothing is left behind.
        """
        path = self.path(segment)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        made = False
        try:
            self._disk.write_at(fd, [self._format.file_header(segment)], 0)
            self._disk.sync(fd)
            sync_directory(self.directory)
            made = True
        finally:
            if not made:
                os.close(fd)
                path.unlink()
        return fd

    def open_for_append(self, segment: int) -> int:
        """Return a descriptor for writing to a segment that exists."""
        return os.open(self.path(segment), os.O_RDWR | os.O_CLOEXEC)

    @contextmanager
    def reading(self, segment: int) -> Iterator[int]:
        """Lend a descriptor for reading; it stays valid inside the block even if the segment is removed meanwhile.

        Raises:
            FileNotFoundError: the segment was removed.
        """
        held = self._borrow(segment)
        try:
            yield held.fd
        finally:
            with self._lock:
                held.readers -= 1
                self._close_surplus()

    def remove(self, segment: int) -> None:
        """Remove a segment; readers that hold it finish undisturbed."""
        self.path(segment).unlink()
        sync_directory(self.directory)
        with self._lock:
            held = self._open.get(segment)
            if held is not None and held.readers == 0:
                os.close(held.fd)
                del self._open[segment]

    def close(self) -> None:
        """Close the descriptors that no reader holds."""
        with self._lock:
            self._close_surplus(keep=0)

    def _borrow(self, segment: int) -> _Open:
        with self._lock:
            held = self._open.get(segment)
            if held is None:
                held = _Open(os.open(self.path(segment), os.O_RDONLY | os.O_CLOEXEC))
                self._open[segment] = held
            self._open.move_to_end(segment)
            held.readers += 1
            return held

    def _close_surplus(self, keep: int = DESCRIPTORS_MAX) -> None:
        idle = [segment for segment, held in self._open.items() if held.readers == 0]
        for segment in idle[: max(0, len(self._open) - keep)]:
            os.close(self._open.pop(segment).fd)
