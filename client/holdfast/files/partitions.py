"""Tables of partitions: GPT (UEFI specification, section 5.3), and MBR with logical partitions."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from holdfast.files.ext4.file_system import RandomAccess

_ENTRIES_MAX: Final = 1024
_LOGICAL_MAX: Final = 128
_EXTENDED: Final = frozenset({0x05, 0x0F, 0x85})
_PROTECTIVE: Final = 0xEE
_SIGNATURE: Final = b"\x55\xaa"


class Partition(NamedTuple):
    """A partition, in bytes of the image.

    Attributes:
        number: its number in the table, from 1 on; logical partitions of an MBR begin at 5.
    """

    number: int
    offset: int
    length: int


def partitions_of(image: RandomAccess) -> list[Partition]:
    """Return the partitions that lie within the image, by number; none where there is no table.

    Raises:
        HoldfastError: what the image raises.
    """
    for sector in (512, 4096):
        found = list(_gpt(image, sector))
        if found:
            return found
    return list(_mbr(image))


def _read(image: RandomAccess, offset: int, length: int) -> bytes:
    length = max(0, min(length, image.size_bytes - offset))
    return image.read(offset, length) if length else b""


def _gpt(image: RandomAccess, sector: int) -> Iterator[Partition]:
    header = _read(image, sector, 92)
    if len(header) < 92 or header[:8] != b"EFI PART":
        return
    first, count, size = struct.unpack_from("<QII", header, 72)
    if not 128 <= size <= 4096 or not count <= _ENTRIES_MAX:
        return
    table = _read(image, first * sector, count * size)
    for index in range(len(table) // size):
        kind, _, start, last = struct.unpack_from("<16s16sQQ", table, index * size)
        if kind != bytes(16) and start <= last and (last + 1) * sector <= image.size_bytes:
            yield Partition(index + 1, start * sector, (last + 1 - start) * sector)


def _mbr(image: RandomAccess) -> Iterator[Partition]:
    table = list(_records(image, 0))
    if any(kind == _PROTECTIVE for kind, _, _ in table):
        return
    for number, (kind, start, length) in enumerate(table, 1):
        if kind in _EXTENDED:
            yield from _logical(image, start)
        elif kind and length and (start + length) * 512 <= image.size_bytes:
            yield Partition(number, start * 512, length * 512)


def _logical(image: RandomAccess, extended: int) -> Iterator[Partition]:
    """Yield the logical partitions, each in a table of its own that also says where the next one is."""
    at = extended
    for number in range(5, 5 + _LOGICAL_MAX):
        records = list(_records(image, at * 512))[:2]
        if not records:
            return
        kind, start, length = records[0]
        if kind and length and (at + start + length) * 512 <= image.size_bytes:
            yield Partition(number, (at + start) * 512, length * 512)
        if len(records) < 2 or not records[1][1]:
            return
        at = extended + records[1][1]


def _records(image: RandomAccess, offset: int) -> Iterator[tuple[int, int, int]]:
    """Yield kind, first sector and number of sectors of the four records of a table; none where it is no table."""
    sector = _read(image, offset, 512)
    if sector[510:] != _SIGNATURE:
        return
    for at in range(446, 510, 16):
        status, kind, start, length = struct.unpack_from("<B3xB3xII", sector, at)
        if status not in (0, 0x80):
            return
        yield kind, start, length
