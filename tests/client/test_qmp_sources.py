"""Disks of a real QEMU, written through its block layer as by a guest: held still, tracked, handed on, recovered."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from holdfast import Consistency, ErrorCode, HoldfastError, VolumeSpec
from holdfast.descriptors import Extent
from holdfast.sources import BackupRun
from holdfast.sources.interface import TrackingSource
from holdfast.sources.qmp import monitor, open_qmp
from holdfast.sources.qmp.opening import QmpSource
from tests.client.rig import error_of
from tests.support.qemu import Drive, Qemu, tool
from tests.support.waiting import wait_until

MIB = 1 << 20
SIZE = 8 * MIB
GRANULE = 65536

OPEN_AND_HANG = """
import sys
from holdfast import VolumeSpec
from holdfast.sources import BackupRun
from holdfast.sources.qmp import open_qmp
opened = open_qmp({"disk": VolumeSpec(sys.argv[1])}, BackupRun("vm", sys.argv[2], sys.argv[3]))
opened["disk"].read_into(0, memoryview(bytearray(65536)))
print("holds", flush=True)
sys.stdin.read()
"""


def image(path: Path, kind: str = "raw") -> Path:
    """Make an empty image."""
    tool("qemu-img", "create", "-q", "-f", kind, path, str(SIZE))
    return path


@pytest.fixture
def qemu(tmp_path: Path) -> Iterator[Qemu]:
    """A machine with one raw disk."""
    with Qemu([Drive.raw("disk", image(tmp_path / "disk.img"))]) as qemu:
        yield qemu


def opened(qemu: Qemu, point: str, parent: str = "", *, drive: str = "disk") -> QmpSource:
    """Open one disk for a session."""
    return open_qmp({"disk": VolumeSpec(qemu.uri(drive))}, BackupRun("vm", point, parent))["disk"]


def read(source: QmpSource, offset: int = 0, length: int = SIZE) -> bytes:
    """Read from a source."""
    buffer = bytearray(length)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def commit(source: QmpSource) -> None:
    """End a session as a backup that was committed."""
    source.finish()
    source.committed()
    source.close()


def fail(source: QmpSource) -> None:
    """End a session as a backup that failed."""
    source.abandoned()
    source.close()


def granules(source: TrackingSource, point: str) -> set[int]:
    """Numbers of the bitmap's granules that changed since a point."""
    changed = source.changed_since(point)
    assert changed is not None
    return {at for extent in changed for at in range(extent.start // GRANULE, -(-extent.end // GRANULE))}


def assert_nothing_left(qemu: Qemu, bitmaps: Mapping[str, bool], drive: str = "disk") -> None:
    """The machine has these bitmaps, by name with whether they record, and no job, export, node or file of ours."""
    there = {name: told["recording"] for name, told in qemu.bitmaps(drive).items() if name.startswith("holdfast-")}
    assert there == bitmaps
    assert qemu.execute("query-jobs") == []
    assert qemu.execute("query-block-exports") == []
    assert not [node for node in qemu.nodes() if node.startswith("holdfast-")]
    folders = {Path(each.image["file"]["filename"]).parent for each in qemu.drives} | {qemu.sockets}
    assert not [path for folder in folders for path in folder.iterdir() if "holdfast-" in path.name]
    assert not (qemu.sockets / "qmp.nbd").exists()


def test_a_disk_is_read_as_it_was_whatever_is_written_meanwhile(qemu: Qemu) -> None:
    qemu.write("disk", 0, MIB, 0x11)
    qemu.write("disk", 4 * MIB, 5000 - 5000 % 512, 0x22)
    source = opened(qemu, "snap-a")
    assert source.size_bytes == SIZE
    before = b"\x11" * MIB + bytes(3 * MIB) + b"\x22" * 4608 + bytes(4 * MIB - 4608)
    qemu.write("disk", 0, 4096, 0x99)
    qemu.write("disk", 2 * MIB, MIB, 0x99)
    qemu.io("disk", f"discard {4 * MIB} {MIB}")
    assert read(source) == before
    qemu.write("disk", MIB // 2, 3 * MIB, 0x77)
    assert read(source) == before
    held = source.allocated(0, SIZE)
    assert sum(extent.end - extent.start for extent in held) < 5 * MIB
    assert before == b"".join(
        read(source, start, end - start) if data else bytes(end - start) for start, end, data in pieces(held)
    )
    assert source.changed_since("snap-a") is None
    assert source.why_unknown() == ""
    assert source.finish() is Consistency.CRASH
    source.committed()
    source.close()
    source.close()
    assert_nothing_left(qemu, {"holdfast-snap-a": True})


def pieces(extents: list[Extent] | tuple[Extent, ...] | object) -> Iterator[tuple[int, int, bool]]:
    """Cover the disk with the extents and what is between them."""
    at = 0
    assert isinstance(extents, list)
    for extent in extents:
        yield at, extent.start, False
        yield extent.start, extent.end, True
        at = extent.end
    yield at, SIZE, False


def test_a_committed_backup_hands_the_bitmap_on(qemu: Qemu) -> None:
    commit(opened(qemu, "snap-a"))
    qemu.write("disk", 3 * GRANULE, 512, 1)
    source = opened(qemu, "bkp-b", "snap-a")
    qemu.write("disk", 7 * GRANULE, 512, 2)
    assert granules(source, "snap-a") == {3}
    assert source.changed_since("bkp-x") is None
    commit(source)
    assert_nothing_left(qemu, {"holdfast-bkp-b": True})
    source = opened(qemu, "bkp-c", "bkp-b")
    assert granules(source, "bkp-b") == {7}
    assert read(source, 7 * GRANULE, 512) == b"\x02" * 512
    commit(source)


def test_a_failed_backup_loses_no_change(qemu: Qemu) -> None:
    commit(opened(qemu, "snap-a"))
    qemu.write("disk", 1 * GRANULE, 512, 1)
    source = opened(qemu, "bkp-b", "snap-a")
    qemu.write("disk", 2 * GRANULE, 512, 1)
    fail(source)
    qemu.write("disk", 3 * GRANULE, 512, 1)
    assert_nothing_left(qemu, {"holdfast-snap-a": True})
    finished = opened(qemu, "bkp-c", "snap-a")
    assert granules(finished, "snap-a") == {1, 2, 3}
    finished.finish()
    qemu.write("disk", 4 * GRANULE, 512, 1)
    fail(finished)
    source = opened(qemu, "bkp-d", "snap-a")
    assert granules(source, "snap-a") == {1, 2, 3, 4}
    commit(source)


def test_a_discarded_range_counts_as_changed(tmp_path: Path) -> None:
    disk = Drive.raw("disk", image(tmp_path / "disk.img"))
    with Qemu([Drive("disk", {**disk.image, "discard": "unmap"})]) as qemu:
        qemu.write("disk", 0, MIB, 1)
        commit(opened(qemu, "snap-a"))
        qemu.io("disk", f"discard {4 * GRANULE} {GRANULE}")
        qemu.io("disk", f"write -z {8 * GRANULE} {GRANULE}")
        source = opened(qemu, "bkp-b", "snap-a")
        assert granules(source, "snap-a") == {4, 8}
        assert read(source, 4 * GRANULE, GRANULE) == bytes(GRANULE)
        commit(source)


def test_bitmaps_are_as_fine_as_small_blocks_are(qemu: Qemu) -> None:
    specs = {"disk": VolumeSpec(qemu.uri("disk"), block_bytes=16384)}
    commit(open_qmp(specs, BackupRun("vm", "snap-a", ""))["disk"])
    assert qemu.bitmaps("disk")["holdfast-snap-a"]["granularity"] == 16384


def test_a_bitmap_of_another_point_is_not_used(qemu: Qemu) -> None:
    commit(opened(qemu, "snap-a"))
    qemu.write("disk", 0, 512, 1)
    source = opened(qemu, "bkp-b", "snap-of-another-vm")
    assert source.changed_since("snap-of-another-vm") is None
    assert source.changed_since("snap-a") is None
    assert "holdfast-snap-a and not holdfast-snap-of-another-vm" in source.why_unknown()
    commit(source)
    # The other one goes on: whoever builds on that point may still come.
    assert_nothing_left(qemu, {"holdfast-snap-a": True, "holdfast-bkp-b": True})
    source = opened(qemu, "bkp-c", "snap-a")
    assert granules(source, "snap-a") == {0}
    fail(source)


def killed_backup(qemu: Qemu, point: str, parent: str, meanwhile: Callable[[], None]) -> None:
    """Let a process open the disk and read, then kill it with SIGKILL."""
    child = subprocess.Popen(
        [sys.executable, "-c", OPEN_AND_HANG, qemu.uri("disk"), point, parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "holds\n"
        meanwhile()
    finally:
        child.kill()
        child.communicate()


def test_a_backup_that_was_killed_loses_no_change_and_leaves_nothing(qemu: Qemu) -> None:
    commit(opened(qemu, "snap-a"))
    qemu.write("disk", 1 * GRANULE, 512, 1)
    killed_backup(qemu, "bkp-b", "snap-a", lambda: qemu.write("disk", 2 * GRANULE, 512, 1))
    qemu.write("disk", 3 * GRANULE, 512, 1)
    assert qemu.execute("query-jobs") != []
    source = opened(qemu, "bkp-c", "snap-a")
    assert granules(source, "snap-a") == {1, 2, 3}
    commit(source)
    assert_nothing_left(qemu, {"holdfast-bkp-c": True})


def test_a_backup_that_was_killed_behind_its_commit_is_built_on(qemu: Qemu) -> None:
    commit(opened(qemu, "snap-a"))
    qemu.write("disk", 1 * GRANULE, 512, 1)
    killed_backup(qemu, "bkp-b", "snap-a", lambda: qemu.write("disk", 2 * GRANULE, 512, 1))
    source = opened(qemu, "bkp-c", "bkp-b")
    assert granules(source, "bkp-b") == {2}
    commit(source)
    # The parent's parent stopped with the commit that nobody was told of: nothing can be built on its bitmap any more.
    assert_nothing_left(qemu, {"holdfast-bkp-c": True})


def test_a_machine_that_dies_in_the_middle_fails_the_backup(qemu: Qemu) -> None:
    qemu.write("disk", 0, SIZE, 5)
    source = opened(qemu, "snap-a")
    read(source, 0, GRANULE)
    qemu.kill()
    assert error_of(lambda: read(source)).code is ErrorCode.SOURCE_UNREADABLE
    assert error_of(source.finish).code is ErrorCode.SOURCE_UNREADABLE
    assert error_of(source.abandoned).code is ErrorCode.SOURCE_UNREADABLE
    source.close()


def test_a_bitmap_in_a_qcow2_image_outlives_a_machine_that_ends_in_order_and_no_other(tmp_path: Path) -> None:
    drives = [Drive.qcow2("disk", image(tmp_path / "disk.qcow2", "qcow2"))]
    with Qemu(drives) as qemu:
        commit(opened(qemu, "snap-a"))
        qemu.write("disk", 5 * GRANULE, 512, 1)
        qemu.quit()
    with Qemu(drives) as qemu:
        qemu.write("disk", 6 * GRANULE, 512, 1)
        source = opened(qemu, "bkp-b", "snap-a")
        assert granules(source, "snap-a") == {5, 6}
        commit(source)
        qemu.write("disk", 9 * GRANULE, 512, 1)
        qemu.quit()
    with Qemu(drives) as qemu:
        qemu.kill()
    with Qemu(drives) as qemu:
        source = opened(qemu, "bkp-c", "bkp-b")
        assert source.changed_since("bkp-b") is None
        assert "inconsistent" in source.why_unknown()
        assert read(source, 9 * GRANULE, 512) == b"\x01" * 512
        commit(source)
        assert_nothing_left(qemu, {"holdfast-bkp-c": True})


def test_an_image_that_was_put_back_counts_from_the_older_point(tmp_path: Path) -> None:
    path = image(tmp_path / "disk.qcow2", "qcow2")
    drives = [Drive.qcow2("disk", path)]
    with Qemu(drives) as qemu:
        commit(opened(qemu, "snap-a"))
        qemu.quit()
    older = path.read_bytes()
    with Qemu(drives) as qemu:
        qemu.write("disk", 1 * GRANULE, 512, 1)
        commit(opened(qemu, "bkp-b", "snap-a"))
        qemu.quit()
    path.write_bytes(older)
    with Qemu(drives) as qemu:
        qemu.write("disk", 2 * GRANULE, 512, 1)
        source = opened(qemu, "bkp-c", "bkp-b")
        assert source.changed_since("bkp-b") is None
        assert "holdfast-snap-a and not holdfast-bkp-b" in source.why_unknown()
        fail(source)
        source = opened(qemu, "bkp-d", "snap-a")
        assert granules(source, "snap-a") == {2}
        commit(source)


def test_a_machine_that_ends_in_order_while_it_is_backed_up_loses_no_change(tmp_path: Path) -> None:
    drives = [Drive.qcow2("disk", image(tmp_path / "disk.qcow2", "qcow2"))]
    with Qemu(drives) as qemu:
        commit(opened(qemu, "snap-a"))
        qemu.write("disk", 1 * GRANULE, 512, 1)
        source = opened(qemu, "bkp-b", "snap-a")
        qemu.write("disk", 2 * GRANULE, 512, 1)
        qemu.quit()
        assert error_of(source.finish).code is ErrorCode.SOURCE_UNREADABLE
        source.close()
    with Qemu(drives) as qemu:
        source = opened(qemu, "bkp-c", "snap-a")
        assert granules(source, "snap-a") == {1, 2}
        commit(source)


def test_disks_of_one_machine_end_one_after_the_other(tmp_path: Path) -> None:
    drives = [Drive.raw(name, image(tmp_path / name)) for name in ("disk", "other")]
    with Qemu(drives) as qemu:
        specs = {name: VolumeSpec(qemu.uri(name)) for name in ("disk", "other")}
        sources = open_qmp(specs, BackupRun("vm", "snap-a", ""))
        for source in sources.values():
            source.finish()
        for source in sources.values():
            source.committed()
            source.close()
        for name in specs:
            assert_nothing_left(qemu, {"holdfast-snap-a": True}, name)


def test_opening_several_disks_takes_all_or_none(tmp_path: Path) -> None:
    drives = [Drive.raw(name, image(tmp_path / name)) for name in ("disk", "other")]
    with Qemu(drives) as qemu:
        commit(opened(qemu, "snap-a"))
        qemu.write("disk", 0, 512, 1)
        specs = {"disk": VolumeSpec(qemu.uri("disk")), "other": VolumeSpec(qemu.uri("other", scratch="/nowhere"))}
        error = error_of(lambda: open_qmp(specs, BackupRun("vm", "bkp-b", "snap-a")))
        assert error.code is ErrorCode.SOURCE_UNREADABLE
        assert "scratch=" in error.message
        assert_nothing_left(qemu, {"holdfast-snap-a": True})
        source = opened(qemu, "bkp-c", "snap-a")
        assert granules(source, "snap-a") == {0}
        fail(source)


def test_a_scratch_image_goes_where_it_is_told(tmp_path: Path, qemu: Qemu) -> None:
    (tmp_path / "scratch").mkdir()
    specs = {"disk": VolumeSpec(qemu.uri("disk", scratch=tmp_path / "scratch"))}
    source = open_qmp(specs, BackupRun("vm", "snap-a", ""))["disk"]
    nodes = qemu.execute("query-named-block-nodes", flat=True)
    files = [node["file"] for node in nodes if node["node-name"].startswith("holdfast-") and node["drv"] == "file"]
    assert [Path(file).parent for file in files] == [tmp_path / "scratch"]
    # It has no name any more: whoever dies, its room is free again.
    assert list((tmp_path / "scratch").iterdir()) == []
    assert qemu.process is not None
    descriptors = Path(f"/proc/{qemu.process.pid}/fd").iterdir()
    (held,) = {each.stat().st_ino: each for each in descriptors if ".scratch" in str(each.readlink())}.values()
    assert held.stat().st_mode & 0o777 == 0o600
    fail(source)


def test_a_job_that_somebody_cancels_fails_the_backup(qemu: Qemu) -> None:
    source = opened(qemu, "snap-a")
    (job,) = (each["id"] for each in qemu.execute("query-jobs"))
    qemu.execute("job-cancel", id=job)
    wait_until(lambda: qemu.execute("query-jobs") == [], "the end of the job")
    error = error_of(source.finish)
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "ended by somebody" in error.message
    fail(source)
    assert_nothing_left(qemu, {})


def test_a_server_of_somebody_else_is_left_alone(tmp_path: Path, qemu: Qemu) -> None:
    qemu.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(qemu.sockets / "theirs")}})
    qemu.execute("block-export-add", type="nbd", id="theirs", node_name="disk-node", name="theirs")
    error = error_of(lambda: opened(qemu, "snap-a"))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "in use for the export theirs" in error.message
    assert [each["id"] for each in qemu.execute("query-block-exports")] == ["theirs"]
    qemu.execute("block-export-del", id="theirs")
    assert error_of(lambda: opened(qemu, "snap-a")).code is ErrorCode.SOURCE_UNREADABLE
    qemu.execute("nbd-server-stop")
    fail(opened(qemu, "snap-a"))


def test_a_server_that_a_dead_process_left_is_taken_away(qemu: Qemu) -> None:
    qemu.execute("nbd-server-start", addr={"type": "unix", "data": {"path": f"{qemu.qmp_socket}.nbd"}})
    fail(opened(qemu, "snap-a"))
    assert_nothing_left(qemu, {})


def test_disks_that_are_not_there_or_twice_are_refused(tmp_path: Path, qemu: Qemu) -> None:
    error = error_of(lambda: opened(qemu, "snap-a", drive="tape"))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "no disk tape" in error.message
    twice = {name: VolumeSpec(qemu.uri("disk")) for name in ("a", "b")}
    assert error_of(lambda: open_qmp(twice, BackupRun("vm", "snap-a", ""))).code is ErrorCode.INVALID_ARGUMENT
    nobody = {"disk": VolumeSpec(f"qmp:{tmp_path}/nobody?device=disk")}
    error = error_of(lambda: open_qmp(nobody, BackupRun("vm", "snap-a", "")))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "no QEMU answers" in error.message


class WithThreads(Qemu):
    """A machine with an I/O thread, which its second and third disk use, on a device and on a controller."""

    def _machine(self) -> list[str]:
        return [
            *("-machine", "pc", "-accel", "tcg", "-m", "16", "-S", "-object", "iothread,id=io"),
            *("-device", "virtio-scsi-pci,iothread=io"),
        ]

    def _disk(self, drive: Drive) -> list[str]:
        device = {
            "plain": "virtio-blk-pci,id=plain",
            "threaded": "virtio-blk-pci,id=threaded,iothread=io",
            "below": "scsi-hd,id=below",
        }[drive.name]
        node = f"{drive.name}-node"
        return [
            "-blockdev",
            json.dumps({"node-name": node, **drive.image}),
            *("-device", f"{device},drive={node}"),
        ]


def test_disks_whose_thread_would_take_the_guest_down_are_refused(tmp_path: Path) -> None:
    drives = [Drive.raw(name, image(tmp_path / name)) for name in ("plain", "threaded", "below")]
    with WithThreads(drives) as qemu:
        newer = qemu.execute("query-version")["qemu"]["major"] >= 9
        for name in ("threaded", "below", "threaded-node"):
            if newer:
                fail(opened(qemu, "snap-a", drive=name))
                continue
            error = error_of(lambda name=name: opened(qemu, "snap-a", drive=name))  # type: ignore[misc]
            assert error.code is ErrorCode.SOURCE_UNREADABLE
            assert "iothread" in error.message
        for name in ("plain", "plain-node"):
            fail(opened(qemu, "snap-a", drive=name))
        assert_nothing_left(qemu, {}, "plain")


def test_a_machine_that_fails_takes_the_others_back(tmp_path: Path, qemu: Qemu) -> None:
    commit(opened(qemu, "snap-a"))
    specs = {"disk": VolumeSpec(qemu.uri("disk")), "other": VolumeSpec(f"qmp:{tmp_path}/nobody?device=disk")}
    error = error_of(lambda: open_qmp(specs, BackupRun("vm", "bkp-b", "snap-a")))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert_nothing_left(qemu, {"holdfast-snap-a": True})


def test_a_socket_that_another_client_holds_is_said_so(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "GREETS_WITHIN_S", 0.3)
    with socket.socket(socket.AF_UNIX) as other:
        other.connect(str(qemu.qmp_socket))
        with other.makefile("rb") as lines:
            assert "QMP" in json.loads(lines.readline())
        error = error_of(lambda: opened(qemu, "snap-a"))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "another client holds" in error.message


def test_without_the_extra_it_says_what_to_install(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qemu.qmp", None)
    with pytest.raises(HoldfastError, match=r"holdfast\[vm\]"):
        opened(qemu, "snap-a")
