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
    KEPT = 6


@dataclass(frozen=True, slots=True)
class BlockEntry:
    """One block of a listing: its id, its sealed length in bytes, its kind (as in the block's header) and its stamp.

    The stamp is the collection epoch that the block counts as stamped with, floors included. `quarantined` says that
    the copy is set aside as corrupt; only a listing that asks for such copies has any.
    """

    block_id: bytes
    length: int
    kind: int
    stamp: int = 0
    quarantined: bool = False


@dataclass(frozen=True, slots=True)
class Holding:
    """What a store holds of one tenant in one partition: how many blocks, and the sum of their ids modulo 2**256.

    Copies that are set aside as corrupt do not count.
    """

    tenant: int
    count: int
    digest: bytes


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
    """Keeps sealed blocks by tenant and id, each with a stamp: the collection epoch it was last put or found in.

    Stamps never go back. A block counts as stamped with the largest of its own stamp, its partition's floor, and the
    floor of the whole store, which an index rebuild raises to the first epoch that is learnt afterwards.
    """

    def put(self, tenant: int, blocks: Sequence[Sealed], *, stamp: int = 0) -> list[Verdict]:
        """Keep all of `blocks` or none, stamped; durable on return. OK: written now. PRESENT: was there, whole.

        Raises:
            HoldfastError: DISK_FULL; INTERNAL if the disk failed.
        """
        ...

    def get(self, tenant: int, ids: Sequence[bytes], *, bytes_max: int) -> list[Found]:
        """Answer the first of `ids`, in order: at least one, and as many as fit into `bytes_max` bytes of blocks."""
        ...

    def has(self, tenant: int, ids: Sequence[bytes], *, verify: bool = False, stamp: int = 0) -> list[Verdict]:
        """Answer OK, MISSING or CORRUPT for each; with `verify` the bytes are read and hashed.

        What is found whole is stamped, durably on return; `stamp` 0 writes nothing.
        """
        ...

    def kinds(self, tenant: int, ids: Sequence[bytes]) -> list[int | None]:
        """Return the kind of each block, None where it is not held."""
        ...

    def delete(self, tenant: int, ids: Sequence[bytes], *, cutoff: int | None = None) -> list[Verdict]:
        """Remove blocks, durably on return. OK: removed. MISSING: was not there. KEPT: stamped at or above `cutoff`.

        That is decided under the lock under which blocks are stamped. None removes whatever the stamps say. A copy that
        is set aside as corrupt has its stamp still, and goes or stays by it like any other.

        Raises:
            HoldfastError: CONFLICT for a cut-off below the highest of this tenant that the open store has seen;
                NOT_READY for any while an index rebuild has left the stamps unknown; INTERNAL if the disk failed.
        """
        ...

    def scan(
        self,
        tenant: int,
        *,
        partition: int | None,
        end: int | None = None,
        after: bytes,
        limit: int,
        with_quarantined: bool = False,
    ) -> list[BlockEntry]:
        """List up to `limit` entries in order of partition, then id, above the id `after` (b"" for the first).

        All partitions are listed where `partition` is None; otherwise that one, or with `end` those from it to before
        `end`, at the cost of what is held there and not of how many they are.
        Copies that are set aside as corrupt are left out, or with `with_quarantined` listed as what they are.
        """
        ...

    def tenants(self) -> list[int]:
        """Return the numbers of all tenants of which something is held, ascending."""
        ...

    def holdings(self, partition: int) -> list[Holding]:
        """Return what is held in a partition, by tenant, ascending; tenants without a whole block are left out."""
        ...

    def quarantined(self, *, limit: int) -> list[tuple[int, bytes]]:
        """Return (tenant, id) of up to `limit` copies that are set aside as corrupt."""
        ...

    @property
    def epoch(self) -> int:
        """The newest collection epoch that was learnt."""
        ...

    def learn_epoch(self, epoch: int) -> None:
        """Take note of a collection epoch that a coordinator told just now; older ones change nothing.

        The first one after an index rebuild becomes the floor of the whole store, durably on return.
        """
        ...

    def raise_floor(self, partitions: Sequence[int], epoch: int) -> None:
        """Let every block of these partitions, also later ones, count as stamped with at least `epoch`; durable."""
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

    def submit(self, tenant: int, blocks: Sequence[Sealed], *, stamp: int = 0) -> Future[list[Verdict]]:
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
