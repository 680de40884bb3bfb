"""Raw files as volume sources: what is read, what counts as changed, what cannot be read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast import Consistency, ErrorCode, Extent, RawFileSource, VolumeSpec
from holdfast.sources import open_source
from tests.client.rig import error_of, make_sparse, write_at

MIB = 1 << 20


def test_a_sparse_file_tells_its_extents(tmp_path: Path) -> None:
    path = make_sparse(tmp_path / "disk", 8 * MIB, [(2 * MIB, b"x" * MIB), (5 * MIB, b"y" * 4096)])
    source = RawFileSource(path)
    assert source.size_bytes == 8 * MIB
    assert source.allocated(0, 8 * MIB) == [Extent(2 * MIB, 3 * MIB), Extent(5 * MIB, 5 * MIB + 4096)]
    assert source.allocated(2 * MIB + 512, 2 * MIB + 1024) == [Extent(2 * MIB + 512, 2 * MIB + 1024)]
    assert source.allocated(6 * MIB, 8 * MIB) == []
    buffer = bytearray(8192)
    source.read_into(5 * MIB - 4096, memoryview(buffer))
    assert bytes(buffer) == bytes(4096) + b"y" * 4096
    assert source.finish() is Consistency.OFFLINE
    source.close()
    source.close()


def test_a_file_that_shrinks_while_its_extents_are_asked_for_is_found_out_by_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_sparse(tmp_path / "disk", 8 * MIB, [(2 * MIB, b"x" * MIB)])
    source = RawFileSource(path)
    seek = os.lseek

    def seek_late(descriptor: int, at: int, whence: int) -> int:
        if whence == os.SEEK_HOLE:
            os.truncate(path, 4096)
        return seek(descriptor, at, whence)

    monkeypatch.setattr(os, "lseek", seek_late)
    assert source.allocated(0, 8 * MIB) == [Extent(2 * MIB, 8 * MIB)]
    error = error_of(lambda: source.read_into(2 * MIB, memoryview(bytearray(4096))))
    assert error.code is ErrorCode.VOLUME_CHANGED
    source.close()


def test_it_is_never_mapped_and_knows_no_hints(tmp_path: Path) -> None:
    source = RawFileSource(make_sparse(tmp_path / "disk", MIB))
    assert source.changed_since("snap-x") is None
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    source.close()


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "no-entry"])
def test_what_cannot_be_read_says_so(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "no-entry":
        path = tmp_path / "file" / "below"
        (tmp_path / "file").write_bytes(b"")
    error = error_of(lambda: open_source(VolumeSpec(path)))
    assert error.code is ErrorCode.SOURCE_UNREADABLE
    assert str(path) in error.message


def _changed(path: Path, how: str) -> None:
    if how == "written":
        write_at(path, 100, b"!")
    elif how == "grown":
        os.truncate(path, path.stat().st_size + 4096)
    elif how == "touched":
        os.utime(path)
    else:
        other = path.with_suffix(".new")
        other.write_bytes(path.read_bytes())
        other.rename(path)


@pytest.mark.parametrize("how", ["written", "grown", "touched", "replaced"])
@pytest.mark.parametrize("live", [False, True])
def test_a_change_is_seen(tmp_path: Path, how: str, live: bool) -> None:
    path = make_sparse(tmp_path / "disk", MIB, [(0, b"x" * 4096)])
    source = RawFileSource(path, live=live)
    _changed(path, how)
    if live:
        assert source.finish() is Consistency.FUZZY
    else:
        assert error_of(source.finish).code is ErrorCode.VOLUME_CHANGED
    source.close()


def test_a_write_just_before_does_not_hide_one_just_after(tmp_path: Path) -> None:
    # Both fall into one tick of the kernel's clock unless opening waits for the file to have rested.
    path = make_sparse(tmp_path / "disk", MIB)
    for number in range(20):
        write_at(path, 0, bytes([number]))
        source = RawFileSource(path)
        write_at(path, 0, b"!")
        assert error_of(source.finish).code is ErrorCode.VOLUME_CHANGED
        source.close()


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = make_sparse(tmp_path / "disk", MIB, [(0, b"x" * MIB)])
    still, live = RawFileSource(path), RawFileSource(path, live=True)
    os.truncate(path, 4096)
    buffer = bytearray(b"?" * 8192)
    assert error_of(lambda: still.read_into(0, memoryview(buffer))).code is ErrorCode.VOLUME_CHANGED
    live.read_into(0, memoryview(buffer))
    assert bytes(buffer) == b"x" * 4096 + bytes(4096)
    still.close()
    live.close()


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 4)), max_size=6), st.integers(0, 40), st.integers(0, 40))
def test_what_is_outside_the_extents_is_zero(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, int]], a: int, b: int
) -> None:
    path = tmp_path_factory.mktemp("source") / "disk"
    make_sparse(path, 34 * 4096, [(at * 4096, b"z" * (count * 4096)) for at, count in pieces])
    start, end = sorted((a * 4096, b * 4096))
    data = path.read_bytes()
    source = RawFileSource(path, live=True)
    covered = bytearray(len(data))
    last = start
    for extent in source.allocated(start, end):
        assert last <= extent.start < extent.end <= min(end, len(data))
        last = extent.end
        covered[extent.start : extent.end] = data[extent.start : extent.end]
    assert covered[start:end] == data[start:end]
    source.close()
