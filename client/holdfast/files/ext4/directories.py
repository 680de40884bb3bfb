"""The entries of directories. Hash trees need no care: their inner nodes look like entries that are not in use."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from holdfast.files.ext4.layout import damaged


def entries_of(block: bytes, number: int) -> Iterator[tuple[bytes, int]]:
    """Yield name and inode of the entries in a block of the directory with the inode `number`, without `.` and `..`.

    Raises:
        HoldfastError: SOURCE_UNREADABLE.
    """
    at = 0
    while at + 8 <= len(block):
        inode, length, name_length = struct.unpack_from("<IHB", block, at)
        if length in (0, 65_535) and len(block) == 65_536:
            length = 65_536
        if length < 8 or length % 4 or at + length > len(block) or (inode and 8 + name_length > length):
            raise damaged(f"the directory with inode {number} has an entry that makes no sense")
        name = block[at + 8 : at + 8 + name_length]
        if inode and name not in (b".", b".."):
            yield name, inode
        at += length
