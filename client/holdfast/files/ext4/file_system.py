"""An ext2, ext3 or ext4 file system at an offset of an image, with its journal applied.

Metadata is read through a small cache of its own, because inodes lie close together; of content it is said where it
lies. Nothing is ever written.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final, Protocol, runtime_checkable

from holdfast.files.ext4.directories import entries_of
from holdfast.files.ext4.journal import JOURNAL_MAGIC, journalled_blocks
from holdfast.files.ext4.layout import (
    BLOCK_MAP_BYTES,
    EXTENTS_FLAG,
    INLINE_FLAG,
    ROOT_INODE,
    Inode,
    InodeTable,
    damaged,
    read_superblock,
)
from holdfast.files.ext4.mapping import Run, runs_of
from holdfast_core.model.files.sets import FILES_MAX, TARGET_BYTES_MAX
from holdfast_proto.v1 import files_pb2

_CHUNK_BYTES: Final = 64 * 1024
_CHUNKS_MAX: Final = 512
_DIRECTORY_BYTES_MAX: Final = 4 * 1024**3


class RandomAccess(Protocol):
    """A flat range of bytes that can be read anywhere, e.g. a volume of a recovery point."""

    @property
    def size_bytes(self) -> int:
        """Its size."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """Return the bytes of a range that lies within it.

        Raises:
            HoldfastError: they could not be read.
        """
        ...


@runtime_checkable
class FetchesAhead(Protocol):
    """An image that can begin to fetch what will be read soon."""

    def fetch_ahead(self, start: int, end: int) -> None:
        """Begin to fetch a range; returns at once, and what goes wrong shows when it is read."""
        ...


class FileSystem:
    """A file system that can be read; used by one thread at a time."""

    def __init__(self, image: RandomAccess, offset: int) -> None:
        """Open the file system at an offset of an image, and look through its journal if it was not unmounted.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if there is none or it is damaged; what the image raises.
        """
        self._image = image
        self._offset = offset
        self._chunks: OrderedDict[int, bytes] = OrderedDict()
        self._newer: dict[int, tuple[int, bool]] = {}
        self._superblock = read_superblock(self._metadata)
        self._inodes = InodeTable(self._metadata, self._superblock)
        if self._superblock.journal_inode:
            self._apply_journal(self._superblock.journal_inode)
            self._superblock = read_superblock(self._metadata)
            self._inodes = InodeTable(self._metadata, self._superblock)

    @property
    def block_bytes(self) -> int:
        """Size of a block."""
        return self._superblock.block_bytes

    @property
    def size_bytes(self) -> int:
        """Size of all blocks together."""
        return self._superblock.block_count * self._superblock.block_bytes

    def root(self) -> Inode:
        """Return the root directory.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        inode = self._inodes.inode(ROOT_INODE)
        if inode.kind != files_pb2.FILE_KIND_DIRECTORY:
            raise damaged("its root is no directory")
        return inode

    def directory(self, inode: Inode) -> list[tuple[bytes, Inode]]:
        """Return names and inodes of what a directory holds.

        Raises:
            HoldfastError: SOURCE_UNREADABLE; what the image raises.
        """
        found: list[tuple[bytes, Inode]] = []
        for block in self._directory_blocks(inode):
            found += [(name, self._inodes.inode(number)) for name, number in entries_of(block, inode.number)]
            if len(found) > FILES_MAX:
                raise damaged(f"the directory with inode {inode.number} has more than {FILES_MAX} entries")
        return found

    def _directory_blocks(self, inode: Inode) -> Iterator[bytes]:
        if inode.flags & INLINE_FLAG:
            # Four bytes name the parent; entries fill the rest, and the attribute where there is one.
            yield from (inode.block_map[4:], inode.inline_rest())
            return
        if inode.size_bytes > min(_DIRECTORY_BYTES_MAX, self.size_bytes):
            raise damaged(f"the directory with inode {inode.number} is too large to be one")
        size = self._superblock.block_bytes
        for run in runs_of(self._metadata, self._superblock, inode):
            for at in range(0, run.length, size):
                yield self._metadata(run.place + at, size)

    def link_target(self, inode: Inode) -> bytes:
        """Return the text of a symbolic link.

        Raises:
            HoldfastError: SOURCE_UNREADABLE; what the image raises.
        """
        size = inode.size_bytes
        if not 0 < size <= TARGET_BYTES_MAX:
            raise damaged(f"the symbolic link with inode {inode.number} has no possible length")
        inline = self.inline_data(inode)
        if inline is None and not inode.flags & EXTENTS_FLAG and size < BLOCK_MAP_BYTES:
            inline = inode.block_map[:size]
        if inline is None:
            inline = b"".join(self.read(run.place, run.length) for run in self.runs(inode))
        if len(inline) != size:
            raise damaged(f"the symbolic link with inode {inode.number} ends early")
        return inline

    def inline_data(self, inode: Inode) -> bytes | None:
        """Return the content of a file that is kept in its inode, without zeros at its end; None if it is elsewhere.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        if not inode.flags & INLINE_FLAG:
            return None
        return (inode.block_map + inode.inline_rest())[: inode.size_bytes]

    def runs(self, inode: Inode) -> list[Run]:
        """Return where the content of an inode lies, ascending; the rest is zero.

        Raises:
            HoldfastError: SOURCE_UNREADABLE; what the image raises.
        """
        return runs_of(self._metadata, self._superblock, inode)

    def read(self, place: int, length: int) -> bytes:
        """Return bytes of the file system.

        Raises:
            HoldfastError: SOURCE_UNREADABLE if they lie outside of the image; what the image raises.
        """
        start = self._offset + place
        if place < 0 or start + length > self._image.size_bytes:
            raise damaged("it goes on behind the end of the image, which is probably cut off")
        plain = self._image.read(start, length)
        if len(plain) != length:
            raise damaged("the image ends early")
        return self._with_journal(plain, place) if self._newer else plain

    def fetch_ahead(self, place: int, length: int) -> None:
        """Have bytes fetched that will be read soon, where the image can do that."""
        start = self._offset + place
        if isinstance(self._image, FetchesAhead) and start + length <= self._image.size_bytes:
            self._image.fetch_ahead(start, start + length)

    def _with_journal(self, plain: bytes, place: int) -> bytes:
        size, end = self._superblock.block_bytes, place + len(plain)
        patched: bytearray | None = None
        for block in range(place // size, -(-end // size)):
            found = self._newer.get(block)
            if found is not None:
                patched = patched or bytearray(plain)
                low, high = max(place, block * size), min(end, (block + 1) * size)
                content = self._newest(*found)
                patched[low - place : high - place] = content[low - block * size : high - block * size]
        return plain if patched is None else bytes(patched)

    def _newest(self, place: int, escaped: bool) -> bytes:
        content = self._image.read(self._offset + place, self._superblock.block_bytes)
        return JOURNAL_MAGIC + content[4:] if escaped else content

    def _metadata(self, place: int, length: int) -> bytes:
        """Read through the cache, in chunks; the last of an image may be shorter."""
        parts = []
        for number in range(place // _CHUNK_BYTES, (place + length - 1) // _CHUNK_BYTES + 1):
            chunk = self._chunk(number)
            low = max(0, place - number * _CHUNK_BYTES)
            parts.append(chunk[low : place + length - number * _CHUNK_BYTES])
        found = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(found) != length:
            raise damaged("it goes on behind the end of the image, which is probably cut off")
        return found

    def _chunk(self, number: int) -> bytes:
        chunk = self._chunks.get(number)
        if chunk is None:
            start = number * _CHUNK_BYTES
            chunk = self.read(start, max(0, min(_CHUNK_BYTES, self._image.size_bytes - self._offset - start)))
            self._chunks[number] = chunk
            if len(self._chunks) > _CHUNKS_MAX:
                self._chunks.popitem(last=False)
        else:
            self._chunks.move_to_end(number)
        return chunk

    def _apply_journal(self, number: int) -> None:
        """Find what the journal has newer content of; it lies over the blocks' own from then on."""
        inode = self._inodes.inode(number)
        size = self._superblock.block_bytes
        runs = self.runs(inode)

        def read(offset: int, length: int) -> bytes:
            parts, at, end = [], offset, min(offset + length, inode.size_bytes)
            while at < end:
                run = _run_at(runs, at)
                if run is None:
                    break
                count = min(end, run.offset + run.length) - at
                parts.append(self._metadata(run.place + at - run.offset, count))
                at += count
            return b"".join(parts)

        newer: dict[int, tuple[int, bool]] = {}
        for each in journalled_blocks(read, inode.size_bytes):
            run = _run_at(runs, each.journal_block * size)
            if run is not None and each.block < self._superblock.block_count:
                newer[each.block] = (run.place + each.journal_block * size - run.offset, each.escaped)
        self._newer = newer
        self._chunks.clear()


def _run_at(runs: Sequence[Run], offset: int) -> Run | None:
    """Return the run that holds an offset of the file."""
    at = bisect_right(runs, offset, key=lambda run: run.offset) - 1
    return runs[at] if at >= 0 and offset < runs[at].offset + runs[at].length else None
