"""What a storage node asks of the thing that keeps its blocks. One conformance suite runs on every implementation.

Stores are synchronous and thread-safe. A tenant sees only its own blocks. Every id is verified: what goes in was
verified by construction (`Sealed`), what comes out was hashed after it was read.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Protocol, TypeAlias, runtime_checkable

from holdfast_core.model.block import Buffer, SealedBlock, SealedView

# Where the header of a sealed block has its flags, and which of their bits are the kind.
_FLAGS_OFFSET: Final = 6
_KIND_BITS: Final = 0b11


class Verdict(enum.IntEnum):
    """What a store says of one block; the numbers are those of the wire's `Verdict`."""

    OK = 1
    PRESENT = 2
    MISSING = 3
    CORRUPT = 4
    DENIED = 5


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One block of a listing: its id, its sealed length in bytes and its kind (as in the block's header)."""

    block_id: bytes
    length: int
    kind: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreStatus:
    """How a store is: what it may use, uses and has left (the reserve taken off), all in bytes, and counts of blocks.

    `full` means that it refuses writes for want of space, `failed` that its disk refused to make a write durable and it
    takes no more writes.
    """

    capacity_bytes: int
    used_bytes: int
    free_bytes: int
    block_count: int
    quarantined_count: int
    full: bool
    failed: bool


Sealed: TypeAlias = SealedBlock | SealedView
"""A verified block to keep. A view keeps its whole message alive, so a store that holds on to bytes copies it."""

Found: TypeAlias = SealedBlock | Verdict
"""A verified block, or MISSING or CORRUPT."""

PartitionOf: TypeAlias = Callable[[bytes], int]
"""From a block id to its partition; fixed for the life of a cluster."""


class BlockStore(Protocol):
    """Keeps sealed blocks by tenant and id."""

    def put(self, tenant: int, blocks: Sequence[Sealed]) -> list[Verdict]:
        """Keep all of `blocks` or none; durable on return. OK: written now. PRESENT: was there, whole.

        Raises:
            HoldfastError: DISK_FULL; INTERNAL if the disk failed.
        """
        ...

    def get(self, tenant: int, ids: Sequence[bytes], *, bytes_max: int) -> list[Found]:
        """Answer the first of `ids`, in order: at least one, and as many as fit into `bytes_max` bytes of blocks."""
        ...

    def has(self, tenant: int, ids: Sequence[bytes], *, verify: bool = False) -> list[Verdict]:
        """Answer OK, MISSING or CORRUPT for each; with `verify` the bytes are read and hashed."""
        ...

    def kinds(self, tenant: int, ids: Sequence[bytes]) -> list[int | None]:
        """Return the kind of each block, None where it is not held."""
        ...

    def delete(self, tenant: int, ids: Sequence[bytes]) -> list[Verdict]:
        """Remove blocks, durably on return. OK: removed. MISSING: was not there."""
        ...

    def scan(self, tenant: int, *, partition: int | None, after: bytes, limit: int) -> list[BlockEntry]:
        """List up to `limit` entries in order of partition, then id, above the id `after` (b"" for the first)."""
        ...

    def status(self) -> StoreStatus:
        """Say how the store is."""
        ...

    def close(self) -> None:
        """Finish what was begun and release the files; idempotent."""
        ...


@runtime_checkable
class SubmittingStore(Protocol):
    """An optional power: `put` in two steps, so that a batch which waits for the disk holds no thread."""

    def submit(self, tenant: int, blocks: Sequence[Sealed]) -> Future[list[Verdict]]:
        """As `put`, but return as soon as the order of writes is decided; the future ends when all is durable."""
        ...


@runtime_checkable
class CompactingStore(Protocol):
    """An optional power: giving dead space back."""

    def compact(self, *, dead_fraction_min: float) -> int:
        """Rewrite one file with at least this fraction of dead bytes; return the bytes freed, 0 if there was none."""
        ...


def kind_of(sealed: Buffer) -> int:
    """Return the kind of a sealed block whose form was checked: bits 0 and 1 of the flags (DESIGN section 3)."""
    return sealed[_FLAGS_OFFSET] & _KIND_BITS
