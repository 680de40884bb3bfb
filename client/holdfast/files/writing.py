"""From a tree to the bytes of a stored set, in one pass and with flat memory but for the list of its files."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from holdfast.files.trees import FileTree, Item
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.files.patterns import Selection
from holdfast_core.model.files.sets import HOLE_BYTES, check_entries, encode_end
from holdfast_core.model.limits import MIB
from holdfast_proto.v1 import files_pb2
from holdfast_proto.v1.files_pb2 import FileEntry

_GATHERED_BYTES: Final = 1 * MIB
_ZEROS: Final = bytes(HOLE_BYTES)


class SetWriter:
    """Makes the bytes of a set.

    Attributes:
        file_count: entries so far.
    """

    def __init__(self, tree: FileTree, selection: Selection) -> None:
        """Bind to what is kept of which tree; the tree stays the caller's."""
        self.file_count = 0
        self._tree = tree
        self._selection = selection
        self._gathered = bytearray()
        self._content_bytes = 0

    def pieces(self) -> Iterator[bytes]:
        """Yield the bytes of the set in order.

        Raises:
            HoldfastError: NOT_FOUND if patterns were given and nothing matches; what the tree raises.
        """
        entries: list[FileEntry] = []
        any_wanted = False
        for item in self._tree.items(self._selection, content=True):
            any_wanted = any_wanted or item.wanted
            entries.append(item.entry)
            self.file_count += 1
            if item.entry.kind == files_pb2.FILE_KIND_REGULAR:
                yield from self._content(item)
        if not any_wanted and not self._selection.everything:
            raise HoldfastError(ErrorCode.NOT_FOUND, "no file matches the patterns; nothing was kept")
        check_entries(entries)
        yield bytes(self._gathered) + encode_end(entries, content_bytes=self._content_bytes)

    def _content(self, item: Item) -> Iterator[bytes]:
        """Yield a file's content as it gathers, and note in its entry where it has any."""
        entry = item.entry
        del entry.extents[:]
        end = -1
        for offset, piece in item.read():
            for start, stop in data_runs(piece):
                if offset + start == end:
                    entry.extents[-1].length += stop - start
                else:
                    entry.extents.add(offset=offset + start, length=stop - start)
                end = offset + stop
                self._content_bytes += stop - start
                self._gathered += piece[start:stop] if stop - start < len(piece) else piece
            if len(self._gathered) >= _GATHERED_BYTES:
                yield bytes(self._gathered)
                self._gathered.clear()


def data_runs(piece: bytes) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a piece that are not zero, in whole units of `HOLE_BYTES`."""
    begun = -1
    for at in range(0, len(piece), HOLE_BYTES):
        unit = b"" if piece[at] else piece[at : at + HOLE_BYTES]
        if unit and (unit == _ZEROS or not any(unit)):
            if begun >= 0:
                yield begun, at
                begun = -1
        elif begun < 0:
            begun = at
    if begun >= 0:
        yield begun, len(piece)
