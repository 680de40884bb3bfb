"""Raw files, sparse or not, and block devices."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path

from holdfast.descriptors import Extent, RawReader, unreadable, volume_changed
from holdfast.results import Consistency
from holdfast.sources.identity import FileIdentity, rested_identity
from holdfast_core.model.errors import ErrorCode, HoldfastError


class RawFileSource:
    """A raw file, sparse or not, or a block device.

    A file that is written through a mapping moves its time stamps only when the kernel first marks a page dirty; such a
    source belongs to `live=True`.
    """

    def __init__(self, path: Path, *, live: bool = False) -> None:
        """Open the file for reading.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if it is missing, cannot be read, or is neither file nor block device.
        """
        self._path = path
        self._live = live
        try:
            # A pipe would make the open wait for a writer; files and block devices ignore the flag.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise unreadable(str(path), error) from error
        try:
            self._begin = self._identity() if live else rested_identity(self._identity)
        except BaseException:
            os.close(self._fd)
            raise
        self._reader = RawReader(self._fd, name=str(path), size_bytes=self._begin.size_bytes, live=live)
        self._closed = False

    def _identity(self) -> FileIdentity:
        try:
            status = os.fstat(self._fd)
            if stat.S_ISBLK(status.st_mode):
                size = os.lseek(self._fd, 0, os.SEEK_END)
            elif stat.S_ISREG(status.st_mode):
                size = status.st_size
            else:
                raise HoldfastError(
                    ErrorCode.SOURCE_UNREADABLE, f"the volume {self._path} is neither a file nor a block device"
                )
        except OSError as error:
            raise unreadable(str(self._path), error) from error
        return FileIdentity.of(status, size_bytes=size)

    @property
    def size_bytes(self) -> int:
        """Size when it was opened."""
        return self._begin.size_bytes

    def allocated(self, start: int, end: int) -> Sequence[Extent]:
        """Return the data extents of the range by SEEK_DATA and SEEK_HOLE; all of it where they are not supported."""
        return self._reader.allocated(start, end)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; what lies behind the end of a live file that shrank reads as zero.

        Raises:
            HoldfastError: SOURCE_UNREADABLE, or VOLUME_CHANGED if the file has become shorter.
        """
        self._reader.read_into(offset, buffer)

    def shared(self) -> RawReader:
        """Return how it is read."""
        return self._reader

    def data_bytes(self) -> int:
        """Return the bytes that the file occupies; the size of a block device."""
        try:
            status = os.fstat(self._fd)
        except OSError as error:
            raise unreadable(str(self._path), error) from error
        return min(self.size_bytes, status.st_blocks * 512) if stat.S_ISREG(status.st_mode) else self.size_bytes

    def changed_since(self, point_id: str) -> Sequence[Extent] | None:
        """Return None: a plain file does not know what changed since which point."""
        return None

    def finish(self) -> Consistency:
        """Compare the file with itself at the beginning.

        Raises:
            HoldfastError: VOLUME_CHANGED if it was written, resized or replaced and is not live.
        """
        try:
            now = os.stat(self._path)
        except OSError as error:
            raise unreadable(str(self._path), error) from error
        same = self._identity() == self._begin and (now.st_dev, now.st_ino) == (self._begin.device, self._begin.inode)
        if same:
            return Consistency.OFFLINE
        if not self._live:
            raise volume_changed(str(self._path))
        return Consistency.FUZZY

    def close(self) -> None:
        """Close the file."""
        if not self._closed:
            self._closed = True
            os.close(self._fd)
