"""The journal of a file system that was not unmounted: which blocks it has newer content of.

That is whatever the kernel had committed and not yet brought to its place. Mounting would write it there; here it is
only found, to be laid over what is read. The format is that of the kernel's documentation
(Documentation/filesystems/ext4/journal.rst) and of `fs/jbd2`. Loops are bounded by the journal's size.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast.files.ext4.layout import damaged

ReadBytes = Callable[[int, int], bytes]
"""Reads so many bytes at an offset of the journal, or fewer at its end."""

JOURNAL_MAGIC: Final = b"\xc0\x3b\x39\x98"
JOURNAL_BYTES_MAX: Final = 4 * 1024**3

_DESCRIPTOR, _COMMIT, _SUPER_1, _SUPER_2, _REVOKE = 1, 2, 3, 4, 5
_TAG_ESCAPED, _TAG_SAME_ID, _TAG_LAST = 1, 2, 8
_JOURNAL_64BIT, _JOURNAL_CHECKSUM_2, _JOURNAL_CHECKSUM_3, _JOURNAL_FAST_COMMIT = 0x2, 0x8, 0x10, 0x20
_FAST_BLOCKS, _FAST_HEAD = 256, 9
_HEADER: Final = struct.Struct(">4sII")


@dataclass(frozen=True, slots=True)
class JournalledBlock:
    """A block whose newest content is in the journal.

    Attributes:
        block: number of the block in the file system.
        journal_block: number of the block within the journal that holds the content.
        escaped: whether the content's first four bytes are to be replaced by the journal's magic number.
    """

    block: int
    journal_block: int
    escaped: bool


def journalled_blocks(read: ReadBytes, journal_bytes: int) -> list[JournalledBlock]:
    """Return the blocks that applying a journal would write, each once, with its newest content.

    `read` reads the journal. Only transactions that were committed count, up to the first that was not.

    Raises:
        HoldfastError: SOURCE_UNREADABLE if it is no journal, or ends in fast commits, which are not known here.
    """
    return _Journal(read, journal_bytes).blocks()


class _Journal:
    """A journal: a ring of blocks behind a superblock."""

    def __init__(self, read: ReadBytes, journal_bytes: int) -> None:
        raw = read(0, 1024)
        if len(raw) < 1024 or journal_bytes > JOURNAL_BYTES_MAX:
            raise damaged("its journal is too small or too large to be one")
        magic, kind, _ = _HEADER.unpack_from(raw)
        if magic != JOURNAL_MAGIC or kind not in (_SUPER_1, _SUPER_2):
            raise damaged("its journal has no superblock")
        fields = struct.unpack_from(">IIIII", raw, 12)
        self._block_bytes, blocks, self._first, self._sequence, self._start = fields
        incompatible = struct.unpack_from(">I", raw, 40)[0] if kind == _SUPER_2 else 0
        self._read = read
        if self._block_bytes not in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
            raise damaged("its journal has blocks of no possible size")
        fast_blocks = 0
        if incompatible & _JOURNAL_FAST_COMMIT:
            fast_blocks = struct.unpack_from(">I", raw, 84)[0] or _FAST_BLOCKS
        self._fast = bool(fast_blocks)
        self._end = min(blocks, journal_bytes // self._block_bytes) - fast_blocks
        if not 0 < self._first < self._end or (self._start and not self._first <= self._start < self._end):
            raise damaged("its journal begins outside of itself")
        self._wide = bool(incompatible & _JOURNAL_64BIT)
        self._checksum_2 = bool(incompatible & _JOURNAL_CHECKSUM_2)
        self._checksum_3 = bool(incompatible & _JOURNAL_CHECKSUM_3)

    def _check_fast_commits(self, sequence: int) -> None:
        """Check that no fast commit follows the last transaction; `sequence` is the number that the next would have."""
        head = self._read(self._end * self._block_bytes, 12) if self._fast else b""
        if len(head) == 12 and struct.unpack("<HHII", head)[::3] == (_FAST_HEAD, sequence):
            raise damaged("it was not unmounted and its journal ends in fast commits, which only mounting can apply")

    def blocks(self) -> list[JournalledBlock]:
        if not self._start:
            return []
        revoked: dict[int, int] = {}
        found: dict[int, tuple[int, JournalledBlock]] = {}
        for sequence, written, revokes in self._transactions():
            for block in revokes:
                revoked[block] = sequence
            for each in written:
                found[each.block] = (sequence, each)
        # A revocation holds for what its own transaction and earlier ones wrote, not for what came later.
        return [each for block, (sequence, each) in found.items() if revoked.get(block, -1) < sequence]

    def _transactions(self) -> Iterator[tuple[int, list[JournalledBlock], list[int]]]:
        """Yield the committed transactions: a number that counts them, what they write, what they revoke."""
        at, sequence, count = self._start, self._sequence, 0
        written: list[JournalledBlock] = []
        revokes: list[int] = []
        passed = 0
        while passed < self._end:
            raw = self._block(at)
            magic, kind, its_sequence = _HEADER.unpack_from(raw)
            if magic != JOURNAL_MAGIC or its_sequence != sequence:
                break
            at, passed = self._next(at), passed + 1
            if kind == _DESCRIPTOR:
                for block, escaped in self._tags(raw):
                    written.append(JournalledBlock(block, at, escaped))
                    at, passed = self._next(at), passed + 1
            elif kind == _REVOKE:
                revokes.extend(self._revoked(raw))
            elif kind == _COMMIT:
                yield count, written, revokes
                written, revokes = [], []
                sequence, count = sequence + 1 & 0xFFFFFFFF, count + 1
            else:
                break
        self._check_fast_commits(sequence)

    def _block(self, number: int) -> bytes:
        raw = self._read(number * self._block_bytes, self._block_bytes)
        if len(raw) < self._block_bytes:
            raise damaged("its journal ends early")
        return raw

    def _next(self, number: int) -> int:
        return number + 1 if number + 1 < self._end else self._first

    def _tags(self, raw: bytes) -> Iterator[tuple[int, bool]]:
        """Yield the blocks that follow a descriptor block."""
        # As fs/jbd2 counts it: version 2 of the checksums makes a tag two bytes longer without using them.
        tag_bytes = 16 if self._checksum_3 else (12 if self._wide else 8) + (2 if self._checksum_2 else 0)
        at = _HEADER.size
        end = len(raw) - (4 if self._checksum_2 or self._checksum_3 else 0)
        while at + tag_bytes <= end:
            (low,) = struct.unpack_from(">I", raw, at)
            (flags,) = struct.unpack_from(*((">I", raw, at + 4) if self._checksum_3 else (">H", raw, at + 6)))
            (high,) = struct.unpack_from(">I", raw, at + 8) if self._wide else (0,)
            yield low | high << 32, bool(flags & _TAG_ESCAPED)
            at += tag_bytes + (0 if flags & _TAG_SAME_ID else 16)
            if flags & _TAG_LAST:
                return

    def _revoked(self, raw: bytes) -> Sequence[int]:
        (used,) = struct.unpack_from(">I", raw, 12)
        size = 8 if self._wide else 4
        used = min(used, len(raw))
        return [int.from_bytes(raw[at : at + size], "big") for at in range(16, used - size + 1, size)]
