"""Keeps freed memory in the process: batches of a megabyte come and go a thousand times a second.

glibc gives allocations of that size back to the kernel at once and asks for fresh, zeroed pages for the next, which is
a large part of the cost of a batch (ADR 0033).
"""

from __future__ import annotations

import ctypes
from typing import Final

from holdfast_core.model.limits import MIB

# Numbers of glibc's mallopt(3).
_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3

_KEPT_BYTES: Final = 128 * MIB


def keep_freed_memory() -> bool:
    """Tell glibc to keep up to 128 MiB of freed memory; returns whether this is glibc and it listened."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    settings = ((_M_MMAP_THRESHOLD, 32 * MIB), (_M_TRIM_THRESHOLD, _KEPT_BYTES), (_M_TOP_PAD, 16 * MIB))
    return all(mallopt(ctypes.c_int(option), ctypes.c_int(value)) == 1 for option, value in settings)
