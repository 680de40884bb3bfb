"""qcow2 images as volumes: what is read, what persistent bitmaps tell, and what cannot be read."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from holdfast import Consistency, ErrorCode, Extent, StateManager, VolumeSpec
from holdfast.results import Reading
from holdfast.sources import BackupRun, open_source
from holdfast.sources.qcow2 import Qcow2Source
from tests.client.rig import error_of, noise
from tests.client.tracking_suite import TrackingSuite
from tests.support.nbd import make_qcow2, plain_bytes, qemu_io
from tests.support.qemu import program, tool
from tests.support.waiting import wait_until

KIB = 1 << 10
MIB = 1 << 20
SIZE = 12 * MIB
_numbers = itertools.count(1)


def bitmaps(image: Path) -> dict[str, frozenset[str]]:
    """The flags of an image's bitmaps by name, as `qemu-img info` prints them."""
    found: dict[str, frozenset[str]] = {}
    flags: set[str] = set()
    for line in tool("qemu-img", "info", image).splitlines():
        word, _, value = line.strip().partition(": ")
        if word.startswith("[") and value:
            flags.add(value)
        elif word == "name":
            found[value], flags = frozenset(flags), set()
    return found


def opened(image: Path, *, point: str = "", parent: str = "") -> Qcow2Source:
    """The source of a session."""
    source = open_source(VolumeSpec(f"qcow2:{image}"), BackupRun("vm", point, parent))
    assert isinstance(source, Qcow2Source)
    return source


def read(source: Qcow2Source, offset: int, length: int) -> bytes:
    """Bytes of a source."""
    buffer = bytearray(length)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


class Qcow2Volume:
    """An image as the suite of change trackers drives it."""

    name = "root"
    size_bytes = SIZE
    sources = None

    def __init__(self, manager: StateManager, folder: Path) -> None:
        """Make an image and register it."""
        self.manager = manager
        self.vm_id = f"qcow2-{next(_numbers)}"
        self.folder = folder
        self.image = make_qcow2(folder / f"{self.vm_id}.qcow2", SIZE)
        manager.register_vm(self.vm_id, {"root": f"qcow2:{self.image}"})

    def write(self, offset: int, data: bytes) -> None:
        """Write as a VM that is started and stopped."""
        piece = self.folder / "piece"
        piece.write_bytes(data)
        qemu_io(self.image, f"write -s {piece} {offset} {len(data)}")

    def content(self) -> bytes:
        """The disk's bytes."""
        return plain_bytes(self.image, self.folder)

    def lose(self) -> None:
        """Let QEMU be killed while the image is open: its bitmaps are inconsistent from then on."""
        killed_while_open(self.image)


