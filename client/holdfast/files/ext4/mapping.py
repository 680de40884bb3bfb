"""Where the content of an inode lies: by a tree of extents, or by the block map of ext2 and ext3.

Extents must ascend, and no inode may map more blocks than there are; so a walk ends whatever the image holds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from holdfast.files.ext4.layout import EXTENTS_FLAG, Inode, Read, Superblock, damaged

_EXTENT_MAGIC: Final = 0xF30A
_EXTENT_DEPTH_MAX: Final = 5
_WRITTEN_MAX: Final = 32_768
_DIRECT_COUNT: Final = 12


class Run(NamedTuple):
    """Bytes of a file that lie in one piece.

    Attributes:
        offset: in the file.
        place: in the file system.
        length: in bytes.
    """

    offset: int
    place: int
    length: int


def runs_of(read: Read, superblock: Superblock, inode: Inode) -> list[Run]:
    """Return where the content lies, ascending, cut at the file's end; the rest is zero.

    Raises:
        HoldfastError: SOURCE_UNREADABLE.
    """
    size = superblock.block_bytes
    end = -(-inode.size_bytes // size)
    if inode.flags & EXTENTS_FLAG:
        pieces = _Extents(read, superblock, inode.number).walk(inode.block_map, None)
    else:
        pieces = _block_map(read, superblock, inode, end)
    found: list[Run] = []
    mapped = 0
    for block, place, count in pieces:
        count = min(count, end - block)
        if count <= 0:
            break
        mapped += count
        if place + count > superblock.block_count or mapped > superblock.block_count:
            raise damaged(f"the inode {inode.number} has content outside of the file system, or more than that holds")
        last = found[-1] if found else None
        if last and last.offset + last.length == block * size and last.place + last.length == place * size:
            found[-1] = Run(last.offset, last.place, last.length + count * size)
        else:
            found.append(Run(block * size, place * size, count * size))
    if found and found[-1].offset + found[-1].length > inode.size_bytes:
        found[-1] = found[-1]._replace(length=inode.size_bytes - found[-1].offset)
    return found


_Piece = tuple[int, int, int]
"""First block in the file, first block in the file system, number of blocks."""


class _Extents:
    """A walk over an inode's tree of extents."""

    def __init__(self, read: Read, superblock: Superblock, number: int) -> None:
        self._read = read
        self._superblock = superblock
        self._number = number
        self._end = 0

    def walk(self, node: bytes, depth: int | None) -> Iterator[_Piece]:
        """Yield the extents below a node that have been written; `depth` is what its parent says of it."""
        magic, count, _, own_depth = struct.unpack_from("<HHHH", node)
        if (
            magic != _EXTENT_MAGIC
            or own_depth > _EXTENT_DEPTH_MAX
            or (depth is not None and (own_depth != depth or not count))
            or 12 * (count + 1) > len(node)
        ):
            raise damaged(f"the extents of inode {self._number} make no sense")
        for at in range(12, 12 * (count + 1), 12):
            if own_depth:
                _, low, high = struct.unpack_from("<IIH", node, at)
                size = self._superblock.block_bytes
                yield from self.walk(self._read((low | high << 32) * size, size), own_depth - 1)
            else:
                block, length, high, low = struct.unpack_from("<IHHI", node, at)
                written = length <= _WRITTEN_MAX
                length = length if written else length - _WRITTEN_MAX
                if not length or block < self._end:
                    raise damaged(f"the extents of inode {self._number} do not ascend")
                self._end = block + length
                if written:
                    yield block, low | high << 32, length


def _block_map(read: Read, superblock: Superblock, inode: Inode, end: int) -> Iterator[_Piece]:
    """Yield the blocks of a block map one by one: twelve, then through one to three levels of blocks of numbers."""
    numbers = struct.unpack("<15I", inode.block_map)
    for block, place in enumerate(numbers[:_DIRECT_COUNT]):
        if place:
            yield block, place, 1
    per_block = superblock.block_bytes // 4
    first = _DIRECT_COUNT
    for level, number in enumerate(numbers[_DIRECT_COUNT:], 1):
        if number and first < end:
            yield from _indirect(read, superblock, number, level, first, end)
        first += per_block**level


def _indirect(read: Read, superblock: Superblock, number: int, level: int, first: int, end: int) -> Iterator[_Piece]:
    size = superblock.block_bytes
    covered = (size // 4) ** (level - 1)
    for index, place in enumerate(struct.unpack(f"<{size // 4}I", read(number * size, size))):
        block = first + index * covered
        if block >= end:
            return
        if place and level == 1:
            yield block, place, 1
        elif place:
            yield from _indirect(read, superblock, place, level - 1, block, end)
