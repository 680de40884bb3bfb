"""The files of a file system inside an image as a tree. Only the blocks that are looked at are read from the image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from holdfast.files.ext4.file_system import FileSystem, RandomAccess
from holdfast.files.ext4.layout import MAGIC, MAGIC_OFFSET, Inode, damaged
from holdfast.files.ext4.mapping import Run
from holdfast.files.partitions import partitions_of
from holdfast.files.trees import AHEAD_BYTES, READ_BYTES, Child, Item, Pieces, Walk, looking_ahead
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.files.patterns import Selection, os_bytes, os_text
from holdfast_core.model.files.sets import HOLE_BYTES, check_entry
from holdfast_proto.v1 import files_pb2


class ImageTree:
    """The files below a directory of an ext2, ext3 or ext4 file system in an image."""

    def __init__(self, image: RandomAccess, *, partition: int = 0, root: str = "/") -> None:
        """Open the file system.

        Args:
            image: what it is in; stays the caller's.
            partition: number of the partition in the image's table; 0 finds the only file system there is, in a
                partition or in the image itself.
            root: directory that is the tree's root; links are not followed.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if there is no such file system or it cannot be read; NOT_FOUND if there is
                no such partition or root; INVALID_ARGUMENT if several file systems could be meant.
        """
        self._files = FileSystem(image, _offset_of(image, partition))
        self._entered: set[int] = set()
        self._content_bytes = 0
        self._expected: dict[int, list[Run]] = {}
        self._gathered: list[tuple[int, int]] = []
        self._waiting: set[int] = set()
        self._root = self._files.root()
        for name in [each for each in os_bytes(root).split(b"/") if each]:
            self._root = self._below(name, root)

    def _below(self, name: bytes, root: str) -> Inode:
        for found, inode in self._files.directory(self._root):
            if found == name:
                if inode.kind == files_pb2.FILE_KIND_DIRECTORY:
                    return inode
                raise HoldfastError(
                    ErrorCode.NOT_FOUND,
                    f"{os_text(name)!r} in the path {root!r} is no directory; links are not followed",
                )
        raise HoldfastError(ErrorCode.NOT_FOUND, f"the file system has no {os_text(name)!r}, of the path {root!r}")

    def items(self, selection: Selection, *, depth: int | None = None, content: bool = False) -> Iterator[Item]:
        """Yield what is selected, in the order of a set; sockets are left out.

        Raises:
            HoldfastError: SOURCE_UNREADABLE, or as the image.
        """
        self._entered.clear()
        self._content_bytes = 0
        self._expected.clear()
        self._gathered.clear()
        self._waiting.clear()
        items = Walk(self).items(self._root, selection, depth=depth)
        return looking_ahead(items) if content else items

    def enter(self, place: Inode) -> list[Child[Inode]]:
        """Return what a directory holds; a directory that is met twice is damage, and might have no end."""
        if place.number in self._entered:
            raise damaged("one of its directories is found at two places")
        self._entered.add(place.number)
        return [self._child(name, inode) for name, inode in self._files.directory(place) if inode.kind]

    def leave(self, place: Inode) -> None:
        """Nothing is held of a directory."""

    def _child(self, name: bytes, inode: Inode) -> Child[Inode]:
        entry = inode.entry()
        if inode.kind == files_pb2.FILE_KIND_SYMBOLIC_LINK:
            entry.target = self._files.link_target(inode)
        entry.path = name
        try:
            check_entry(entry)
        except HoldfastError as error:
            raise damaged(f"it has a file that cannot be: {os_text(name)!r}") from error
        if b"/" in name:
            raise damaged(f"it has a name with a slash in it: {os_text(name)!r}")
        return Child(name, entry, inode, inode.number if inode.link_count > 1 else None)

    def expect(self, child: Child[Inode]) -> None:
        """Have the beginning of a file's content fetched; many small files are gathered to one request."""
        if child.place.number in self._expected or self._files.inline_data(child.place) is not None:
            return
        runs = self._expected[child.place.number] = self._files.runs(child.place)
        self._gather(runs, 0, AHEAD_BYTES)
        self._waiting.add(child.place.number)
        if sum(length for _, length in self._gathered) >= READ_BYTES:
            self._fetch()

    def _gather(self, runs: Sequence[Run], start: int, end: int) -> None:
        """Note what of a file's range is to be fetched."""
        for run in runs:
            low, high = max(start, run.offset), min(end, run.offset + run.length)
            if low < high:
                self._gathered.append((run.place + low - run.offset, high - low))

    def _fetch(self) -> None:
        """Have all that is noted fetched, neighbours in one request."""
        place = end = 0
        for start, length in [*sorted(self._gathered), (-1, 0)]:
            if start == end and end:
                end += length
                continue
            if end > place:
                self._files.fetch_ahead(place, end - place)
            place, end = start, start + length
        self._gathered.clear()
        self._waiting.clear()

    def read(self, child: Child[Inode], path: bytes) -> Pieces:
        """Return the content of a file, holes left out.

        Raises:
            HoldfastError: SOURCE_UNREADABLE, or as the image.
        """
        inode = child.place
        inline = self._files.inline_data(inode)
        if inline is not None:
            yield 0, inline.ljust(min(inode.size_bytes, HOLE_BYTES), b"\0")
            return
        runs = self._expected.pop(inode.number, None) or self._files.runs(inode)
        if inode.number in self._waiting:
            self._fetch()
        first, ahead = 0, AHEAD_BYTES
        for start, end in _ranges(runs, inode.size_bytes):
            self._content_bytes += end - start
            # Blocks that many files share would let a small image hold any amount of content. Whole units are read,
            # which are four times the smallest block.
            if self._content_bytes > 4 * self._files.size_bytes:
                raise damaged("its files have more content than it has blocks")
            for at in range(start, end, READ_BYTES):
                stop = min(end, at + READ_BYTES)
                if stop + READ_BYTES > ahead:
                    self._gather(runs, ahead, stop + AHEAD_BYTES)
                    self._fetch()
                    ahead = stop + AHEAD_BYTES
                while runs[first].offset + runs[first].length <= at:
                    first += 1
                yield at, self._assemble(runs, first, at, stop)

    def _assemble(self, runs: Sequence[Run], first: int, start: int, end: int) -> bytes:
        """Return a range of a file; what lies between runs is zero. Runs before `first` end before it."""
        parts, at = [], start
        for index in range(first, len(runs)):
            run = runs[index]
            if run.offset >= end:
                break
            low, high = max(at, run.offset), min(end, run.offset + run.length)
            parts += [bytes(low - at), self._files.read(run.place + low - run.offset, high - low)]
            at = high
        parts.append(bytes(end - at))
        return b"".join(parts)

    def close(self) -> None:
        """Nothing is held."""