def killed_while_open(image: Path, *commands: str) -> None:
    """Open an image for writing, write, flush, and kill whoever did."""
    process = subprocess.Popen(
        [program("qemu-io"), "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        # One at a time: what comes in one piece is read in one piece, and all but its first line forgotten till later.
        for command in (*commands, "write -f 0 512"):
            process.stdin.write(command + "\n")
            process.stdin.flush()
            while "wrote" not in process.stdout.readline():
                assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def volume(manager: StateManager, tmp_path: Path) -> Qcow2Volume:
    """A VM with a qcow2 image."""
    return Qcow2Volume(manager, tmp_path)


@pytest.mark.slow
class TestThePersistentBitmap(TrackingSuite):
    """Bitmaps in the image keep what the suite demands."""


def test_an_incremental_reads_what_the_bitmap_has(volume: Qcow2Volume, tmp_path: Path) -> None:
    volume.write(0, noise(2 * MIB, 1))
    snapshot = volume.manager.create_snapshot(volume.vm_id)
    assert bitmaps(volume.image) == {f"holdfast-{snapshot}": frozenset({"auto"})}
    volume.write(MIB, noise(4096, 2))
    backup = volume.manager.incremental_backup(volume.vm_id, snapshot)
    point = volume.manager.point(backup)
    assert (point.volumes[0].reading, point.volumes[0].consistency) == (Reading.CHANGED, Consistency.OFFLINE)
    assert point.stats.read_bytes == 64 * KIB
    assert bitmaps(volume.image) == {f"holdfast-{backup}": frozenset({"auto"})}
    restored = volume.manager.restore_vm(snapshot, backup, target=tmp_path / "restored")
    assert (restored / "root.raw").read_bytes() == volume.content()


def test_what_is_allocated_and_what_lies_behind(tmp_path: Path) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", SIZE, "write -P 1 0 2M", "write -P 2 8M 64k")
    image = tmp_path / "a, b: {c}.qcow2"
    tool("qemu-img", "create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", image)
    qemu_io(image, "write -P 3 1M 64k", "write -z 8M 64k", "write -P 4 11M 512")
    source = open_source(VolumeSpec("qcow2:" + str(image).replace("%", "%25")), None)
    assert isinstance(source, Qcow2Source)
    assert source.size_bytes == SIZE
    assert source.allocated(0, SIZE) == [Extent(0, 2 * MIB), Extent(11 * MIB, 11 * MIB + 64 * KIB)]
    assert source.allocated(MIB + 5, 2 * MIB + 5) == [Extent(MIB + 5, 2 * MIB)]
    assert read(source, MIB - 1, 3) == b"\1\3\3"
    assert source.changed_since("snap-x") is None
    assert source.why_unknown() == ""
    assert source.finish() is Consistency.OFFLINE
    os.utime(base)
    assert error_of(source.finish).code is ErrorCode.VOLUME_CHANGED
    source.close()
    source.close()


def test_data_that_is_kept_outside_of_the_image(tmp_path: Path) -> None:
    data = tmp_path / "data.raw"
    options = ("-o", f"data_file={data},data_file_raw=on")
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, "write -P 7 1M 64k", options=options)
    source = opened(image)
    assert read(source, MIB, 2) == b"\7\7"
    os.utime(data)
    assert error_of(source.finish).code is ErrorCode.VOLUME_CHANGED
    source.close()


def test_no_vm_starts_on_it_meanwhile(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, "write -P 1 0 64k")
    source = opened(image)
    with pytest.raises(AssertionError, match="lock"):
        qemu_io(image, "write -P 2 0 64k")
    assert source.finish() is Consistency.OFFLINE
    source.close()
    qemu_io(image, "write -P 2 0 64k")


def test_the_bitmap_must_be_of_the_parent_and_whole(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, "write -P 1 0 64k")
    for name in ("holdfast-a", "holdfast-stopped", "mine"):
        tool("qemu-img", "bitmap", "--add", image, name)
    tool("qemu-img", "bitmap", "--disable", image, "holdfast-stopped")
    qemu_io(image, "write -P 1 128k 64k")
    for parent, why in (("b", "and not holdfast-b"), ("stopped", "disabled"), ("mine", "and not holdfast-mine")):
        source = opened(image, parent=parent)
        assert source.changed_since(parent) is None
        assert why in source.why_unknown()
        source.close()
    source = opened(image, parent="a")
    assert source.changed_since("a") == [Extent(128 * KIB, 192 * KIB)]
    assert source.changed_since("b") is None
    assert source.why_unknown() == ""
    source.close()
    killed_while_open(image, "write -P 5 1M 64k")
    source = opened(image, parent="a")
    assert source.changed_since("a") is None
    assert "inconsistent" in source.why_unknown()
    assert read(source, MIB, 1) == b"\5"
    source.close()
    bare = opened(make_qcow2(tmp_path / "bare.qcow2", SIZE), parent="a")
    assert "no bitmap holdfast-a" in bare.why_unknown()
    bare.close()


def test_each_end_leaves_a_tracker_that_is_right(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, "write -P 1 0 64k")
    tool("qemu-img", "bitmap", "--add", image, "mine")
    source = opened(image, point="one")
    source.committed()
    source.close()
    assert bitmaps(image).keys() == {"mine", "holdfast-one"}
    qemu_io(image, "write -P 2 1M 64k")
    source = opened(image, point="two", parent="one")
    source.abandoned()
    source.close()
    assert bitmaps(image).keys() == {"mine", "holdfast-one"}
    # Nobody is told where the process is killed: the parent's bitmap records on beside what is left.
    opened(image, point="three", parent="one").close()
    assert bitmaps(image).keys() == {"mine", "holdfast-one", "holdfast-three"}
    qemu_io(image, "write -P 2 2M 64k")
    source = opened(image, point="four", parent="one")
    assert source.changed_since("one") == [Extent(MIB, MIB + 64 * KIB), Extent(2 * MIB, 2 * MIB + 64 * KIB)]
    source.committed()
    source.close()
    assert bitmaps(image).keys() == {"mine", "holdfast-four"}


def test_without_tracking_the_image_stays_as_it_is(manager: StateManager, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, "write -P 1 0 64k")
    before = (image.read_bytes(), image.stat().st_mtime_ns)
    manager.register_vm("untracked", {"root": f"qcow2:{image}?tracking=off"})
    snapshot = manager.create_snapshot("untracked")
    backup = manager.incremental_backup("untracked", snapshot)
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before
    volume = manager.point(backup).volumes[0]
    assert (volume.reading, volume.reading_note) == (Reading.COMPARED, "")
    assert manager.last_transfer is not None
    assert manager.last_transfer.notices == ()


def test_an_image_that_can_hold_no_bitmap_is_backed_up_and_says_so(manager: StateManager, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "old.qcow2", SIZE, "write -P 1 0 64k", options=("-o", "compat=0.10"))
    manager.register_vm("old", {"root": f"qcow2:{image}"})
    snapshot = manager.create_snapshot("old")
    assert manager.last_transfer is not None
    assert any("tracking=off" in notice for notice in manager.last_transfer.notices)
    target = manager.restore_vm(snapshot, "", target=tmp_path / "restored")
    assert (target / "root.raw").read_bytes() == plain_bytes(image, tmp_path)


def _missing(image: Path) -> None:
    image.unlink()


def _raw(image: Path) -> None:
    image.write_bytes(b"no image" * 1000)


def _encrypted(image: Path) -> None:
    with image.open("r+b") as stream:
        stream.seek(32)  # the method of encryption; 1 is AES, which the tools still read
        stream.write(b"\0\0\0\1")


def _corrupt(image: Path) -> None:
    with image.open("r+b") as stream:
        stream.seek(79)
        stream.write(b"\2")


def _unbacked(image: Path) -> None:
    image.unlink()
    tool("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", image.with_suffix(".gone"), "-F", "raw", image, "1M")


def _folder(image: Path) -> None:
    image.unlink()
    image.mkdir()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_missing, "No such file"),
        (_raw, "not in qcow2 format"),
        (_encrypted, "encrypted"),
        (_corrupt, "corrupt"),
        (_unbacked, "gone"),
        (_folder, "neither a file"),
    ],
)
def test_what_cannot_be_read_says_so_and_stays_as_it_is(
    tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, "write -P 1 0 64k")
    spoil(image)
    before = image.read_bytes() if image.is_file() else b""
    error = error_of(lambda: opened(image, point="new", parent="old"))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert str(image) in error.message
    assert why in error.message
    assert (image.read_bytes() if image.is_file() else b"") == before


