"""Reading a raw file or block device by its descriptor: the same in the process that opened it and in one that seals.

It loads next to nothing, because processes that seal load it too.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from holdfast_core.model.errors import ErrorCode, HoldfastError


class Extent(NamedTuple):
    """A range of bytes, `start` to before `end`."""

    start: int
    end: int


def data_extents(descriptor: int, start: int, end: int) -> Iterator[Extent]:
    """Yield the extents of a range that may hold other bytes than zero; all of it where holes cannot be asked for."""
    at = start
    while at < end:
        try:
            data = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            yield Extent(at, end)
            return
        if data >= end:
            return
        try:
            hole = min(end, os.lseek(descriptor, data, os.SEEK_HOLE))
        except OSError:  # it has become shorter since; whoever reads it finds that out, or what else is wrong
            hole = end
        yield Extent(data, hole)
        at = hole


class RawReader:
    """Reads a file that is open; safe to share between threads and processes.

    Attributes:
        descriptor: open for reading, and not closed here.
        name: what messages call the file.
        size_bytes: size when it was opened.
        live: whether the file may change while it is read.
    """

    __slots__ = ("descriptor", "live", "name", "size_bytes")

    def __init__(self, descriptor: int, *, name: str, size_bytes: int, live: bool) -> None:
        """Take an open descriptor."""
        self.descriptor = descriptor
        self.name = name
        self.size_bytes = size_bytes
        self.live = live

    def allocated(self, start: int, end: int) -> Sequence[Extent]:
        """Return the data extents of the range by SEEK_DATA and SEEK_HOLE; all of it where they are not supported."""
        return list(data_extents(self.descriptor, start, min(end, self.size_bytes)))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer`; what lies behind the end of a live file that shrank reads as zero.

        Raises:
            HoldfastError: SOURCE_UNREADABLE, or VOLUME_CHANGED if the file has become shorter and is not live.
        """
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            except OSError as error:
                raise unreadable(self.name, error) from error
            if count == 0:
                if not self.live:
                    raise volume_changed(self.name)
                buffer[done:] = bytes(len(buffer) - done)
                return
            done += count


def unreadable(name: str, error: OSError) -> HoldfastError:
    """Return the error of a source that the system does not let us read."""
    return HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"the volume {name} cannot be read: {error.strerror}")


def volume_changed(name: str) -> HoldfastError:
    """Return the error of a source that changed and may not."""
    return HoldfastError(
        ErrorCode.VOLUME_CHANGED,
        f"the volume {name} changed while it was read; stop the VM, or register the volume with live=True",
    )
