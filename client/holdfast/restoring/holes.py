"""Holes in files: made by fallocate, which Python does not have, and found by SEEK_DATA."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Final

_KEEP_SIZE: Final = 0x01
_PUNCH_HOLE: Final = 0x02
_ZEROS: Final = bytes(1024 * 1024)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def clear(descriptor: int, start: int, end: int) -> None:
    """Make the bytes `start` to before `end` zero: a hole where the file system has them, written zeros elsewhere.

    Raises:
        OSError: the file cannot be changed.
    """
    if start >= end:
        return
    if _libc.fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, start, end - start) == 0:
        return
    code = ctypes.get_errno()
    if code not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise OSError(code, os.strerror(code))
    at = start
    while at < end:
        at += os.pwrite(descriptor, memoryview(_ZEROS)[: end - at], at)


def data_extents(descriptor: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges (start, end) of a file that may hold other bytes than zero.

    Raises:
        OSError: the file cannot be read.
    """
    at = start
    while at < end:
        try:
            data = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end
                return
            raise
        if data >= end:
            return
        at = min(end, os.lseek(descriptor, data, os.SEEK_HOLE))
        yield data, at
