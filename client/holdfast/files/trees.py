"""What a set of files is read from: the interface, and the walk that directories and file systems in images share.

A tree gives its entries in the order in which a set keeps them, and the content of the entry that it gave last. It is
used by one thread at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, Protocol, TypeVar

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.files.patterns import Selection, os_text
from holdfast_core.model.files.sets import FILES_MAX, PATH_BYTES_MAX
from holdfast_proto.v1 import files_pb2
from holdfast_proto.v1.files_pb2 import FileEntry

READ_BYTES: Final = 4 * 1024 * 1024
AHEAD_BYTES: Final = 4 * READ_BYTES
_AHEAD_ITEMS: Final = 1000

Pieces = Iterator[tuple[int, bytes]]
"""Offsets and bytes of a file, ascending; what no piece covers is zero. Of a tree that a set is made from, offsets are
multiples of `HOLE_BYTES`, and so are lengths, but for the piece that reaches the end of the file."""

Place = TypeVar("Place")


def no_content() -> Pieces:
    """Return the content of what has none."""
    return iter(())


def _nothing_to_expect() -> None:
    """Prepare nothing."""


@dataclass(frozen=True, slots=True)
class Item:
    """An entry of a tree.

    Attributes:
        entry: what is known of it; its extents may be left out.
        read: gives its content, until the next item is taken.
        expect: says that its content will be read soon.
        wanted: whether it was selected, and is not just the directory of something that was.
    """

    entry: FileEntry
    read: Callable[[], Pieces] = no_content
    wanted: bool = True
    expect: Callable[[], None] = _nothing_to_expect


class FileTree(Protocol):
    """Files below one root."""

    def items(self, selection: Selection, *, depth: int | None = None, content: bool = False) -> Iterator[Item]:
        """Yield what is selected, and the directories that it is in, in the order of a set.

        With a `depth`, nothing is looked at that lies more names below the root. `content` says that the content of all
        items will be read, so that it can be fetched ahead.

        Raises:
            HoldfastError: SOURCE_UNREADABLE, VOLUME_CHANGED, or as the storage that it is read from.
        """
        ...

    def close(self) -> None:
        """Release it; may be called more than once."""
        ...


@dataclass(frozen=True, slots=True)
class Child(Generic[Place]):
    """An entry of a directory that is walked.

    Attributes:
        name: its name.
        entry: what is known of it, without a path.
        place: what the walk needs to go on, or to read.
        identity: the same for two names of one file; None where it has one name only.
    """

    name: bytes
    entry: FileEntry
    place: Place
    identity: object | None


class Directories(Protocol[Place]):
    """A hierarchy of directories, as the walk asks for it."""

    def enter(self, place: Place) -> Iterable[Child[Place]]:
        """Go into a directory; returns what is in it, in any order."""
        ...

    def leave(self, place: Place) -> None:
        """Say that nothing of a directory is needed any more."""
        ...

    def read(self, child: Child[Place], path: bytes) -> Pieces:
        """Return the content of a regular file of the directory that was entered last."""
        ...

    def expect(self, child: Child[Place]) -> None:
        """Take note that the content of a regular file will be read soon."""
        ...


@dataclass(slots=True)
class _Level(Generic[Place]):
    """A directory that the walk is in."""

    path: bytes
    place: Place
    selection: Selection
    waiting: Item | None
    children: Iterator[Child[Place]] = field(default_factory=lambda: iter(()))


class Walk(Generic[Place]):
    """Walks a hierarchy in the order of a set."""

    def __init__(self, directories: Directories[Place]) -> None:
        """Bind to a hierarchy."""
        self._directories = directories
        self._first_names: dict[object, bytes] = {}
        self._seen = 0

    def items(self, root: Place, selection: Selection, *, depth: int | None = None) -> Iterator[Item]:
        """Yield what is selected below `root`, and the directories that it is in.

        Raises:
            HoldfastError: LIMIT_EXCEEDED if there are too many files or a path is too long; what the hierarchy raises.
        """
        levels: list[_Level[Place]] = []
        try:
            self._enter(levels, _Level(b"", root, selection, None))
            while levels:
                level = levels[-1]
                child = next(level.children, None)
                if child is None:
                    levels.pop()
                    self._directories.leave(level.place)
                    continue
                directory = child.entry.kind == files_pb2.FILE_KIND_DIRECTORY
                wanted, below = level.selection.descend(child.name, directory=directory)
                if not wanted and below is None:
                    continue
                item = self._item(child, level.path, wanted=wanted)
                if wanted:
                    for parent in levels:
                        if parent.waiting is not None:
                            yield parent.waiting
                            parent.waiting = None
                    yield item
                if below is not None and (depth is None or len(levels) < depth):
                    waiting = None if wanted else item
                    self._enter(levels, _Level(item.entry.path, child.place, below, waiting))
        finally:
            for level in reversed(levels):
                self._directories.leave(level.place)

    def _enter(self, levels: list[_Level[Place]], level: _Level[Place]) -> None:
        levels.append(level)
        children = sorted(self._directories.enter(level.place), key=lambda child: child.name)
        self._seen += len(children)
        if self._seen > FILES_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"there are more than {FILES_MAX} files; exclude some, or take a part of them"
            )
        level.children = iter(children)

    def _item(self, child: Child[Place], folder: bytes, *, wanted: bool) -> Item:
        entry = child.entry
        entry.path = folder + b"/" + child.name if folder else child.name
        if len(entry.path) > PATH_BYTES_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED,
                f"the path {os_text(entry.path[:200])!r}… is longer than {PATH_BYTES_MAX} bytes",
            )
        if entry.kind != files_pb2.FILE_KIND_REGULAR or not wanted:
            return Item(entry, wanted=wanted)
        if child.identity is not None:
            first = self._first_names.setdefault(child.identity, entry.path)
            if first != entry.path:
                entry.kind, entry.target = files_pb2.FILE_KIND_HARD_LINK, first
                entry.size_bytes = 0
                return Item(entry)
        return Item(
            entry, lambda: self._directories.read(child, entry.path), expect=lambda: self._directories.expect(child)
        )


def looking_ahead(items: Iterator[Item]) -> Iterator[Item]:
    """Yield items, the content of the next `AHEAD_BYTES` expected; for trees that can read any of them at any time."""
    queue: deque[Item] = deque()
    queued_bytes = 0
    for item in items:
        item.expect()
        queue.append(item)
        queued_bytes += item.entry.size_bytes
        while queued_bytes > AHEAD_BYTES or len(queue) > _AHEAD_ITEMS:
            first = queue.popleft()
            queued_bytes -= first.entry.size_bytes
            yield first
    yield from queue
