"""What every change tracker must do, whatever it tracks: subclass `TrackingSuite` and give it a `volume` fixture.

The fake below passes the same suite as the real ones, so what is tested against it holds for them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import pytest

from holdfast import Consistency, Extent, Progress, StateManager
from holdfast.results import Reading
from holdfast.sources import BackupRun, GivenSource
from tests.client.rig import noise

MIB = 1 << 20


class TrackedVolume(Protocol):
    """A VM with one volume under a tracker, as the suite drives it. The VM is registered."""

    manager: StateManager
    vm_id: str

    @property
    def name(self) -> str:
        """The volume's name."""
        ...

    @property
    def size_bytes(self) -> int:
        """The volume's size: 8 MiB at least."""
        ...

    @property
    def sources(self) -> Mapping[str, GivenSource] | None:
        """What to hand to the backup; None where the registered URI says it all."""
        ...

    def write(self, offset: int, data: bytes) -> None:
        """Write as the guest does: the tracker sees it, and the next backup would find it."""
        ...

    def content(self) -> bytes:
        """Return all bytes as a backup that began now would read them."""
        ...

    def lose(self) -> None:
        """Let the tracker lose what it knows, as a crash does."""
        ...


class _Stop(Exception):
    """What ends a backup from outside."""


class TrackingSuite:
    """The suite. A subclass defines the fixture `volume`; `granularity` is what a single write may count as."""

    granularity = 64 * 1024

    def restored(self, volume: TrackedVolume, snapshot: str, backup: str, folder: object) -> bytes:
        """Return a point's bytes."""
        target = volume.manager.restore_vm(snapshot, backup, target=f"{folder}/{backup or snapshot}")
        return (target / f"{volume.name}.raw").read_bytes()

    def snapshot(self, volume: TrackedVolume) -> str:
        """Take a snapshot."""
        return volume.manager.create_snapshot(volume.vm_id, sources=volume.sources)

    def backup(self, volume: TrackedVolume, snapshot: str, *, parent: str = "", fail: bool = False) -> str:
        """Make a backup, or let one fail when all has been read."""

        def stop(progress: Progress) -> None:
            if progress.phase == "settle":
                raise _Stop

        if fail:
            with pytest.raises(_Stop):
                volume.manager.incremental_backup(
                    volume.vm_id, snapshot, parent=parent, sources=volume.sources, progress=stop
                )
            return ""
        return volume.manager.incremental_backup(volume.vm_id, snapshot, parent=parent, sources=volume.sources)

    def reading(self, volume: TrackedVolume, point: str) -> Reading:
        """How a point's volume was read."""
        return volume.manager.point(point).volumes[0].reading

    def test_a_snapshot_reads_everything(self, volume: TrackedVolume, tmp_path: object) -> None:
        volume.write(MIB, noise(MIB, 1))
        snapshot = self.snapshot(volume)
        assert self.reading(volume, snapshot) is Reading.WHOLE
        assert self.restored(volume, snapshot, "", tmp_path) == volume.content()

    def test_backups_read_what_changed(self, volume: TrackedVolume, tmp_path: object) -> None:
        volume.write(0, noise(4 * MIB, 1))
        snapshot = self.snapshot(volume)
        drawn = random.Random(5)
        for number in range(3):
            writes = [(drawn.randrange(volume.size_bytes - 70_000), drawn.randrange(1, 70_000)) for _ in range(4)]
            for offset, length in writes:
                volume.write(offset, noise(length, number))
            backup = self.backup(volume, snapshot)
            point = volume.manager.point(backup)
            assert point.volumes[0].reading is Reading.CHANGED
            assert volume.manager.last_transfer is not None
            assert volume.manager.last_transfer.notices == ()
            assert point.stats.read_bytes <= sum(length + 2 * self.granularity for _, length in writes)
            assert self.restored(volume, snapshot, backup, tmp_path) == volume.content()
            assert volume.manager.verify(backup).blocks == point.volumes[0].block_count

    def test_an_unchanged_volume_reads_nothing(self, volume: TrackedVolume) -> None:
        volume.write(0, noise(MIB, 1))
        snapshot = self.snapshot(volume)
        backup = self.backup(volume, snapshot)
        point = volume.manager.point(backup)
        assert point.volumes[0].reading is Reading.CHANGED
        assert point.stats.read_bytes == 0
        assert point.volumes[0].root == volume.manager.point(snapshot).volumes[0].root

    def test_a_failed_backup_loses_no_change(self, volume: TrackedVolume, tmp_path: object) -> None:
        volume.write(0, noise(2 * MIB, 1))
        snapshot = self.snapshot(volume)
        volume.write(3 * MIB, noise(100_000, 2))
        self.backup(volume, snapshot, fail=True)
        volume.write(5 * MIB, noise(100_000, 3))
        self.backup(volume, snapshot, fail=True)
        backup = self.backup(volume, snapshot)
        assert self.reading(volume, backup) is Reading.CHANGED
        assert self.restored(volume, snapshot, backup, tmp_path) == volume.content()
        again = self.backup(volume, snapshot)
        assert volume.manager.point(again).stats.read_bytes == 0

    def test_a_failed_snapshot_does_not_disturb(self, volume: TrackedVolume, tmp_path: object) -> None:
        volume.write(0, noise(2 * MIB, 1))
        snapshot = self.snapshot(volume)
        volume.write(MIB, noise(100_000, 2))

        def stop(progress: Progress) -> None:
            if progress.phase == "settle":
                raise _Stop

        with pytest.raises(_Stop):
            volume.manager.create_snapshot(volume.vm_id, sources=volume.sources, progress=stop)
        backup = self.backup(volume, snapshot)
        assert self.restored(volume, snapshot, backup, tmp_path) == volume.content()

    def test_another_parent_reads_everything(self, volume: TrackedVolume, tmp_path: object) -> None:
        """As where a VM was restored from an older point and ran on: its tracker counts from elsewhere."""
        volume.write(0, noise(2 * MIB, 1))
        snapshot = self.snapshot(volume)
        volume.write(MIB, noise(100_000, 2))
        self.backup(volume, snapshot)
        volume.write(4 * MIB, noise(100_000, 3))
        sideways = self.backup(volume, snapshot, parent=snapshot)
        assert self.reading(volume, sideways) is Reading.COMPARED
        assert self.restored(volume, snapshot, sideways, tmp_path) == volume.content()
        self.says_why(volume, sideways)

    def test_a_lost_tracker_reads_everything_and_recovers(self, volume: TrackedVolume, tmp_path: object) -> None:
        volume.write(0, noise(2 * MIB, 1))
        snapshot = self.snapshot(volume)
        volume.write(MIB, noise(100_000, 2))
        volume.lose()
        backup = self.backup(volume, snapshot)
        assert self.reading(volume, backup) is Reading.COMPARED
        assert self.restored(volume, snapshot, backup, tmp_path) == volume.content()
        self.says_why(volume, backup)
        volume.write(4 * MIB, noise(100_000, 4))
        again = self.backup(volume, snapshot)
        assert self.reading(volume, again) is Reading.CHANGED
        assert self.restored(volume, snapshot, again, tmp_path) == volume.content()

    def says_why(self, volume: TrackedVolume, point: str) -> None:
        """A tracker that could not be used is told of, in the record and to the caller."""
        note = volume.manager.point(point).volumes[0].reading_note
        transfer = volume.manager.last_transfer
        assert transfer is not None
        assert note
        assert any(note in notice for notice in transfer.notices)


