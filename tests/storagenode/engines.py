"""Segment engines under test: small segments, a recorder of what they tell, and disks that fail on demand."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from pathlib import Path

from holdfast_storagenode.segments.disk import Disk
from holdfast_storagenode.segments.engine import EngineOptions, SegmentStore
from holdfast_storagenode.segments.observer import StoreObserver
from tests.storagenode.blocks import flip, partition_of

INCARNATION = bytes(range(16))
SMALL = EngineOptions(capacity_bytes=1 << 30, reserve_bytes=0, segment_bytes=16 * 1024)


class Recorder(StoreObserver):
    """Remembers what an engine told."""

    def __init__(self) -> None:
        self.tails: list[tuple[int, int, int]] = []
        self.gaps: list[tuple[int, int, int]] = []
        self.quarantines: list[bytes] = []
        self.rebuilds: list[str] = []
        self.replays: list[int] = []
        self.commits: list[int] = []
        self.failures: list[str] = []
        self.stamps: list[int] = []
        self.unknown: list[str] = []

    def stamped(self, *, blocks: int) -> None:
        self.stamps.append(blocks)

    def stamps_unknown(self, *, reason: str) -> None:
        self.unknown.append(reason)

    def committed(self, *, seconds: float, batches: int, records: int, size_bytes: int) -> None:
        self.commits.append(batches)

    def quarantined(self, *, tenant: int, block_id: bytes, segment: int, offset: int) -> None:
        self.quarantines.append(block_id)

    def tail_cut(self, *, segment: int, offset: int, size_bytes: int) -> None:
        self.tails.append((segment, offset, size_bytes))

    def gap_found(self, *, segment: int, offset: int, size_bytes: int) -> None:
        self.gaps.append((segment, offset, size_bytes))

    def index_rebuilt(self, *, reason: str, blocks: int) -> None:
        self.rebuilds.append(reason)

    def replayed(self, *, records: int, size_bytes: int) -> None:
        self.replays.append(records)

    def disk_failed(self, *, what: str) -> None:
        self.failures.append(what)


class FaultyDisk(Disk):
    """A real disk that fails when told to, and can hold syncs back until `release` is set."""

    def __init__(self) -> None:
        self.write_error = 0
        self.sync_error = 0
        self.truncate_error = 0
        self.release = threading.Event()
        self.release.set()
        self.syncs = 0

    def write_at(self, fd: int, buffers: Sequence[bytes | memoryview], offset: int) -> None:
        if self.write_error:
            # As the kernel does it: part of it is there when the error comes.
            super().write_at(fd, [b"".join(buffers)[: sum(map(len, buffers)) // 2]], offset)
            raise OSError(self.write_error, os.strerror(self.write_error))
        super().write_at(fd, buffers, offset)

    def sync(self, fd: int) -> None:
        self.release.wait()
        self.syncs += 1
        if self.sync_error:
            raise OSError(self.sync_error, os.strerror(self.sync_error))
        super().sync(fd)

    def truncate(self, fd: int, length: int) -> None:
        if self.truncate_error:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        super().truncate(fd, length)


def open_engine(
    directory: Path,
    *,
    options: EngineOptions = SMALL,
    disk: Disk | None = None,
    observer: StoreObserver | None = None,
) -> SegmentStore:
    """Open an engine on `directory`."""
    return SegmentStore.open(
        directory,
        incarnation=INCARNATION,
        partition_of=partition_of,
        options=options,
        disk=disk,
        observer=observer,
    )


def segment_paths(directory: Path) -> list[Path]:
    """Return the segment files below `directory`, in order."""
    return sorted((directory / "segments").glob("*.seg"))


def plant_rot(directory: Path, sealed: bytes) -> None:
    """Flip a bit in the middle of every stored copy of `sealed`, behind the store's back."""
    planted = 0
    for path in segment_paths(directory):
        content = path.read_bytes()
        if sealed in content:
            damaged = flip(content, sealed, at=len(sealed) // 2)
            # In place, so that descriptors that are open see it too.
            with open(path, "r+b") as file:
                file.write(damaged)
            planted += 1
    assert planted, "the block is in no segment"
