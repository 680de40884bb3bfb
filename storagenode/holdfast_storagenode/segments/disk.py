"""The calls through which segments reach the disk, in one place so that tests can make a single one fail."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

IOVECS_MAX: Final = os.sysconf("SC_IOV_MAX")

# From linux/falloc.h: the file's length stays what it is. `os.posix_fallocate` cannot be told so.
_KEEP_SIZE: Final = 1
# Space is set aside only while so many times as much is free: a disk that is nearly full is filled to the end.
_FREE_TIMES: Final = 64


def _find_fallocate() -> Callable[[int, int, int, int], int] | None:
    """Return the C library's fallocate(2), None where it has none."""
    library = ctypes.CDLL(None)
    # The second is the same function where offsets have 64 bits anyhow.
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    return function


_fallocate: Final = _find_fallocate()


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

    def reserve(self, fd: int, offset: int, length: int) -> bool:
        """Set space aside for a range that is about to be written; the file's length stays. Returns whether it was.

        A file system that finds space for a range at once takes a third less to write it (ADR 0135). Nothing depends
        on it: where it cannot be done, the write finds out what is wrong.
        """
        status = os.fstatvfs(fd)
        if _fallocate is None or status.f_bavail * status.f_frsize < _FREE_TIMES * length:
            return False
        return _fallocate(fd, _KEEP_SIZE, offset, length) == 0

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
