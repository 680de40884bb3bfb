"""A guest at work is backed up: by what it dirtied, at one moment over all its disks, whatever dies on the way."""

from __future__ import annotations

import errno
import filecmp
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import Consistency, ErrorCode, Progress, StateManager, VolumeSpec
from holdfast.results import Reading
from holdfast.sources import BackupRun
from holdfast.sources.qmp import open_qmp
from holdfast.sources.qmp.opening import QmpSource
from holdfast.testing import MemoryCluster
from tests.client.rig import error_of
from tests.support.guest import Drive, Guest, make_root
from tests.support.qemu import tool
from tests.support.waiting import wait_until

MIB = 1 << 20
COUNT = (
    "i=0; while :; do i=$((i+1)); for disk in vdb vdc; do "
    "printf '%08d' $i | dd of=/dev/$disk bs=512 conv=notrunc,fsync 2>/dev/null; done; done"
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class _GivenUp(Exception):
    """What ends a backup from outside."""


@pytest.fixture(scope="module")
def manager() -> Iterator[StateManager]:
    """A manager of a cluster in memory."""
    with MemoryCluster() as cluster, cluster.state_manager() as manager:
        yield manager


def empty(path: Path, size: int = 4 * MIB) -> Path:
    """Make an empty disk."""
    with path.open("wb") as image:
        image.truncate(size)
    return path


def read(source: QmpSource) -> bytes:
    """Read all of a source."""
    buffer = bytearray(source.size_bytes)
    for offset in range(0, len(buffer), MIB):
        source.read_into(offset, memoryview(buffer)[offset : offset + MIB])
    return bytes(buffer)


def test_the_life_of_a_vm_by_dirty_bitmaps(manager: StateManager, tmp_path: Path) -> None:
    root = make_root(tmp_path / "root.img", agent=True)
    with Guest([Drive.raw("root", root)], agent=True) as guest:
        guest.wait_for_login()
        assert guest.agent_answers()
        manager.register_vm("life", {"root": guest.uri("root", agent=guest.agent_socket)})
        snapshot = manager.create_snapshot("life")
        assert manager.point(snapshot).volumes[0].reading is Reading.WHOLE
        assert manager.point(snapshot).volumes[0].consistency is Consistency.APPLICATION

        guest.run("head -c 3000000 /dev/urandom >/srv/first; sync")

        def give_up(progress: Progress) -> None:
            if progress.phase == "settle":
                raise _GivenUp

        with pytest.raises(_GivenUp):
            manager.incremental_backup("life", snapshot, progress=give_up)
        guest.run("head -c 2000000 /dev/urandom >/srv/second; sync")
        backup = manager.incremental_backup("life", snapshot)
        volume = manager.point(backup).volumes[0]
        assert (volume.reading, volume.reading_note) == (Reading.CHANGED, "")
        assert 5_000_000 < manager.point(backup).stats.read_bytes < 10_000_000
        sums = guest.run("sha256sum /srv/first /srv/second")

        # A guest that stands still is what its image is, so that both can be compared byte for byte.
        guest.execute("stop")
        last = manager.incremental_backup("life", snapshot)
        target = manager.restore_vm(snapshot, last, target=tmp_path / "last")
        assert filecmp.cmp(target / "root.raw", root, shallow=False)
    target = manager.restore_vm(snapshot, backup, target=tmp_path / "restored")
    with Guest([Drive.raw("root", target / "root.raw")]) as again:
        again.wait_for_login()
        assert again.run("sha256sum /srv/first /srv/second") == sums


def test_what_a_guest_writes_during_a_backup_is_not_in_it(tmp_path: Path) -> None:
    disks = {"root": make_root(tmp_path / "root.img"), "data": empty(tmp_path / "data.img", 16 * MIB)}
    with Guest([Drive.raw(name, path) for name, path in disks.items()]) as guest:
        guest.wait_for_login()
        guest.run("head -c 8000000 /dev/urandom >/dev/vdb; sync")
        guest.start_command("while :; do head -c 8000000 /dev/urandom >/dev/vdb; date >>/srv/log; sync; done")
        guest.execute("stop")
        frozen = {name: path.read_bytes() for name, path in disks.items()}
        specs = {name: VolumeSpec(guest.uri(name)) for name in disks}
        sources = open_qmp(specs, BackupRun("vm", "snap-a", ""))
        try:
            guest.execute("cont")
            for name, path in disks.items():
                wait_until(lambda name=name, path=path: path.read_bytes() != frozen[name], "a write of the guest")  # type: ignore[misc]
                assert read(sources[name]) == frozen[name]
                assert sources[name].finish() is Consistency.CRASH
        finally:
            for source in sources.values():
                source.abandoned()
                source.close()


def test_a_point_has_all_disks_of_one_moment(tmp_path: Path) -> None:
    disks = {"root": make_root(tmp_path / "root.img"), "first": empty(tmp_path / "a"), "second": empty(tmp_path / "b")}
    seen = set()
    with Guest([Drive.raw(name, path) for name, path in disks.items()]) as guest:
        guest.wait_for_login()
        guest.start_command(COUNT)
        wait_until(lambda: disks["second"].read_bytes()[:1] == b"0", "a write of the guest")
        specs = {name: VolumeSpec(guest.uri(name)) for name in ("second", "first")}
        for number in range(12):
            sources = open_qmp(specs, BackupRun("vm", f"snap-{number}", ""))
            try:
                first, second = (int(read(sources[name])[:8]) for name in ("first", "second"))
            finally:
                for source in sources.values():
                    source.abandoned()
                    source.close()
            # The guest writes to the first disk, waits until that is durable, and then writes to the second.
            assert first - second in (0, 1)
            seen.add(first)
    assert len(seen) > 3


def test_a_guest_that_stopped_for_want_of_room_goes_on_behind_the_backup(tmp_path: Path) -> None:
    """A scratch image without room stops the guest in the same way as this disk, which refuses its first write."""
    disk = {"driver": "file", "filename": str(empty(tmp_path / "data.img"))}
    no_room = {"event": "pwritev", "errno": errno.ENOSPC, "once": True}
    picky = {"driver": "raw", "file": {"driver": "blkdebug", "image": disk, "inject-error": [no_room]}}
    drives = [Drive.raw("root", make_root(tmp_path / "root.img")), Drive("data", picky)]
    with Guest(drives) as guest:
        guest.wait_for_login()
        guest.run("true")
        (source,) = open_qmp({"data": VolumeSpec(guest.uri("data"))}, BackupRun("vm", "snap-a", "")).values()
        guest.start_command("echo written | dd of=/dev/vdb conv=notrunc,fsync")
        wait_until(lambda: guest.execute("query-status")["status"] == "io-error", "the guest's stop")
        assert read(source) == bytes(4 * MIB)
        assert source.finish() is Consistency.CRASH
        source.committed()
        source.close()
        assert guest.execute("query-status")["status"] == "running"
        assert guest.run("head -c 8 /dev/vdb") == "written\n"


def test_a_machine_that_is_killed_in_the_middle_of_a_backup(manager: StateManager, tmp_path: Path) -> None:
    image = tmp_path / "root.qcow2"
    tool("qemu-img", "convert", "-O", "qcow2", make_root(tmp_path / "root.img"), image)
    drives = [Drive.qcow2("root", image)]
    with Guest(drives) as guest:
        guest.wait_for_login()
        manager.register_vm("killed", {"root": guest.uri("root")})
        snapshot = manager.create_snapshot("killed")
        guest.run("head -c 9000000 /dev/urandom >/srv/file; sync")

        def kill(progress: Progress) -> None:
            if progress.bytes_done:
                guest.kill()

        error = error_of(lambda: manager.incremental_backup("killed", snapshot, progress=kill))
        assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert len(manager.points("killed")) == 1
    with Guest(drives) as guest:
        guest.wait_for_login()
        guest.run("echo kept >/srv/other; sync")
        manager.register_vm("killed", {"root": guest.uri("root")}, replace=True)
        backup = manager.incremental_backup("killed", snapshot)
        volume = manager.point(backup).volumes[0]
        assert volume.reading is Reading.COMPARED
        assert "no bitmap" in volume.reading_note
        assert manager.last_transfer is not None
        assert any("no bitmap" in notice for notice in manager.last_transfer.notices)
        guest.run("echo more >/srv/more; sync")
        again = manager.incremental_backup("killed", snapshot)
        assert manager.point(again).volumes[0].reading is Reading.CHANGED
    target = manager.restore_vm(snapshot, again, target=tmp_path / "restored")
    for name, content in {"other": "kept", "more": "more"}.items():
        assert content in tool("debugfs", "-R", f"cat /srv/{name}", target / "root.raw")
