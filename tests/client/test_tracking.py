"""Change trackers: the suite on the fake, trackers that lie, and what sources hear of a session's end."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest

from holdfast import ErrorCode, HoldfastError, StateManager
from holdfast.results import Reading
from holdfast.sources import BackupRun, GivenSource
from holdfast.testing import MemoryCluster
from tests.client.rig import Vm, error_of, noise, write_at
from tests.client.tracking_suite import Disk, DiskSource, FakeVolume, TrackingSuite

MIB = 1 << 20
_numbers = itertools.count(1)


@pytest.fixture
def volume(manager: StateManager) -> FakeVolume:
    """A VM with a tracked disk in memory."""
    return FakeVolume(manager, f"tracked-{next(_numbers)}", Disk(12 * MIB + 1234))


class TestTheFake(TrackingSuite):
    """The fake keeps what the suite demands."""


class Recorder:
    """Opens a disk and keeps the sources, to look at them afterwards."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.opened: list[DiskSource] = []

    @property
    def sources(self) -> Mapping[str, GivenSource]:
        return {"root": self.open}

    def open(self, run: BackupRun) -> DiskSource:
        self.opened.append(DiskSource(self.disk, run))
        return self.opened[-1]


def test_a_tracker_that_misses_writes_is_caught(volume: FakeVolume, tmp_path: Path) -> None:
    volume.write(0, noise(12 * MIB, 1))
    snapshot = volume.manager.create_snapshot(volume.vm_id, sources=volume.sources)
    volume.disk.forgets_every = 1
    volume.write(0, noise(6 * MIB, 2))
    # Half of the disk was missed, and 38 blocks are drawn at random.
    backup = volume.manager.incremental_backup(volume.vm_id, snapshot, sources=volume.sources, sample=0.2)
    point = volume.manager.point(backup)
    assert point.volumes[0].reading is Reading.DISTRUSTED
    assert "change tracker" in point.volumes[0].reading_note
    assert 0 < point.stats.sampled_bytes <= 3 * MIB
    assert volume.manager.last_transfer is not None
    assert volume.manager.last_transfer.notices
    target = volume.manager.restore_vm(snapshot, backup, target=tmp_path / "restored")
    assert (target / "root.raw").read_bytes() == volume.content()


@pytest.mark.parametrize("what", ["written", "zeroed"])
def test_writes_to_holes_and_zeros_over_data_are_caught(volume: FakeVolume, what: str) -> None:
    volume.write(0, noise(4 * MIB, 1))
    snapshot = volume.manager.create_snapshot(volume.vm_id, sources=volume.sources)
    volume.disk.forgets_every = 1
    if what == "written":
        volume.write(4 * MIB, noise(8 * MIB, 2))
    else:
        volume.write(0, bytes(4 * MIB))
    backup = volume.manager.incremental_backup(volume.vm_id, snapshot, sources=volume.sources, sample=0.2)
    assert volume.manager.point(backup).volumes[0].reading is Reading.DISTRUSTED


def test_without_a_sample_a_tracker_is_taken_at_its_word(volume: FakeVolume) -> None:
    volume.write(0, noise(MIB, 1))
    snapshot = volume.manager.create_snapshot(volume.vm_id, sources=volume.sources)
    volume.disk.forgets_every = 1
    volume.write(0, noise(MIB, 2))
    backup = volume.manager.incremental_backup(volume.vm_id, snapshot, sources=volume.sources, sample=0)
    point = volume.manager.point(backup)
    assert (point.volumes[0].reading, point.stats.sampled_bytes) == (Reading.CHANGED, 0)
    assert point.volumes[0].root == volume.manager.point(snapshot).volumes[0].root


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(volume: FakeVolume, share: float) -> None:
    error = error_of(lambda: volume.manager.incremental_backup(volume.vm_id, "snap-x", sample=share))
    assert error.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.slow
def test_a_sample_is_bounded(volume: FakeVolume) -> None:
    disk = Disk(40 * MIB)
    volume.disk = disk
    volume.write(0, noise(40 * MIB, 1))
    snapshot = volume.manager.create_snapshot(volume.vm_id, sources=volume.sources)
    backup = volume.manager.incremental_backup(volume.vm_id, snapshot, sources=volume.sources, sample=1.0)
    assert 10 * MIB < volume.manager.point(backup).stats.sampled_bytes <= 16 * MIB
    backup = volume.manager.incremental_backup(volume.vm_id, snapshot, sources=volume.sources)
    assert 0 < volume.manager.point(backup).stats.sampled_bytes <= MIB