def test_an_image_in_use_is_named_so(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, "write -P 1 0 64k")
    process = subprocess.Popen(
        [program("qemu-io"), "-f", "qcow2", image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("map\n")
        process.stdin.flush()
        assert process.stdout.readline()
        error = error_of(lambda: opened(image, point="new"))
    finally:
        process.communicate("quit\n", timeout=30)
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "another process uses the image; stop the VM" in error.message
    assert bitmaps(image) == {}


def test_without_qemus_tools_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE)
    monkeypatch.setenv("PATH", str(tmp_path))
    error = error_of(lambda: opened(image))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "qemu-utils" in error.message


def test_a_child_that_dies_in_the_middle_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, "write -P 1 0 64k")
    source = opened(image, point="new")
    process = source._export._process
    assert process is not None
    process.kill()
    process.wait()
    assert error_of(lambda: read(source, 0, 512)).code is ErrorCode.SOURCE_UNREADABLE
    source.abandoned()
    source.close()
    assert bitmaps(image) == {}
    assert not source._export._folder.exists()


_OPEN_AND_WAIT = """
import sys
from holdfast.sources import BackupRun
from holdfast.sources.qcow2 import Qcow2Source

source = Qcow2Source(sys.argv[1], BackupRun("vm", "new", "old"))
print(source._export._process.pid, source.size_bytes, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for sockets, whose paths have to be short."""
    with tempfile.TemporaryDirectory(prefix="holdfast-") as folder:
        yield Path(folder)


def test_a_killed_backup_leaves_no_child_and_loses_no_change(tmp_path: Path, short_folder: Path) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE, "write -P 1 0 64k")
    tool("qemu-img", "bitmap", "--add", image, "holdfast-old")
    qemu_io(image, "write -P 2 1M 64k")
    process = subprocess.Popen(
        [sys.executable, "-c", _OPEN_AND_WAIT, str(image)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(short_folder)},
    )
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline().split()[0])
        assert psutil.pid_exists(child)
    finally:
        process.kill()
        process.communicate()
    wait_until(lambda: not running(child), "the end of qemu-nbd")
    qemu_io(image, "write -P 3 2M 64k")
    source = opened(image, point="next", parent="old")
    assert source.changed_since("old") == [Extent(MIB, MIB + 64 * KIB), Extent(2 * MIB, 2 * MIB + 64 * KIB)]
    source.committed()
    source.close()
    assert bitmaps(image).keys() == {"holdfast-next"}


def running(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_temporary_folder_that_is_too_deep_for_a_socket_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_qcow2(tmp_path / "disk.qcow2", SIZE)
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    error = error_of(lambda: opened(image, point="new"))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert "set TMPDIR" in error.message
    assert bitmaps(image) == {}
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize("new_size", [SIZE + 3 * MIB, SIZE - 5 * MIB])
def test_zeros_and_other_sizes_are_changes_too(volume: Qcow2Volume, tmp_path: Path, new_size: int) -> None:
    volume.write(0, noise(SIZE, 1))
    snapshot = volume.manager.create_snapshot(volume.vm_id)
    qemu_io(volume.image, "write -z 1M 1M", "write -z -u 3M 128k", "discard 5M 1M")
    shrink = ("--shrink",) if new_size < SIZE else ()
    tool("qemu-img", "resize", "-q", "-f", "qcow2", *shrink, volume.image, str(new_size))
    backup = volume.manager.incremental_backup(volume.vm_id, snapshot)
    assert volume.manager.point(backup).volumes[0].reading is Reading.CHANGED
    restored = volume.manager.restore_vm(snapshot, backup, target=tmp_path / "restored")
    assert (restored / "root.raw").read_bytes() == volume.content()
