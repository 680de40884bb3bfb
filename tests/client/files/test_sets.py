"""A directory becomes a set and the set a directory again: the same in all that is kept; nothing leads out of it."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from holdfast import ErrorCode, HoldfastError
from holdfast.files.directory import DirectoryTree
from holdfast_core.model.files.sets import TRAILER_BYTES, Trailer, encode_end
from holdfast_proto.v1 import files_pb2
from holdfast_proto.v1.files_pb2 import FileEntry
from tests.client.files.trees import (
    MIB,
    Opened,
    entries_of,
    likenesses,
    make_tree,
    retrieve,
    set_bytes,
    set_of,
)
from tests.client.rig import allocated_bytes, error_of


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source")
    data = set_of(source)
    target = tmp_path / "new" / "target"
    result = retrieve(Opened(data).tree, target)
    assert likenesses(target) == likenesses(source)
    assert result.file_count == len(likenesses(source)) == len(entries_of(data))
    assert allocated_bytes(target / "sparse") <= 64 * 1024
    assert allocated_bytes(target / "zeros") == 0
    assert not list(target.glob(".holdfast*"))


def test_the_same_tree_makes_the_same_bytes(tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source")
    data = set_of(source)
    retrieve(Opened(data).tree, tmp_path / "copy")
    assert set_of(tmp_path / "copy") == data
    assert set_of(source) == data


def test_zeros_and_holes_take_nothing(tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source")
    by_path = {entry.path: entry for entry in entries_of(set_of(source))}
    assert not by_path[b"zeros"].extents
    assert by_path[b"zeros"].size_bytes == 100_000
    (extent,) = by_path[b"sparse"].extents
    assert (extent.offset, extent.length) == (4 * MIB, 4096)
    (extent,) = by_path[b"big.bin"].extents
    assert (extent.offset, extent.length) == (0, 3 * MIB + 77)


def test_patterns_take_files_and_the_directories_they_are_in(tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source")
    paths = [entry.path for entry in entries_of(set_of(source, ("*.txt", "/many/"), ("file-0[12]*", "file-0000*")))]
    few = [path for path in paths if not path.startswith(b"many/")]
    assert few == [b"dir", b"dir/sub", b"dir/sub/small.txt", b"empty.txt", b"many"]
    assert len(paths) - len(few) == 99
    error = error_of(lambda: set_of(source, ("*.safetensors",)))
    assert error.code is ErrorCode.NOT_FOUND


def test_part_of_a_set(tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source")
    opened = Opened(set_of(source))
    retrieve(opened.tree, tmp_path / "part", ("zweiter name", "/dir/run.sh"))
    assert sorted(likenesses(tmp_path / "part")) == [b"dir", b"dir/run.sh", b"zweiter name"]
    assert (tmp_path / "part" / "zweiter name").read_text() == "small\n"
    assert sum(end - start for start, end in opened.ranges) == len("#!/bin/sh\n") + len("small\n")


def test_a_whole_set_is_read_in_one_range(tmp_path: Path) -> None:
    opened = Opened(set_of(make_tree(tmp_path / "source")))
    retrieve(opened.tree, tmp_path / "target")
    assert len(opened.ranges) == 1


def test_who_is_not_root_gets_files_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [
        FileEntry(path=b"dir", kind=DIRECTORY, mode=0o500, uid=7),
        FileEntry(path=b"dir/file", kind=files_pb2.FILE_KIND_REGULAR, mode=0o6755, uid=7, gid=8),
        FileEntry(path=b"disk", kind=files_pb2.FILE_KIND_BLOCK_DEVICE, mode=0o660, device_major=8),
        FileEntry(path=b"pipe", kind=files_pb2.FILE_KIND_FIFO, mode=0o4600),
    ]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    result = retrieve(Opened(encode_end(files, content_bytes=0)).tree, tmp_path / "target")
    assert result.left_out == ("disk",)
    assert result.file_count == 3
    found = likenesses(tmp_path / "target")
    assert {path: each.mode for path, each in found.items()} == {b"dir": 0o500, b"dir/file": 0o755, b"pipe": 0o600}
    assert {each.owner for each in found.values()} == {(os.getuid(), os.getgid())}


def test_nothing_is_overwritten_and_nothing_left_behind(tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source")
    target = tmp_path / "target"
    target.mkdir()
    (target / "slow").write_text("mine")
    error = error_of(lambda: retrieve(Opened(set_of(source)).tree, target))
    assert error.code is ErrorCode.TARGET_EXISTS
    assert [path.name for path in target.iterdir()] == ["slow"]
    assert (target / "slow").read_text() == "mine"
    retrieve(Opened(set_of(source)).tree, target, ("/dir/",))
    assert sorted(path.name for path in target.iterdir()) == ["dir", "slow"]


def test_a_failure_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    data = set_of(make_tree(tmp_path / "source"))
    tree = Opened(data).tree
    tree._content._open_range = lambda start, end: iter([data[start : start + 5]])
    error = error_of(lambda: retrieve(tree, tmp_path / "new" / "target"))
    assert error.code is ErrorCode.CORRUPT
    assert not (tmp_path / "new").exists()


def entry(path: bytes, kind: int = files_pb2.FILE_KIND_REGULAR, **fields: object) -> FileEntry:
    """An entry that nobody checked."""
    return FileEntry(path=path, kind=kind, mode=0o644, **fields)  # type: ignore[arg-type]


DIRECTORY, LINK = files_pb2.FILE_KIND_DIRECTORY, files_pb2.FILE_KIND_SYMBOLIC_LINK
HOSTILE = {
    "above": [entry(b"../x")],
    "absolute": [entry(b"/etc/passwd")],
    "dots within": [entry(b"a", DIRECTORY), entry(b"a/../../x")],
    "empty name": [entry(b"a", DIRECTORY), entry(b"a//x")],
    "no name": [entry(b"")],
    "zero byte": [entry(b"a\0b")],
    "below a link": [entry(b"a", LINK, target=b"/etc"), entry(b"a/x")],
    "below a file": [entry(b"a"), entry(b"a/x")],
    "below nothing": [entry(b"a/x")],
    "twice": [entry(b"a"), entry(b"a")],
    "a link and a directory": [entry(b"a", LINK, target=b"/etc"), entry(b"a", DIRECTORY), entry(b"a/x")],
    "out of order": [entry(b"b"), entry(b"a")],
    "hard link out of it": [entry(b"a", files_pb2.FILE_KIND_HARD_LINK, target=b"/etc/passwd")],
    "hard link to a link": [
        entry(b"a", LINK, target=b"/etc/passwd"),
        entry(b"b", files_pb2.FILE_KIND_HARD_LINK, target=b"a"),
    ],
    "unknown kind": [entry(b"a", 77)],
    "long name": [entry(b"n" * 256)],
    "content behind the end": [entry(b"a", size_bytes=4, extents=[files_pb2.FileExtent(offset=0, length=5)])],
    "content that is not there": [entry(b"a", size_bytes=5, extents=[files_pb2.FileExtent(offset=0, length=5)])],
    "overlapping content": [
        entry(b"a", size_bytes=9, extents=[files_pb2.FileExtent(offset=4, length=2), files_pb2.FileExtent(length=2)])
    ],
    "mode": [FileEntry(path=b"a", kind=files_pb2.FILE_KIND_REGULAR, mode=0o100644)],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused(name: str) -> None:
    error = error_of(lambda: Opened(encode_end(HOSTILE[name], content_bytes=0)))
    assert error.code is ErrorCode.CORRUPT


def test_mutated_ends_are_refused_or_harmless(tmp_path: Path) -> None:
    end = bytearray(encode_end(entries_of(set_of(make_tree(tmp_path / "source"))), content_bytes=0))
    chance = random.Random(7)
    codes: list[ErrorCode | None] = []
    for _ in range(400):
        mutated = bytearray(end)
        for _ in range(chance.randint(1, 3)):
            mutated[chance.randrange(len(mutated))] ^= 1 << chance.randrange(8)
        data = bytes(mutated[: chance.choice((len(mutated), chance.randrange(len(mutated))))])
        try:
            entries_of(data)
        except HoldfastError as error:
            codes.append(error.code)
        else:
            # A bit of a name or a time may well be another one: content that is whole is guarded elsewhere.
            codes.append(None)
    assert set(codes) <= {None, ErrorCode.CORRUPT}
    assert codes.count(ErrorCode.CORRUPT) > 350


def test_a_manifest_that_expands_without_end_is_refused() -> None:
    packed = encode_end([], content_bytes=0)
    huge = Trailer(0, len(packed) - TRAILER_BYTES, 2**40).encode()
    assert error_of(lambda: entries_of(packed[:-TRAILER_BYTES] + huge)).code is ErrorCode.CORRUPT


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source")
    tree = DirectoryTree(source)

    def changing() -> bytes:
        original = tree._read

        def read(descriptor: int, offset: int, length: int, path: bytes) -> bytes:
            with (source / "big.bin").open("ab") as stream:
                stream.write(b"more")
            return original(descriptor, offset, length, path)

        tree._read = read  # type: ignore[method-assign]
        return set_bytes(tree)

    error = error_of(changing)
    assert error.code is ErrorCode.VOLUME_CHANGED
    assert "big.bin" in str(error)


def test_a_directory_that_turns_into_a_link_is_not_followed(tmp_path: Path) -> None:
    source, elsewhere = make_tree(tmp_path / "source"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "secret.txt").write_text("secret")
    tree = DirectoryTree(source)
    original = tree._open

    def swap(place: object, flags: int) -> int:
        if flags & os.O_DIRECTORY and (source / "many").is_dir() and not (source / "many").is_symlink():
            (source / "many").rename(tmp_path / "moved")
            (source / "many").symlink_to(elsewhere)
        return original(place, flags)  # type: ignore[arg-type]

    tree._open = swap  # type: ignore[method-assign]
    assert error_of(lambda: set_bytes(tree)).code in (ErrorCode.VOLUME_CHANGED, ErrorCode.SOURCE_UNREADABLE)


def test_a_source_that_is_missing_or_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        path = tmp_path / name
        assert error_of(lambda path=path: DirectoryTree(path)).code is ErrorCode.SOURCE_UNREADABLE  # type: ignore[misc]
