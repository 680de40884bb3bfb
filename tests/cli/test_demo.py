"""`holdfast demo`: the whole job in a small size, the disks it makes, and what it says of a difference."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from holdfast.cli import main
from holdfast.cli.demo.command import Demo
from holdfast.cli.demo.files import Changes, SourceFile, collect, plan_changes
from holdfast.cli.demo.images import TOOL_PATH, Ext4Maker, LaidOutMaker, choose_maker, copy_sparse
from holdfast.cli.demo.report import Read, print_report
from holdfast_core.model.errors import ErrorCode, HoldfastError
from tests.e2e.harness import run
from tests.e2e.images import KIB, MIB, digest


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_whole_job(tmp_path: Path) -> None:
    work = tmp_path / "demo"
    done = run("demo", "--size", "8", "--dir", str(work))
    told = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    for saved in ("snapshot of vm-1", "backup of vm-1", "vm-2, same template", "application data"):
        assert re.search(rf"^{saved} +\d", told, re.MULTILINE), f"a row for {saved} in {told}"
    assert len(re.findall("identical$", told, re.MULTILINE)) == 4
    assert "DIFFERENT" not in told
    for fact in ("logical", "changed", "dedup", "compression", "on disk"):
        assert re.search(rf"^{fact} +\d", told, re.MULTILINE)
    assert "node-2 was killed by SIGKILL" in done.stderr.decode()
    assert not list(work.glob("*.raw")), "the VMs' disks were thrown away"
    assert len(list(work.glob("rebuilt-*/root.raw"))) == 3
    again = run("demo", "--dir", str(work))
    assert again.returncode == 4
    assert b"is not empty" in again.stderr


def test_a_difference_ends_with_6(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    print_report([], [Read("vm", MIB, 1.0, True), Read("other", MIB, 1.0, False)], used_bytes=0, copies=3)
    assert re.search(r"^other +1 MiB +1\.00 s +DIFFERENT$", capsys.readouterr().out, re.MULTILINE)
    monkeypatch.setattr(Demo, "run", lambda self, file_bytes: False)
    assert main.run(["demo"]) == 6
    assert "differs from what was saved" in capsys.readouterr().err


def test_files_are_real_repeatable_and_enough() -> None:
    files = collect(3 * MIB)
    assert files == collect(3 * MIB)
    assert 3 * MIB <= sum(file.size_bytes for file in files) < 20 * MIB
    assert len({file.name for file in files}) == len(files)
    assert all(file.path.stat().st_size == file.size_bytes for file in files)


def test_changes_edit_remove_and_add(tmp_path: Path) -> None:
    files = collect(3 * MIB)
    present, installed = files[:-5], files[-5:]
    changes = plan_changes(present, installed, seed=1, folder=tmp_path / "a")
    again = plan_changes(present, installed, seed=1, folder=tmp_path / "b")
    assert changes.removed == again.removed
    assert [file.path.read_bytes() for file in changes.written] == [file.path.read_bytes() for file in again.written]
    names = {file.name for file in present}
    edited = [file for file in changes.written if file.name in names]
    assert edited
    assert set(changes.removed) <= names
    assert {file.name for file in installed} <= {file.name for file in changes.written}
    by_name = {file.name: file for file in present}
    assert all(file.path.read_bytes() != by_name[file.name].path.read_bytes() for file in edited)


@pytest.fixture
def files(tmp_path: Path) -> tuple[SourceFile, ...]:
    folder = tmp_path / "source"
    folder.mkdir()
    made = []
    for number in range(6):
        path = folder / str(number)
        path.write_bytes(f"file {number} ".encode() * (1000 * number + 1))
        made.append(SourceFile(path=path, name=f"deep/er/{number}", size_bytes=path.stat().st_size))
    return tuple(made)


def test_an_ext4_image_is_changed_as_a_guest_would(tmp_path: Path, files: tuple[SourceFile, ...]) -> None:
    """mkfs.ext4 and debugfs belong to every Debian and Ubuntu; the other maker has a test of its own."""
    maker = choose_maker(tmp_path)
    assert isinstance(maker, Ext4Maker)
    image = tmp_path / "disk.raw"
    maker.make(image, files[:5], size_bytes=16 * MIB)
    assert image.stat().st_size == 16 * MIB
    assert image.stat().st_blocks * 512 < 8 * MIB
    before = digest(image)
    copy = tmp_path / "copy.raw"
    maker.copy(image, copy)
    assert digest(copy) == before
    edited = SourceFile(path=files[5].path, name=files[1].name, size_bytes=files[5].size_bytes)
    added = SourceFile(path=files[5].path, name="other/new", size_bytes=files[5].size_bytes)
    maker.change(image, Changes(removed=(files[0].name,), written=(edited, added)))
    assert digest(image) != before
    assert digest(copy) == before

    def inside(name: str) -> bytes:
        command = ["debugfs", "-R", f"cat /{name}", str(image)]
        return subprocess.run(command, capture_output=True, check=True, env={"PATH": TOOL_PATH}).stdout

    assert inside(files[0].name) == b""
    assert inside(files[1].name) == files[5].path.read_bytes()
    assert inside("other/new") == files[5].path.read_bytes()
    assert inside(files[2].name) == files[2].path.read_bytes()
    absent = SourceFile(path=tmp_path / "absent", name="x", size_bytes=1)
    with pytest.raises(HoldfastError, match="write: No such file"):
        maker.change(image, Changes(removed=(), written=(absent,)))


def test_a_disk_that_is_too_small_is_told(tmp_path: Path, files: tuple[SourceFile, ...]) -> None:
    maker = choose_maker(tmp_path)
    with pytest.raises(HoldfastError, match=r"mkfs\.ext4 failed") as caught:
        maker.make(tmp_path / "disk.raw", files, size_bytes=64 * KIB)
    assert caught.value.code is ErrorCode.INTERNAL


def test_without_the_tools_files_are_laid_out_by_hand(tmp_path: Path, files: tuple[SourceFile, ...]) -> None:
    maker = choose_maker(tmp_path, tool_path=str(tmp_path))
    assert isinstance(maker, LaidOutMaker)
    image, copy = tmp_path / "disk.raw", tmp_path / "copy.raw"
    maker.make(image, files[:5], size_bytes=16 * MIB)
    assert image.stat().st_size == 16 * MIB
    content = image.read_bytes()
    assert all(file.path.read_bytes() in content for file in files[:5])
    maker.copy(image, copy)
    larger = SourceFile(path=files[5].path, name=files[1].name, size_bytes=files[5].size_bytes)
    maker.change(image, Changes(removed=(files[4].name,), written=(larger,)))
    changed = image.read_bytes()
    assert files[4].path.read_bytes() not in changed
    assert files[5].path.read_bytes() in changed
    assert files[3].path.read_bytes() in changed
    assert copy.read_bytes() == content
    maker.change(copy, Changes(removed=(files[4].name,), written=(larger,)))
    assert copy.read_bytes() == changed, "the copy has places of its own"


def test_holes_stay_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    with source.open("wb") as sparse:
        sparse.truncate(64 * MIB)
        sparse.seek(40 * MIB)
        sparse.write(b"x" * MIB)
    copy_sparse(source, target)
    assert digest(target) == digest(source)
    assert target.stat().st_blocks * 512 <= 2 * MIB
