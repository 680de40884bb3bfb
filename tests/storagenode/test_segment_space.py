"""Space that is set aside for the log before it is written: never more than a little, and given back."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from holdfast_core.model.errors import HoldfastError
from holdfast_core.model.limits import KIB, MIB
from holdfast_storagenode.segments.appender import RESERVED_BYTES
from holdfast_storagenode.segments.disk import Disk
from holdfast_storagenode.segments.engine import EngineOptions, SegmentStore
from holdfast_storagenode.segments.record import FILE_HEADER_BYTES
from tests.storagenode.blocks import make_blocks
from tests.storagenode.engines import FaultyDisk, open_engine, segment_paths

ALL = 1 << 30
ROOMY = EngineOptions(capacity_bytes=1 << 30, reserve_bytes=0)
LARGE = 100 * KIB


class ReservingDisk(FaultyDisk):
    """Keeps the ranges that it set aside and those that were written, and may refuse the former."""

    def __init__(self, *, refusing: bool = False) -> None:
        super().__init__()
        self.refusing = refusing
        self.reserved: list[tuple[int, int]] = []
        self.written: list[tuple[int, int]] = []

    def reserve(self, fd: int, offset: int, length: int) -> bool:
        if self.refusing:
            return False
        self.reserved.append((offset, offset + length))
        super().reserve(fd, offset, length)
        return True

    def write_at(self, fd: int, buffers: object, offset: int) -> None:
        super().write_at(fd, buffers, offset)  # type: ignore[arg-type]  # passed on as it came
        self.written.append((offset, os.fstat(fd).st_size))


def allocated_bytes(path: Path) -> int:
    """Return what a file takes on the disk, beyond its end too."""
    return path.stat().st_blocks * 512


def holds(store: SegmentStore, count: int, first: int = 0) -> bool:
    blocks = make_blocks(count, size=LARGE, first=first)
    return store.get(1, [block.id for block in blocks], bytes_max=ALL) == blocks


def test_space_is_set_aside_and_the_length_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    with open(path, "r+b") as file:
        reserved = Disk().reserve(file.fileno(), 1000, 2 * MIB)
        assert path.stat().st_size == 1000
        # Some file systems cannot; whoever asks is told so.
        assert (allocated_bytes(path) >= 2 * MIB) == reserved
        Disk().truncate(file.fileno(), 1000)
    assert path.read_bytes() == b"x" * 1000
    assert allocated_bytes(path) < MIB


def test_nothing_is_set_aside_on_a_disk_that_is_nearly_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch()
    real = os.fstatvfs
    with open(path, "r+b") as file:
        fields = list(real(file.fileno()))
        fields[4] = 32 * MIB // fields[1]  # f_bavail
        monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result(fields))
        assert not Disk().reserve(file.fileno(), 0, MIB)
    assert allocated_bytes(path) == 0


def test_a_stream_is_written_into_space_that_was_set_aside(tmp_path: Path) -> None:
    disk = ReservingDisk()
    store = open_engine(tmp_path, options=ROOMY, disk=disk)
    for first in range(0, 400, 20):
        store.put(1, make_blocks(20, size=LARGE, first=first))
    stream = [(begin, end) for begin, end in disk.written if end - begin > LARGE]
    assert len(stream) == 20
    # One range follows on another; each write lies in them, and they run ahead of it by no more than one.
    assert [begin for begin, _ in disk.reserved[1:]] == [end for _, end in disk.reserved[:-1]]
    assert disk.reserved[0][0] == stream[0][0]
    assert stream[-1][1] <= disk.reserved[-1][1] <= stream[-1][1] + RESERVED_BYTES
    assert len(disk.reserved) < 5
    assert holds(store, 400)
    store.close()
    # What was left is given back.
    (path,) = segment_paths(tmp_path)
    assert path.stat().st_size == stream[-1][1]
    assert allocated_bytes(path) < stream[-1][1] + MIB


def test_small_writes_set_nothing_aside(tmp_path: Path) -> None:
    disk = ReservingDisk()
    store = open_engine(tmp_path, options=ROOMY, disk=disk)
    for first in range(5):
        store.put(1, make_blocks(2, size=LARGE, first=2 * first))
    assert disk.reserved == []
    store.close()


def test_a_finished_segment_has_nothing_left_over(tmp_path: Path) -> None:
    disk = ReservingDisk()
    options = EngineOptions(capacity_bytes=1 << 30, reserve_bytes=0, segment_bytes=3 * MIB)
    store = open_engine(tmp_path, options=options, disk=disk)
    store.put(1, make_blocks(100, size=LARGE))
    finished = segment_paths(tmp_path)[:-1]
    assert len(finished) == 3
    # Each begins anew, right behind its file header.
    assert [begin for begin, _ in disk.reserved] == [FILE_HEADER_BYTES] * 4
    for path in finished:
        assert allocated_bytes(path) < path.stat().st_size + 64 * KIB
    assert holds(store, 100)
    store.close()


def test_a_file_system_that_sets_nothing_aside_is_written_all_the_same(tmp_path: Path) -> None:
    store = open_engine(tmp_path, options=ROOMY, disk=ReservingDisk(refusing=True))
    store.put(1, make_blocks(20, size=LARGE))
    assert holds(store, 20)
    store.close()


def test_a_write_that_failed_leaves_no_space_taken(tmp_path: Path) -> None:
    disk = ReservingDisk()
    store = open_engine(tmp_path, options=ROOMY, disk=disk)
    store.put(1, make_blocks(20, size=LARGE))
    (path,) = segment_paths(tmp_path)
    before = path.stat().st_size
    disk.write_error = errno.ENOSPC
    with pytest.raises(HoldfastError, match="disk is full"):
        store.put(1, make_blocks(20, size=LARGE, first=20))
    disk.write_error = 0
    assert path.stat().st_size == before
    assert allocated_bytes(path) < before + MIB
    store.put(1, make_blocks(20, size=LARGE, first=20))
    assert disk.reserved[-1][0] == before
    assert holds(store, 40)
    store.close()


@pytest.mark.slow
def test_what_a_killed_node_had_set_aside_is_no_tail(tmp_path: Path) -> None:
    store = open_engine(tmp_path, options=ROOMY)
    store.put(1, make_blocks(20, size=LARGE))
    store.close()
    (path,) = segment_paths(tmp_path)
    size = path.stat().st_size
    with open(path, "r+b") as file:
        Disk().reserve(file.fileno(), size, RESERVED_BYTES)
    store = open_engine(tmp_path, options=ROOMY)
    assert path.stat().st_size == size
    store.put(1, make_blocks(20, size=LARGE, first=20))
    store.close()
    store = open_engine(tmp_path, options=ROOMY)
    assert holds(store, 40)
    store.close()
    assert allocated_bytes(path) < path.stat().st_size + MIB
