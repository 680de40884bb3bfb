"""How much a node may still write: a capacity that the operator gave, and a reserve of the disk that stays free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BATCH_BYTES_MAX, GIB, MIB
from holdfast_storagenode.segments.disk import Disk

RESERVE_BYTES_MAX: Final = 1 * GIB

# The segment that is written to gives nothing back before it is finished; so it is a small part of what there is.
_SEGMENTS_MIN: Final = 16
_SEGMENT_BYTES_MIN: Final = 1 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """The bounds. Both count bytes of segments; the index and a compaction in progress live in the reserve."""

    directory: Path
    disk: Disk
    capacity_bytes: int
    reserve_bytes: int

    @classmethod
    def of(cls, directory: Path, disk: Disk, *, capacity_bytes: int | None, reserve_bytes: int | None) -> Space:
        """Fill in what was not given: the whole file system, and a twentieth of it, at most 1 GiB, as reserve."""
        size_bytes = disk.size_bytes(directory)
        return cls(
            directory=directory,
            disk=disk,
            capacity_bytes=size_bytes if capacity_bytes is None else capacity_bytes,
            reserve_bytes=min(RESERVE_BYTES_MAX, size_bytes // 20) if reserve_bytes is None else reserve_bytes,
        )

    def segment_bytes(self, wanted_bytes: int) -> int:
        """Return the length at which a segment is finished: `wanted_bytes`, or less where the capacity is small."""
        return min(wanted_bytes, max(_SEGMENT_BYTES_MIN, self.capacity_bytes // _SEGMENTS_MIN))

    def free_bytes(self, used_bytes: int) -> int:
        """Return what may still be written, never negative; `used_bytes` is what segments hold or are about to."""
        on_disk = self.disk.free_bytes(self.directory) - self.reserve_bytes
        return max(0, min(self.capacity_bytes - used_bytes, on_disk))

    def is_full(self, used_bytes: int) -> bool:
        """Return whether a batch of the largest size would be refused; small ones may still fit."""
        return self.free_bytes(used_bytes) < BATCH_BYTES_MAX

    def check(self, new_bytes: int, *, used_bytes: int, queued_bytes: int) -> None:
        """Return if `new_bytes` may be written beside what is queued already.

        Raises:
            HoldfastError: DISK_FULL.
        """
        left = min(
            self.capacity_bytes - used_bytes - queued_bytes,
            self.disk.free_bytes(self.directory) - self.reserve_bytes - queued_bytes,
        )
        if new_bytes > left:
            raise HoldfastError(
                ErrorCode.DISK_FULL,
                f"the node has no space for {new_bytes} bytes of blocks; it refuses writes and goes on serving reads",
                facts={"needed_bytes": str(new_bytes), "free_bytes": str(max(0, left))},
            )
