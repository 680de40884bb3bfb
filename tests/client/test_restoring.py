"""Restoring beyond raw files in a new directory: qcow2 images, older copies brought up to date, the VM's definition."""

from __future__ import annotations

import ctypes
import errno
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast import ErrorCode, HoldfastError
from holdfast.descriptors import data_extents
from holdfast.holes import clear
from holdfast.testing import MemoryCluster
from tests.client.rig import (
    BLOCK,
    TENANT,
    Vm,
    allocated_bytes,
    data_ids,
    digest,
    error_of,
    make_sparse,
    noise,
    store_of,
    write_at,
)

MIB = 1024 * 1024
SIZE = 40 * MIB


def image_tool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run qemu-img."""
    return subprocess.run(["qemu-img", *map(str, words)], capture_output=True, text=True, timeout=60)


def check_same_image(raw: Path, image: Path) -> None:
    """Ask qemu-img whether an image is sound and holds what a raw file holds."""
    checked = image_tool("check", "-f", "qcow2", image)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    compared = image_tool("compare", "-f", "raw", "-F", "qcow2", raw, image)
    assert compared.returncode == 0, compared.stdout + compared.stderr


@pytest.fixture
def vm_with_data(vm: Vm) -> Vm:
    """A VM with a sparse disk of 40 MiB and 3.2 MB in it."""
    vm.volume(SIZE, [(0, noise(MIB, 1)), (8 * MIB + 4096, noise(200_000, 2)), (33 * MIB, noise(2 * MIB, 3))])
    vm.register()
    return vm


@pytest.mark.parametrize("block_bytes", [16 * 1024, BLOCK, MIB])
def test_a_qcow2_image_holds_what_the_disk_held(vm: Vm, tmp_path: Path, block_bytes: int) -> None:
    vm.volume(SIZE, [(0, noise(70_000, 1)), (9 * MIB + 4096, noise(MIB, 2)), (SIZE - 5000, noise(5000, 3))])
    vm.volume(3 * BLOCK + 100, [(BLOCK, b"x" * 1000)], name="small")
    vm.volume(MIB, name="zero")
    vm.register("root", "small", "zero", block_bytes=block_bytes)
    target = vm.manager.restore_vm(vm.snapshot(), target=tmp_path / "to", image_format="qcow2")
    assert {path.name for path in target.iterdir()} == {"root.qcow2", "small.qcow2", "zero.qcow2", "vm.json"}
    check_same_image(vm.path(), target / "root.qcow2")
    # A sector is the least that a qcow2 image can be short by: the rest of the last one is zero.
    with vm.path("small").open("r+b") as stream:
        stream.truncate(3 * BLOCK + 512)
    check_same_image(vm.path("small"), target / "small.qcow2")
    check_same_image(vm.path("zero"), target / "zero.qcow2")
    assert allocated_bytes(target / "root.qcow2") < 6 * MIB, "zeros take no clusters"
    assert json.loads((target / "vm.json").read_bytes())["volumes"][0]["format"] == "qcow2"


def test_over_an_older_copy_only_what_differs_is_fetched(vm_with_data: Vm, tmp_path: Path) -> None:
    vm = vm_with_data
    snapshot = vm.snapshot()
    copy = vm.manager.restore_vm(snapshot, target=tmp_path / "copy")
    first = vm.manager.last_restore
    assert first is not None
    write_at(vm.path(), 5 * BLOCK + 10, b"changed")
    write_at(vm.path(), 20 * MIB, noise(BLOCK, 9))
    with vm.path().open("r+b") as stream:
        clear(stream.fileno(), 33 * MIB, 34 * MIB)
    backup = vm.manager.incremental_backup(vm.name, snapshot)
    assert vm.manager.restore_vm(snapshot, backup, onto=copy) == copy
    report = vm.manager.last_restore
    assert report is not None
    assert digest(copy / "root.raw") == digest(vm.path())
    assert report.fetched_bytes == 2 * BLOCK
    assert report.kept_bytes == first.fetched_bytes - MIB - BLOCK
    with (copy / "root.raw").open("rb") as stream:
        assert not list(data_extents(stream.fileno(), 33 * MIB, 34 * MIB)), "what became zero is a hole again"
    assert json.loads((copy / "vm.json").read_bytes())["point_id"] == backup
    assert sorted(path.name for path in copy.iterdir()) == ["root.raw", "vm.json"]


def test_over_a_copy_that_has_nothing_in_common(vm_with_data: Vm, tmp_path: Path) -> None:
    vm = vm_with_data
    vm.volume(MIB, [(0, noise(1000, 5))], name="data")
    vm.register("root", "data")
    snapshot = vm.snapshot()
    copy = tmp_path / "copy"
    copy.mkdir()
    make_sparse(copy / "root.raw", SIZE + 3 * MIB, [(0, noise(SIZE, 77)), (SIZE + MIB, b"longer")])
    vm.manager.restore_vm(snapshot, onto=copy)
    assert digest(copy / "root.raw") == digest(vm.path())
    assert digest(copy / "data.raw") == digest(vm.path("data")), "a file that was not there is made"
    report = vm.manager.last_restore
    assert report is not None
    assert report.kept_bytes == 0


@pytest.mark.slow
def test_a_restore_over_a_copy_that_fails_goes_on_later(cluster: MemoryCluster, tmp_path: Path) -> None:
    manager = cluster.state_manager()
    vm = Vm(manager, "fails", tmp_path)
    vm.volume(SIZE, [(0, noise(MIB, 1)), (33 * MIB, noise(2 * MIB, 3))])
    vm.register()
    snapshot = vm.snapshot()
    before = set(data_ids(cluster, 0))
    copy = manager.restore_vm(snapshot, target=tmp_path / "copy")
    write_at(vm.path(), 33 * MIB, noise(BLOCK, 50))
    write_at(vm.path(), 0, noise(BLOCK, 51))
    backup = vm.manager.incremental_backup(vm.name, snapshot)
    lost = sorted(set(data_ids(cluster, 0)) - before)[0]
    for number in range(3):
        store_of(cluster, number).delete(TENANT, [lost])
    error = error_of(lambda: manager.restore_vm(snapshot, backup, onto=copy))
    assert error.code is ErrorCode.MISSING
    assert error.block_ids == (lost,)
    assert not (copy / "root.raw").exists(), "it is neither the old state nor the new one"
    assert (copy / ".root.raw.partial").exists()
    assert manager.restore_vm(snapshot, onto=copy) == copy
    report = manager.last_restore
    assert report is not None
    assert report.fetched_bytes == BLOCK, "only the block that the failed restore had brought differs"
    again = manager.restore_vm(snapshot, target=tmp_path / "again")
    assert digest(copy / "root.raw") == digest(again / "root.raw")
    assert not (copy / ".root.raw.partial").exists()


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Callable[[Path], None]]:
    """Lock files in another process, as QEMU does with its images."""
    children: list[subprocess.Popen[str]] = []
    program = (
        "import fcntl, sys\nf = open(sys.argv[1], 'r+b')\nfcntl.lockf(f, fcntl.LOCK_SH, 1, 100)\n"
        "print('locked', flush=True)\nsys.stdin.read()"
    )

    def lock(path: Path) -> None:
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"

    yield lock
    for child in children:
        child.communicate("")


def test_a_copy_that_is_in_use_is_refused(vm_with_data: Vm, tmp_path: Path, locked: Callable[[Path], None]) -> None:
    snapshot = vm_with_data.snapshot()
    copy = vm_with_data.manager.restore_vm(snapshot, target=tmp_path / "copy")
    write_at(copy / "root.raw", 0, b"the guest's own")
    before = digest(copy / "root.raw")
    locked(copy / "root.raw")
    with pytest.raises(HoldfastError, match="in use by another program") as caught:
        vm_with_data.manager.restore_vm(snapshot, onto=copy)
    assert caught.value.code is ErrorCode.TARGET_UNWRITABLE
    assert digest(copy / "root.raw") == before


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"image_format": "vdi"}, "raw or qcow2"),
        ({"onto": "copy", "target": "other"}, "no target="),
        ({"onto": "copy", "image_format": "qcow2"}, "no other format"),
        ({"onto": "nowhere"}, "there is no directory"),
    ],
)
def test_what_does_not_go_together(vm_with_data: Vm, tmp_path: Path, options: dict[str, str], told: str) -> None:
    snapshot = vm_with_data.snapshot()
    (tmp_path / "copy").mkdir()
    given = {name: str(tmp_path / value) if name != "image_format" else value for name, value in options.items()}
    with pytest.raises(HoldfastError, match=told) as caught:
        vm_with_data.manager.restore_vm(snapshot, **given)  # type: ignore[arg-type]
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert list(tmp_path.glob("copy/*")) == []


def test_a_finished_and_an_unfinished_file_of_one_volume_are_not_chosen_between(
    vm_with_data: Vm, tmp_path: Path
) -> None:
    snapshot = vm_with_data.snapshot()
    copy = vm_with_data.manager.restore_vm(snapshot, target=tmp_path / "copy")
    (copy / ".root.raw.partial").write_bytes(b"of an earlier attempt")
    with pytest.raises(HoldfastError, match="are both there") as caught:
        vm_with_data.manager.restore_vm(snapshot, onto=copy)
    assert caught.value.code is ErrorCode.TARGET_EXISTS
    assert (copy / ".root.raw.partial").read_bytes() == b"of an earlier attempt"
    assert digest(copy / "root.raw") == digest(vm_with_data.path())


def test_holes_where_the_file_system_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoHoles:
        """A C library on a file system without holes."""

        def fallocate(self, *_: object) -> int:
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    path = tmp_path / "file"
    path.write_bytes(noise(3 * MIB, 1))
    monkeypatch.setattr("holdfast.holes._libc", NoHoles())
    with path.open("r+b") as stream:
        clear(stream.fileno(), 100, 2 * MIB + 100)
    assert path.read_bytes() == noise(3 * MIB, 1)[:100] + bytes(2 * MIB) + noise(3 * MIB, 1)[2 * MIB + 100 :]
