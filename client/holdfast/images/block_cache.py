"""Blocks that were read lately, bounded by their bytes; the one unused for longest goes first."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

ENTRY_BYTES: Final = 256
"""What an entry costs besides its plaintext; a block of zeros costs no more than this."""


class BlockCache:
    """Plaintexts by block position; b"" stands for a block of zeros."""

    def __init__(self, limit_bytes: int) -> None:
        """Begin empty; `limit_bytes` bounds the plaintexts, and what keeping them costs."""
        self._limit_bytes = limit_bytes
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._bytes = 0

    def __contains__(self, position: int) -> bool:
        """Return whether a block is there; does not count as use."""
        return position in self._blocks

    def get(self, position: int) -> bytes | None:
        """Return a block, now the one used last, or None."""
        plain = self._blocks.get(position)
        if plain is not None:
            self._blocks.move_to_end(position)
        return plain

    def put(self, position: int, plain: bytes) -> None:
        """Keep a block; others go if there is no room. A block beyond the whole limit is not kept."""
        if len(plain) + ENTRY_BYTES > self._limit_bytes:
            return
        before = self._blocks.pop(position, None)
        if before is not None:
            self._bytes -= len(before) + ENTRY_BYTES
        self._blocks[position] = plain
        self._bytes += len(plain) + ENTRY_BYTES
        while self._bytes > self._limit_bytes:
            _, oldest = self._blocks.popitem(last=False)
            self._bytes -= len(oldest) + ENTRY_BYTES

    @property
    def size_bytes(self) -> int:
        """Bytes that are kept."""
        return self._bytes

    def clear(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._bytes = 0
