"""The calls through which segments reach the disk, in one place so that tests can make a single one fail."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

IOVECS_MAX: Final = os.sysconf("SC_IOV_MAX")


class Disk:
    """The machine's own disk."""

    def write_at(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        """Write all of `buffers`, at most `IOVECS_MAX` of them, one after another from `offset`.

        Raises:
            OSError: some of it may have been written.
        """
        remaining = list(buffers)
        while remaining:
            written = os.pwritev(fd, remaining, offset)
            offset += written
            remaining = _after(remaining, written)

    def sync(self, fd: int) -> None:
        """Make the data of `fd` durable.

        Raises:
            OSError: nothing is known of what was written since the last sync, and asking again would not tell.
        """
        os.fdatasync(fd)

    def forget(self, fd: int, offset: int, length: int) -> None:
        """Let the kernel drop what it cached of this range; what is not durable yet it keeps.

        A page cache that grows with every stream costs more than the stream: on a virtual machine whose free pages
        went back to the host, seven times the CPU of the write itself (ADR 0032).
        """
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)

    def announce(self, fd: int, offset: int, length: int) -> None:
        """Let the kernel begin to read a range that is about to be asked for; does not wait, and promises nothing."""
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)

    def truncate(self, fd: int, length: int) -> None:
        """Cut the file to `length` bytes."""
        os.ftruncate(fd, length)

    def read_at(self, fd: int, length: int, offset: int) -> bytes:
        """Return up to `length` bytes from `offset`; fewer only at the end of the file."""
        data = os.pread(fd, length, offset)
        while 0 < len(data) < length:
            more = os.pread(fd, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def free_bytes(self, directory: Path) -> int:
        """Return the bytes that an unprivileged writer could still put below `directory`."""
        status = os.statvfs(directory)
        return status.f_bavail * status.f_frsize

    def size_bytes(self, directory: Path) -> int:
        """Return the size of the file system that holds `directory`."""
        status = os.statvfs(directory)
        return status.f_blocks * status.f_frsize


def _after(buffers: list[bytes | memoryview], written: int) -> list[bytes | memoryview]:
    """Return what is left of `buffers` once their first `written` bytes are gone."""
    for at, buffer in enumerate(buffers):
        if written < len(buffer):
            return [memoryview(buffer)[written:], *buffers[at + 1 :]]
        written -= len(buffer)
    return []
