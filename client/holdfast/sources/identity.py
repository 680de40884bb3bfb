"""Whether a file is still the same: what of it moves when it is written, resized or replaced."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

# Time stamps of files advance with the kernel's tick. A change in the same tick as the one before it leaves no trace,
# so a file must have rested for longer than any tick before it is compared with itself.
TIMESTAMP_STEP_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What of a file moves when it is written or replaced."""

    device: int
    inode: int
    size_bytes: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, status: os.stat_result, *, size_bytes: int | None = None) -> FileIdentity:
        """Return the identity that a status tells; a block device's size is not in its status."""
        size = status.st_size if size_bytes is None else size_bytes
        return cls(status.st_dev, status.st_ino, size, status.st_mtime_ns, status.st_ctime_ns)


def rested_identity(look: Callable[[], FileIdentity]) -> FileIdentity:
    """Return the identity of a file that was last written longer ago than time stamps can tell apart.

    It waits 20 ms at most, and so for a file that was written a moment ago only.
    """
    identity = look()
    rested_s = time.time() - max(identity.mtime_ns, identity.ctime_ns) / 1e9
    if -1.0 < rested_s < TIMESTAMP_STEP_S:
        time.sleep(TIMESTAMP_STEP_S)
        identity = look()
    return identity
