"""The layout of a qcow2 image whose data clusters are known before any of them is written.

All tables follow from which parts of the volume are not zero, and those the index tells. So metadata can be written
once, and data in any order and from several threads, each cluster where it will stay: an image is restored at the speed
of a raw file. Pure: computes offsets and bytes, touches no file.

Format: docs/interop/qcow2.txt of QEMU, version 3, clusters of 64 KiB, refcounts of 16 bits, no backing file, no
compression, no encryption. Numbers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import KIB

CLUSTER_BYTES: Final = 64 * KIB
SECTOR_BYTES: Final = 512
_CLUSTER_BITS: Final = 16
_ENTRIES: Final = CLUSTER_BYTES // 8
_REFCOUNTS: Final = CLUSTER_BYTES // 2
_REFCOUNT_ORDER: Final = 4
_COPIED: Final = 1 << 63
_MAGIC: Final = b"QFI\xfb"
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQQQQII")
_L1_BYTES_MAX: Final = 32 * KIB * KIB
"""QEMU refuses a larger table."""


class ClusterMap:
    """Which clusters of a volume hold data."""

    def __init__(self) -> None:
        """Begin with none."""
        self._masks: dict[int, int] = {}

    def add(self, start: int, end: int) -> None:
        """Mark the clusters that the bytes `start` to before `end` touch."""
        first, last = start // CLUSTER_BYTES, (end - 1) // CLUSTER_BYTES
        for table in range(first // _ENTRIES, last // _ENTRIES + 1):
            low = max(first - table * _ENTRIES, 0)
            high = min(last - table * _ENTRIES, _ENTRIES - 1)
            run = ((1 << (high - low + 1)) - 1) << low
            self._masks[table] = self._masks.get(table, 0) | run

    def tables(self) -> list[tuple[int, int]]:
        """Return the tables that have any cluster, ascending: number, and a bit a cluster."""
        return sorted(self._masks.items())


class Qcow2Layout:
    """Where everything of one image lies.

    Attributes:
        virtual_bytes: size that a guest sees: the volume's, rounded up to a sector.
        file_bytes: length of the file.
    """

    def __init__(self, size_bytes: int, clusters: ClusterMap) -> None:
        """Lay out an image.

        Raises:
            HoldfastError: LIMIT_EXCEEDED if QEMU would not open an image of that size.
        """
        self.virtual_bytes = -(-size_bytes // SECTOR_BYTES) * SECTOR_BYTES
        self._l1_entries = -(-self.virtual_bytes // (CLUSTER_BYTES * _ENTRIES))
        if self._l1_entries * 8 > _L1_BYTES_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED,
                f"a qcow2 image holds at most {_L1_BYTES_MAX // 8 * CLUSTER_BYTES * _ENTRIES} bytes; restore it as raw",
            )
        tables = clusters.tables()
        data = sum(mask.bit_count() for _, mask in tables)
        l1_clusters = max(1, -(-self._l1_entries * 8 // CLUSTER_BYTES))
        self._refcount_table_clusters, self._refcount_blocks = _refcounts(1 + l1_clusters + len(tables) + data)
        self._l1_at = 1 + self._refcount_table_clusters + self._refcount_blocks
        self._l2_at = self._l1_at + l1_clusters
        self._data_at = self._l2_at + len(tables)
        self._cluster_count = self._data_at + data
        self.file_bytes = self._cluster_count * CLUSTER_BYTES
        self._tables: dict[int, tuple[int, int]] = {}
        rank = 0
        for number, mask in tables:
            self._tables[number] = (mask, rank)
            rank += mask.bit_count()

    def offset_of(self, offset: int) -> int:
        """Return where the byte at `offset` of the volume lies in the file.

        Raises:
            KeyError: its cluster was not marked.
        """
        cluster, within = divmod(offset, CLUSTER_BYTES)
        number, slot = divmod(cluster, _ENTRIES)
        mask, rank = self._tables[number]
        if not mask >> slot & 1:
            raise KeyError(offset)
        before = (mask & ((1 << slot) - 1)).bit_count()
        return (self._data_at + rank + before) * CLUSTER_BYTES + within

    def metadata(self) -> Iterator[tuple[int, bytes]]:
        """Yield all that is not data, as (offset, bytes); what is between is zero."""
        yield 0, self._header()
        for position in range(self._refcount_table_clusters):
            first = position * _ENTRIES
            blocks = range(first, min(first + _ENTRIES, self._refcount_blocks))
            offsets = [(1 + self._refcount_table_clusters + block) * CLUSTER_BYTES for block in blocks]
            yield (1 + position) * CLUSTER_BYTES, _numbers(offsets)
        for block in range(self._refcount_blocks):
            used = min(_REFCOUNTS, self._cluster_count - block * _REFCOUNTS)
            yield (1 + self._refcount_table_clusters + block) * CLUSTER_BYTES, b"\0\1" * used
        l1 = [0] * self._l1_entries
        for position, number in enumerate(self._tables):
            at = (self._l2_at + position) * CLUSTER_BYTES
            l1[number] = at | _COPIED
            yield at, self._l2(number)
        yield self._l1_at * CLUSTER_BYTES, _numbers(l1)

    def _header(self) -> bytes:
        return _HEADER.pack(
            _MAGIC,
            3,
            0,  # no backing file
            0,
            _CLUSTER_BITS,
            self.virtual_bytes,
            0,  # no encryption: whoever restores holds the plaintext
            self._l1_entries,
            self._l1_at * CLUSTER_BYTES,
            CLUSTER_BYTES,
            self._refcount_table_clusters,
            0,  # no internal snapshots
            0,
            0,
            0,
            0,
            _REFCOUNT_ORDER,
            _HEADER.size,
        )

    def _l2(self, number: int) -> bytes:
        mask, rank = self._tables[number]
        entries = [0] * _ENTRIES
        at = (self._data_at + rank) * CLUSTER_BYTES
        while mask:
            slot = (mask & -mask).bit_length() - 1
            entries[slot] = at | _COPIED
            at += CLUSTER_BYTES
            mask &= mask - 1
        return _numbers(entries)


def _numbers(values: list[int]) -> bytes:
    return struct.pack(f">{len(values)}Q", *values)


def _refcounts(others: int) -> tuple[int, int]:
    """Return clusters of the refcount table and number of refcount blocks, which count themselves too."""
    table = blocks = 1
    while True:
        needed_blocks = -(-(others + table + blocks) // _REFCOUNTS)
        needed_table = -(-needed_blocks // _ENTRIES)
        if (needed_table, needed_blocks) == (table, blocks):
            return table, blocks
        table, blocks = needed_table, needed_blocks
