"""Making holes in files, by fallocate, which Python does not have."""

from __future__ import annotations

import ctypes
import errno
import os
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
