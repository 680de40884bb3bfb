"""What the tests of files share: trees to keep, and their likeness as values that can be compared."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from holdfast.files.directory import DirectoryTree
from holdfast.files.results import RetrievedFiles
from holdfast.files.retrieval import TargetTree
from holdfast.files.stored import StoredTree
from holdfast.files.trees import FileTree
from holdfast.files.writing import SetWriter
from holdfast_core.model.files.patterns import select
from holdfast_core.model.files.sets import TRAILER_BYTES, decode_manifest, decode_trailer
from holdfast_proto.v1.files_pb2 import FileEntry
from tests.client.rig import noise

MIB = 1 << 20


@dataclass(frozen=True)
class Likeness:
    """All that is kept of a file; two names of one file have the same `first_name`."""

    kind: int
    mode: int
    owner: tuple[int, int]
    mtime_ns: int
    content: bytes
    target: bytes
    device: int
    first_name: bytes


def likenesses(folder: Path, *, whole_seconds: bool = False) -> dict[bytes, Likeness]:
    """Everything below a folder, by path."""
    root = os.fsencode(folder)
    found: dict[bytes, Likeness] = {}
    first_names: dict[tuple[int, int], bytes] = {}
    for path in sorted(_below(root)):
        status = os.lstat(path)
        name = path[len(root) + 1 :]
        kind = stat.S_IFMT(status.st_mode)
        found[name] = Likeness(
            kind=kind,
            mode=stat.S_IMODE(status.st_mode),
            owner=(status.st_uid, status.st_gid),
            mtime_ns=status.st_mtime_ns // 10**9 * 10**9 if whole_seconds else status.st_mtime_ns,
            content=Path(os.fsdecode(path)).read_bytes() if kind == stat.S_IFREG else b"",
            target=os.readlink(path) if kind == stat.S_IFLNK else b"",
            device=status.st_rdev,
            first_name=first_names.setdefault((status.st_dev, status.st_ino), name),
        )
    return found


def _below(folder: bytes) -> Iterator[bytes]:
    for entry in os.scandir(folder):
        yield entry.path
        if entry.is_dir(follow_symlinks=False):
            yield from _below(entry.path)


def make_tree(folder: Path) -> Path:
    """A tree with one of everything."""
    folder.mkdir()
    (folder / "big.bin").write_bytes(noise(3 * MIB + 77, 1))
    (folder / "empty.txt").touch()
    (folder / "dir" / "sub").mkdir(parents=True)
    (folder / "dir" / "sub" / "small.txt").write_text("small\n")
    os.link(folder / "dir" / "sub" / "small.txt", folder / "zweiter name")
    (folder / "dir" / "run.sh").write_text("#!/bin/sh\n")
    (folder / "dir" / "run.sh").chmod(0o750)
    (folder / "empty").mkdir()
    (folder / "fast").symlink_to("dir/sub")
    (folder / "slow").symlink_to("x" * 200)
    (folder / "dangling").symlink_to("/nowhere/at/all")
    os.mkfifo(folder / "fifo")
    with (folder / "sparse").open("wb") as stream:
        stream.truncate(9 * MIB + 5)
        stream.seek(4 * MIB + 100)
        stream.write(b"in the middle")
    with (folder / "hole at the end").open("wb") as stream:
        stream.write(b"begin")
        stream.truncate(MIB)
    (folder / "zeros").write_bytes(bytes(100_000))
    (Path(os.fsdecode(os.fsencode(folder) + b"/odd \xff\xfe\n name"))).write_bytes(b"odd")
    (folder / "many").mkdir()
    for number in range(300):
        (folder / "many" / f"file-{number:04}-{'n' * 40}").write_text(str(number))
    os.utime(folder / "dir" / "run.sh", ns=(1, 1_234_567_890_987_654_321))
    os.utime(folder / "dir", ns=(1, 1_111_111_111_000_000_000))
    (folder / "empty").chmod(0o555)
    return folder


def set_bytes(tree: FileTree, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> bytes:
    """The bytes of a set."""
    try:
        return b"".join(SetWriter(tree, select(include, exclude)).pieces())
    finally:
        tree.close()


def set_of(folder: Path, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()) -> bytes:
    """The bytes of a set of what is below a folder."""
    return set_bytes(DirectoryTree(folder), include, exclude)


def entries_of(data: bytes) -> list[FileEntry]:
    """The manifest of a set."""
    trailer = decode_trailer(data[-TRAILER_BYTES:], object_bytes=len(data))
    return decode_manifest(data[trailer.content_bytes : -TRAILER_BYTES], trailer)


class Opened:
    """A set in memory as a tree; counts the ranges that are asked for."""

    def __init__(self, data: bytes) -> None:
        self.ranges: list[tuple[int, int]] = []
        self._data = data
        self.tree = StoredTree(entries_of(data), self._open)

    def _open(self, start: int, end: int) -> Iterator[bytes]:
        self.ranges.append((start, end))
        for at in range(start, end, 100_000):
            yield self._data[at : min(end, at + 100_000)]


def retrieve(
    tree: FileTree, target: Path, include: tuple[str, ...] = (), exclude: tuple[str, ...] = ()
) -> RetrievedFiles:
    """Retrieve from a tree."""
    with TargetTree(target) as place:
        return place.write(tree.items(select(include, exclude)))
