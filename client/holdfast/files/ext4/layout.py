"""Superblock, group descriptors and inodes, as the kernel's documentation has them (Documentation/filesystems/ext4).

All numbers are little-endian. What is read may be damaged or hostile: nothing here trusts a number that it has not
compared with a bound.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_proto.v1 import files_pb2
from holdfast_proto.v1.files_pb2 import FileEntry

SUPERBLOCK_OFFSET: Final = 1024
SUPERBLOCK_BYTES: Final = 1024
MAGIC: Final = b"\x53\xef"
MAGIC_OFFSET: Final = SUPERBLOCK_OFFSET + 56
ROOT_INODE: Final = 2
BLOCK_MAP_BYTES: Final = 60

EXTENTS_FLAG: Final = 0x80000
INLINE_FLAG: Final = 0x10000000
_ENCRYPTED_FLAG: Final = 0x800

_HAS_JOURNAL: Final = 0x4
_RECOVER: Final = 0x4
_META_GROUPS: Final = 0x10
_WIDE: Final = 0x80
# Types in directories, recovery, meta groups, extents, 64 bits, multiple mounts, flexible groups, values in inodes,
# seed of checksums, large directories, inline data, encryption of some files, folded case.
_KNOWN: Final = 0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x10000 | 0x20000

_KINDS: Final = {
    stat.S_IFREG: files_pb2.FILE_KIND_REGULAR,
    stat.S_IFDIR: files_pb2.FILE_KIND_DIRECTORY,
    stat.S_IFLNK: files_pb2.FILE_KIND_SYMBOLIC_LINK,
    stat.S_IFIFO: files_pb2.FILE_KIND_FIFO,
    stat.S_IFCHR: files_pb2.FILE_KIND_CHARACTER_DEVICE,
    stat.S_IFBLK: files_pb2.FILE_KIND_BLOCK_DEVICE,
}

Read = Callable[[int, int], bytes]
"""Reads exactly so many bytes at an offset of the file system; raises where it is shorter."""


def damaged(why: str) -> HoldfastError:
    """Make the error for a file system that cannot be read."""
    return HoldfastError(ErrorCode.SOURCE_UNREADABLE, f"the file system in the image cannot be read: {why}")


@dataclass(frozen=True, slots=True)
class Superblock:
    """What a superblock says.

    Attributes:
        first_block: number of the block that the superblock is in.
        meta_groups_from: number of the block of descriptors from which on they lie with their groups.
        journal_inode: inode of the journal that has to be applied; 0 where there is nothing to apply.
    """

    block_bytes: int
    block_count: int
    first_block: int
    blocks_per_group: int
    inode_count: int
    inodes_per_group: int
    inode_bytes: int
    descriptor_bytes: int
    meta_groups_from: int
    journal_inode: int


def read_superblock(read: Read) -> Superblock:
    """Return the superblock.

    Raises:
        HoldfastError: SOURCE_UNREADABLE if there is none, or it has a feature that changes the layout and is not known.
    """
    raw = read(SUPERBLOCK_OFFSET, SUPERBLOCK_BYTES)
    if raw[56:58] != MAGIC:
        raise damaged("there is no ext2, ext3 or ext4 file system; others are not supported")
    inode_count, count_low = struct.unpack_from("<II", raw, 0)
    first_block, log_block = struct.unpack_from("<II", raw, 20)
    blocks_per_group, _, inodes_per_group = struct.unpack_from("<III", raw, 32)
    (revision,) = struct.unpack_from("<I", raw, 76)
    (inode_bytes,) = struct.unpack_from("<H", raw, 88)
    compatible, incompatible = struct.unpack_from("<II", raw, 92)
    (descriptor_bytes,) = struct.unpack_from("<H", raw, 254)
    unknown = incompatible & ~_KNOWN
    if unknown:
        raise damaged(f"it has features that are not known here ({unknown:#x})")
    wide = bool(incompatible & _WIDE)
    count_high = struct.unpack_from("<I", raw, 336)[0] if wide else 0
    journal_inode = 0
    if compatible & _HAS_JOURNAL and incompatible & _RECOVER:
        (journal_inode,) = struct.unpack_from("<I", raw, 224)
        if not journal_inode:
            raise damaged("it was not unmounted, and its journal is on another device")
    superblock = Superblock(
        block_bytes=1024 << min(log_block, 7),
        block_count=count_low | count_high << 32,
        first_block=first_block,
        blocks_per_group=blocks_per_group,
        inode_count=inode_count,
        inodes_per_group=inodes_per_group,
        inode_bytes=inode_bytes if revision else 128,
        descriptor_bytes=descriptor_bytes if wide else 32,
        meta_groups_from=struct.unpack_from("<I", raw, 260)[0] if incompatible & _META_GROUPS else 2**32,
        journal_inode=journal_inode,
    )
    _check(superblock)
    return superblock


def _check(superblock: Superblock) -> None:
    sizes = (superblock.inode_bytes, superblock.descriptor_bytes)
    if (
        superblock.block_bytes > 65_536
        or not superblock.block_count
        or not superblock.blocks_per_group
        or not superblock.inodes_per_group
        or any(size & (size - 1) for size in sizes)
        or not 128 <= superblock.inode_bytes <= superblock.block_bytes
        or not 32 <= superblock.descriptor_bytes <= superblock.block_bytes
        or superblock.first_block > (superblock.block_bytes == 1024)
    ):
        raise damaged("its superblock makes no sense")


@dataclass(frozen=True, slots=True)
class Inode:
    """An inode.

    Attributes:
        number: its number.
        kind: what it is, a number of FileKind; 0 for sockets and what is not known.
        raw: its bytes.
    """

    number: int
    kind: files_pb2.FileKind.ValueType
    size_bytes: int
    flags: int
    link_count: int
    raw: bytes

    @property
    def block_map(self) -> bytes:
        """Return the 60 bytes that say where the content is, or are it."""
        return self.raw[40 : 40 + BLOCK_MAP_BYTES]

    def entry(self) -> FileEntry:
        """Return what a set keeps of it, without path, target and extents."""
        mode, uid_low = struct.unpack_from("<HH", self.raw, 0)
        (gid_low,) = struct.unpack_from("<H", self.raw, 24)
        uid_high, gid_high = struct.unpack_from("<HH", self.raw, 120)
        seconds, nanoseconds = self._mtime()
        entry = FileEntry(
            kind=self.kind,
            mode=stat.S_IMODE(mode),
            uid=uid_low | uid_high << 16,
            gid=gid_low | gid_high << 16,
            mtime_s=seconds,
            mtime_ns=nanoseconds,
        )
        if self.kind == files_pb2.FILE_KIND_REGULAR:
            entry.size_bytes = self.size_bytes
        elif self.kind in (files_pb2.FILE_KIND_CHARACTER_DEVICE, files_pb2.FILE_KIND_BLOCK_DEVICE):
            entry.device_major, entry.device_minor = self._device()
        return entry

    def _mtime(self) -> tuple[int, int]:
        (seconds,) = struct.unpack_from("<i", self.raw, 16)
        if len(self.raw) < 140 or 128 + struct.unpack_from("<H", self.raw, 128)[0] < 140:
            return seconds, 0
        # Two bits more of the seconds, thirty of nanoseconds.
        (extra,) = struct.unpack_from("<I", self.raw, 136)
        return seconds + ((extra & 3) << 32), min(extra >> 2, 999_999_999)

    def _device(self) -> tuple[int, int]:
        old, new = struct.unpack_from("<II", self.raw, 40)
        if old:
            return old >> 8 & 0xFF, old & 0xFF
        return new >> 8 & 0xFFF, new & 0xFF | new >> 12 & 0xFFF00

    def inline_rest(self) -> bytes:
        """Return the value of the attribute that holds what of inline data is beyond the block map; b"" without one.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        if len(self.raw) <= 132:
            return b""
        base = 128 + struct.unpack_from("<H", self.raw, 128)[0]
        if self.raw[base : base + 4] != b"\x00\x00\x02\xea":
            return b""
        at = first = base + 4
        while at + 16 <= len(self.raw) and self.raw[at : at + 4] != bytes(4):
            name_length, index, offset, _, size = struct.unpack_from("<BBHII", self.raw, at)
            if index == 7 and self.raw[at + 16 : at + 16 + name_length] == b"data":
                value = self.raw[first + offset : first + offset + size]
                if len(value) != size:
                    raise damaged(f"the inline data of inode {self.number} lies outside of it")
                return value
            at += 16 + (name_length + 3) // 4 * 4
        return b""


