"""A stored set as a tree of files. Its content is read forwards, in as few ranges as what is wanted lies in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from holdfast.files.trees import Item, Pieces
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.files.patterns import Selection, os_text
from holdfast_core.model.files.sets import data_bytes
from holdfast_proto.v1 import files_pb2
from holdfast_proto.v1.files_pb2 import FileEntry

OpenRange = Callable[[int, int], Iterator[bytes]]
"""Gives the object's bytes from a start to before an end, in pieces."""


class StoredTree:
    """The files of a set."""

    def __init__(self, entries: Sequence[FileEntry], open_range: OpenRange) -> None:
        """Bind to a decoded manifest and to where the content comes from."""
        self._entries = entries
        self._content = _Content(open_range)
        self._at: dict[bytes, tuple[int, FileEntry]] = {}
        offset = 0
        for entry in entries:
            if entry.kind == files_pb2.FILE_KIND_REGULAR:
                self._at[entry.path] = (offset, entry)
                offset += data_bytes(entry)

    def items(self, selection: Selection, *, depth: int | None = None, content: bool = False) -> Iterator[Item]:
        """Yield what is selected, in order.

        Raises:
            HoldfastError: what the storage raises, from the content of an item.
        """
        chosen = list(self._chosen(selection))
        self._content.plan([self._range(entry) for entry, _ in chosen if entry.kind == files_pb2.FILE_KIND_REGULAR])
        for entry, wanted in chosen:
            if depth is None or entry.path.count(b"/") < depth:
                yield Item(entry, self._reader(entry), wanted)

    def _chosen(self, selection: Selection) -> Iterator[tuple[FileEntry, bool]]:
        """Yield entries that are wanted, with those of the directories that they are in."""
        levels: list[tuple[bytes, Selection, FileEntry | None]] = [(b"", selection, None)]
        new_names: dict[bytes, bytes] = {}
        for entry in self._entries:
            folder, _, name = entry.path.rpartition(b"/")
            while levels and not _holds(levels[-1][0], folder):
                levels.pop()
            if levels[-1][0] != folder:
                continue  # in a directory that nothing is wanted of
            directory = entry.kind == files_pb2.FILE_KIND_DIRECTORY
            wanted, below = levels[-1][1].descend(name, directory=directory)
            if wanted:
                for at, (path, inner, waiting) in enumerate(levels):
                    if waiting is not None:
                        yield waiting, False
                        levels[at] = (path, inner, None)
                yield self._self_contained(entry, new_names), True
            if below is not None:
                levels.append((entry.path, below, None if wanted else entry))

    def _self_contained(self, entry: FileEntry, new_names: dict[bytes, bytes]) -> FileEntry:
        """Return the entry; where the file that it is another name of is not taken, as that file itself."""
        if entry.kind == files_pb2.FILE_KIND_REGULAR:
            new_names[entry.path] = entry.path
        if entry.kind != files_pb2.FILE_KIND_HARD_LINK:
            return entry
        own = FileEntry()
        first = new_names.setdefault(entry.target, entry.path)
        if first != entry.path:
            own.CopyFrom(entry)
            own.target = first
            return own
        offset, file = self._at[entry.target]
        own.CopyFrom(file)
        own.path = entry.path
        self._at[own.path] = (offset, own)
        return own

    def _range(self, entry: FileEntry) -> tuple[int, int]:
        offset, _ = self._at[entry.path]
        return offset, offset + data_bytes(entry)

    def _reader(self, entry: FileEntry) -> Callable[[], Pieces]:
        def read() -> Pieces:
            if entry.kind != files_pb2.FILE_KIND_REGULAR:
                return
            offset, _ = self._at[entry.path]
            for extent in entry.extents:
                at = extent.offset
                for piece in self._content.read(offset, offset + extent.length):
                    yield at, piece
                    at += len(piece)
                if at != extent.offset + extent.length:
                    raise HoldfastError(ErrorCode.CORRUPT, f"the content of {os_text(entry.path)!r} ends early")
                offset += extent.length

        return read

    def close(self) -> None:
        """Stop reading."""
        self._content.close()


def _holds(directory: bytes, folder: bytes) -> bool:
    return not directory or folder == directory or folder.startswith(directory + b"/")


class _Content:
    """Content that is asked for in ascending ranges is fetched as one stream, as far as it lies together."""

    def __init__(self, open_range: OpenRange) -> None:
        self._open_range = open_range
        self._ends: dict[int, int] = {}
        self._stream: Iterator[bytes] | None = None
        self._at = 0
        self._rest = b""

    def plan(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Say which ranges will be asked for."""
        self._ends.clear()
        begin = end = -1
        for start, stop in ranges:
            if start != end:
                begin = start
            end = stop
            self._ends[begin] = stop

    def read(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to before `end`."""
        if start == end:
            return
        if self._stream is None or self._at != start:
            self.close()
            self._at = start
            self._stream = self._open_range(start, max(end, self._ends.get(start, end)))
        while self._at < end:
            piece = self._rest or next(self._stream, b"")
            if not piece:
                return
            taken = piece[: end - self._at]
            self._rest = piece[len(taken) :]
            self._at += len(taken)
            yield taken

    def close(self) -> None:
        """End the stream."""
        if self._stream is not None:
            close = getattr(self._stream, "close", None)
            if close is not None:
                close()
            self._stream = None
        self._rest = b""