def test_sources_hear_once_how_it_ended(volume: FakeVolume) -> None:
    recorder = Recorder(volume.disk)
    snapshot = volume.manager.create_snapshot(volume.vm_id, sources=recorder.sources)
    assert recorder.opened[-1].ended == ["committed"]
    volume.write(0, noise(MIB))

    def stop(progress: object) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        volume.manager.incremental_backup(volume.vm_id, snapshot, sources=recorder.sources, progress=stop)
    assert recorder.opened[-1].ended == ["abandoned"]
    # A source that was open before the session hears of one that never began.
    source = DiskSource(volume.disk, BackupRun(volume.vm_id, "bkp-mine", snapshot))
    error = error_of(lambda: volume.manager.incremental_backup("nobody", snapshot, sources={"root": source}))
    assert error.code is ErrorCode.NOT_FOUND
    assert source.ended == ["abandoned"]
    backup = volume.manager.incremental_backup(volume.vm_id, snapshot, sources=recorder.sources)
    assert volume.manager.point(backup).volumes[0].reading is Reading.CHANGED


def test_a_session_that_is_taken_over_lets_its_tracker_go_on(
    volume: FakeVolume, shared_cluster: MemoryCluster, tmp_path: Path
) -> None:
    volume.write(0, noise(4 * MIB, 1))
    snapshot = volume.manager.create_snapshot(volume.vm_id, sources=volume.sources)
    volume.write(MIB, noise(3 * MIB, 2))
    opened: list[DiskSource] = []
    newer: list[str] = []

    def take_over() -> None:
        if not newer:
            newer.append("")
            with shared_cluster.state_manager() as other:
                newer[0] = other.incremental_backup(volume.vm_id, snapshot, sources=volume.sources, takeover=True)

    def open_slowly(run: BackupRun) -> DiskSource:
        opened.append(DiskSource(volume.disk, run, on_read=take_over))
        return opened[-1]

    error = error_of(
        lambda: volume.manager.incremental_backup(volume.vm_id, snapshot, sources={"root": open_slowly}, sample=0)
    )
    assert error.code is ErrorCode.SESSION_LAPSED
    assert opened[0].ended == ["abandoned"]
    volume.write(5 * MIB, b"more")
    backup = volume.manager.incremental_backup(volume.vm_id, snapshot, sources=volume.sources)
    point = volume.manager.point(backup)
    assert (point.parent_id, point.volumes[0].reading) == (newer[0], Reading.CHANGED)
    target = volume.manager.restore_vm(snapshot, backup, target=tmp_path / "restored")
    assert (target / "root.raw").read_bytes() == volume.content()


class FailingSource(DiskSource):
    """Cannot hand its bitmap on."""

    def committed(self) -> None:
        super().committed()
        raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, "the monitor does not answer")


def test_a_tracker_that_cannot_go_on_does_not_fail_the_backup(volume: FakeVolume) -> None:
    snapshot = volume.manager.create_snapshot(
        volume.vm_id, sources={"root": lambda run: FailingSource(volume.disk, run)}
    )
    assert volume.manager.point(snapshot).point_id == snapshot
    assert volume.manager.last_transfer is not None
    assert ["the monitor does not answer" in notice for notice in volume.manager.last_transfer.notices] == [True]


def test_sources_of_no_volume_are_refused(volume: FakeVolume) -> None:
    source = DiskSource(volume.disk, BackupRun(volume.vm_id, "snap-mine", ""))
    error = error_of(lambda: volume.manager.create_snapshot(volume.vm_id, sources={"other": source}))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert source.ended == ["abandoned"]


def test_a_restored_vm_runs_on_and_is_read_whole(vm: Vm) -> None:
    """Changes told since a newer point than the parent are not used: they miss what the restore undid."""
    vm.volume(4 * MIB, [(0, noise(3 * MIB))])
    vm.register()
    snapshot = vm.snapshot()
    write_at(vm.path(), MIB, noise(100_000, 1))
    newer = vm.manager.incremental_backup(vm.name, snapshot, changed=[(MIB, 100_000)], since=snapshot)
    assert vm.manager.point(newer).volumes[0].reading is Reading.CHANGED
    older = vm.restored(snapshot) / "root.raw"
    vm.path().write_bytes(older.read_bytes())
    write_at(vm.path(), 2 * MIB, b"ran on")
    backup = vm.manager.incremental_backup(vm.name, snapshot, parent=newer, changed=[(2 * MIB, 6)], since=snapshot)
    point = vm.manager.point(backup)
    assert point.volumes[0].reading is Reading.COMPARED
    assert snapshot in point.volumes[0].reading_note
    vm.assert_restores(snapshot, backup)