class InodeTable:
    """The inodes of a file system."""

    def __init__(self, read: Read, superblock: Superblock) -> None:
        """Bind to a file system."""
        self._read = read
        self._superblock = superblock

    def inode(self, number: int) -> Inode:
        """Return an inode that is in use.

        Raises:
            HoldfastError: SOURCE_UNREADABLE.
        """
        superblock = self._superblock
        if not 1 <= number <= superblock.inode_count:
            raise damaged(f"it names the inode {number}, of {superblock.inode_count}")
        group, index = divmod(number - 1, superblock.inodes_per_group)
        descriptor = self._read(self._descriptor_offset(group), superblock.descriptor_bytes)
        (table,) = struct.unpack_from("<I", descriptor, 8)
        if superblock.descriptor_bytes >= 64:
            table |= struct.unpack_from("<I", descriptor, 40)[0] << 32
        raw = self._read(table * superblock.block_bytes + index * superblock.inode_bytes, superblock.inode_bytes)
        mode, _, size_low = struct.unpack_from("<HHI", raw, 0)
        (link_count,) = struct.unpack_from("<H", raw, 26)
        (flags,) = struct.unpack_from("<I", raw, 32)
        (size_high,) = struct.unpack_from("<I", raw, 108)
        if not mode:
            raise damaged(f"the inode {number} is named and not in use")
        if flags & _ENCRYPTED_FLAG:
            raise damaged(
                f"the inode {number} is encrypted by the file system; leave it out, or keep it from within the VM"
            )
        kind = _KINDS.get(stat.S_IFMT(mode), files_pb2.FILE_KIND_UNSPECIFIED)
        return Inode(number, kind, size_low | size_high << 32, flags, link_count, raw)

    def _descriptor_offset(self, group: int) -> int:
        """Return where a group's descriptor is: behind the superblock, or with meta groups at the head of their own."""
        superblock = self._superblock
        per_block = superblock.block_bytes // superblock.descriptor_bytes
        block, index = divmod(group, per_block)
        if block < superblock.meta_groups_from:
            # Behind the superblock, which is in the second block where blocks are that small.
            number = SUPERBLOCK_OFFSET // superblock.block_bytes + 1 + block
        else:
            first_group = block * per_block
            number = superblock.first_block + first_group * superblock.blocks_per_group + _has_superblock(first_group)
        return number * superblock.block_bytes + index * superblock.descriptor_bytes


def _has_superblock(group: int) -> bool:
    """Whether a group begins with a copy of the superblock: 0, 1 and powers of 3, 5 and 7 (feature sparse_super)."""
    if group <= 1:
        return True
    for base in (3, 5, 7):
        power = base
        while power < group:
            power *= base
        if power == group:
            return True
    return False