class Disk:
    """A fake: a disk in memory, with bitmaps that count from points as QEMU's do."""

    def __init__(self, size_bytes: int, *, grain: int = 4096) -> None:
        """Make a disk of zeros; `grain` is what one bit stands for, in bytes."""
        self.data = bytearray(size_bytes)
        self.grain = grain
        self.bitmaps: dict[str, set[int]] = {}
        self.forgets_every = 0
        self._writes = 0

    def write(self, offset: int, data: bytes) -> None:
        """Write; a disk with `forgets_every` misses one write in so many."""
        self.data[offset : offset + len(data)] = data
        self._writes += 1
        if self.forgets_every and self._writes % self.forgets_every == 0:
            return
        for bitmap in self.bitmaps.values():
            bitmap.update(range(offset // self.grain, -(-(offset + len(data)) // self.grain)))

    def open(self, run: BackupRun) -> DiskSource:
        """Open it for a session."""
        return DiskSource(self, run)


class DiskSource:
    """The disk as it was when the session began, and what changed since the parent."""

    def __init__(self, disk: Disk, run: BackupRun, *, on_read: Callable[[], None] | None = None) -> None:
        """Freeze content and bitmap, and begin a bitmap that counts from the new point."""
        self._disk = disk
        self._run = run
        self._frozen = bytes(disk.data)
        self._changed = set(disk.bitmaps[run.parent_id]) if run.parent_id in disk.bitmaps else None
        self._others = sorted(disk.bitmaps)
        self._on_read = on_read
        self.ended: list[str] = []
        disk.bitmaps[run.point_id] = set()

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return len(self._frozen)

    def allocated(self, start: int, end: int) -> Sequence[Extent]:
        """Return the grains that are not zero."""
        grain = self._disk.grain
        zero = bytes(grain)
        return [
            Extent(max(start, at), min(end, at + grain))
            for at in range(start // grain * grain, end, grain)
            if self._frozen[at : at + grain] != zero[: len(self._frozen) - at]
        ]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Read what was frozen."""
        if self._on_read is not None:
            self._on_read()
        buffer[:] = self._frozen[offset : offset + len(buffer)]

    def changed_since(self, point_id: str) -> Sequence[Extent] | None:
        """Return the frozen bitmap, if it counts from that point."""
        if self._changed is None or point_id != self._run.parent_id:
            return None
        grain = self._disk.grain
        return [Extent(bit * grain, (bit + 1) * grain) for bit in sorted(self._changed)]

    def why_unknown(self) -> str:
        """Say what bitmaps there are instead."""
        return f"there is no bitmap since {self._run.parent_id}, only {', '.join(self._others) or 'none'}"

    def finish(self) -> Consistency:
        """What was frozen does not change."""
        return Consistency.CRASH

    def committed(self) -> None:
        """Count from the new point alone, and from those that other sessions are making."""
        self.ended.append("committed")
        for old in [self._run.parent_id, *self._others]:
            self._disk.bitmaps.pop(old, None)

    def abandoned(self) -> None:
        """Count from the parent as if nothing had happened."""
        self.ended.append("abandoned")
        self._disk.bitmaps.pop(self._run.point_id, None)

    def close(self) -> None:
        """Nothing to release."""
        assert len(self.ended) == 1, "a tracker hears exactly once how the session ended, and before it is closed"


class FakeVolume:
    """The fake as the suite drives it."""

    name = "root"

    def __init__(self, manager: StateManager, vm_id: str, disk: Disk) -> None:
        """Register a VM whose volume is the disk."""
        self.manager = manager
        self.vm_id = vm_id
        self.disk = disk
        manager.register_vm(vm_id, {"root": "/dev/null"})

    @property
    def size_bytes(self) -> int:
        """Size of the disk."""
        return len(self.disk.data)

    @property
    def sources(self) -> Mapping[str, GivenSource]:
        """What opens the disk."""
        return {"root": self.disk.open}

    def write(self, offset: int, data: bytes) -> None:
        """Write."""
        self.disk.write(offset, data)

    def content(self) -> bytes:
        """Return the bytes."""
        return bytes(self.disk.data)

    def lose(self) -> None:
        """Forget all bitmaps."""
        self.disk.bitmaps.clear()