def _offset_of(image: RandomAccess, partition: int) -> int:
    """Return where in the image the file system is."""
    found = partitions_of(image)
    if partition:
        for part in found:
            if part.number == partition:
                return part.offset
        numbers = ", ".join(str(part.number) for part in found) or "no table of partitions"
        raise HoldfastError(ErrorCode.NOT_FOUND, f"the image has no partition {partition}; it has {numbers}")
    holding = [part for part in found if _has_file_system(image, part.offset)]
    if len(holding) > 1:
        numbers = ", ".join(str(part.number) for part in holding)
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the partitions {numbers} hold file systems; say which one is meant"
        )
    return holding[0].offset if holding else 0


def _has_file_system(image: RandomAccess, offset: int) -> bool:
    place = offset + MAGIC_OFFSET
    return place + len(MAGIC) <= image.size_bytes and image.read(place, len(MAGIC)) == MAGIC


def _ranges(runs: Sequence[Run], size: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a file that have data, in whole units and apart from one another."""
    begun = ended = -1
    for run in runs:
        start = run.offset // HOLE_BYTES * HOLE_BYTES
        end = min(size, -(-(run.offset + run.length) // HOLE_BYTES) * HOLE_BYTES)
        if start <= ended:
            ended = max(ended, end)
            continue
        if begun >= 0:
            yield begun, ended
        begun, ended = start, end
    if begun >= 0:
        yield begun, ended
