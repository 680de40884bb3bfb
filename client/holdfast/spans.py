"""The work of one span of a volume or object: read, skip zeros, fingerprint, compare, compress, seal.

A span is at most 8 MiB and never crosses an index leaf. All of its work is one call in a worker thread or process,
because a trip through the event loop costs more than a block; the heavy calls release the GIL, so spans run in
parallel.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Generic, Protocol, TypeAlias, TypeVar

from holdfast_core.model.block import Buffer, Codec, SealedBlock
from holdfast_core.model.limits import MIB, TREE_FAN_OUT, VOLUME_BLOCK_BYTES_MAX

if TYPE_CHECKING:  # a worker process loads this module, and seals without them
    from holdfast.descriptors import Extent
    from holdfast_core.model.tree import VolumeLeaf

SPAN_BYTES: Final = 8 * MIB
# Of a span, read at a time: what was read is still in the processor's own cache when it is hashed and compressed.
_PIECE_BYTES: Final = 1 * MIB
_ZEROS: Final = bytes(VOLUME_BLOCK_BYTES_MAX)

Reference = tuple[bytes, bytes]
"""A block id and the id of its base, empty where the block is coded plain."""

UNSEALED: Final[Reference] = (b"", b"")
"""Stands where a block waits for what it could be coded against."""


class FingerprintCache:
    """Fingerprints met in this session, bounded: when one generation is full, the one before it is dropped.

    Shared by worker threads without a lock: single operations on dicts are atomic, and a lost entry costs a seal and a
    question to the nodes, never correctness.
    """

    def __init__(self, entries_max: int = 65_536) -> None:
        self._entries_max = entries_max
        self._young: dict[bytes, Reference] = {}
        self._old: dict[bytes, Reference] = {}

    def get(self, fingerprint: bytes) -> Reference | None:
        """Return what the fingerprint was met as."""
        return self._young.get(fingerprint) or self._old.get(fingerprint)

    def put(self, fingerprint: bytes, reference: Reference) -> None:
        """Remember a fingerprint."""
        if len(self._young) >= self._entries_max:
            self._old, self._young = self._young, {}
        self._young[fingerprint] = reference


class Fingerprinter(Protocol):
    """The tenant's keys, as far as a span needs them beside its sealer."""

    def fingerprint(self, plain: Buffer) -> bytes:
        """Return 32 bytes that tell whether this plaintext is already known."""
        ...


class SpanSource(Protocol):
    """What a span needs of its source; see `holdfast.sources.VolumeSource`."""

    @property
    def size_bytes(self) -> int:
        """Size, fixed when the source was opened."""
        ...

    def allocated(self, start: int, end: int) -> Sequence[Extent]:
        """Return the extents within the range that may hold other bytes than zero."""
        ...

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes at `offset`."""
        ...


class Sealed(Protocol):
    """A block that was sealed, wherever its bytes are."""

    @property
    def id(self) -> bytes:
        """The hash of its bytes."""


Made = TypeVar("Made", bound=Sealed)
Made_co = TypeVar("Made_co", bound=Sealed, covariant=True)


class SpanSealer(Protocol[Made_co]):
    """Seals a span's blocks: `holdfast_core.model.block.Sealer`, or one that puts them elsewhere."""

    def seal(self, plain: Buffer, *, codec: Codec) -> Made_co:
        """Compress and seal a block."""
        ...


@dataclass(frozen=True, slots=True)
class SpanContext(Generic[Made]):
    """What all spans of one volume or object share.

    Attributes:
        damaged: ids that count as not present.
    """

    ring: Fingerprinter
    sealer: SpanSealer[Made]
    codec: Codec
    cache: FingerprintCache
    damaged: Container[bytes]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A block that is not sealed yet, because an earlier block at its place may be worth coding it against.

    Attributes:
        position: in the span's `references`, where `UNSEALED` stands until it is sealed.
        plain: its plaintext.
        base_id: the block that it would be coded against.
    """

    position: int
    plain: bytes
    base_id: bytes


@dataclass(slots=True)
class SpanOf(Generic[Made]):
    """What came of a span: its part of the index, and the blocks that may be new to the cluster.

    Attributes:
        slots: positions within the leaf that are not zero; positions in the object's span for cuts.
        fingerprints: one a slot.
        references: one a slot.
        new: blocks sealed here, each with its plaintext's length; the cluster may have them all the same.
        read_bytes: read from the source.
        changed_bytes: plaintext of blocks that are not the parent's at that place.
        changed_blocks: their number.
        reused_bytes: part of `changed_bytes` that was met in this session or in the base.
        waiting: blocks that are still to be sealed; `holdfast.deltas` does it.
        delta_blocks: blocks that were coded against an earlier one.
        delta_plain_bytes: their plaintext.
        delta_bytes: their sealed bytes.
    """

    slots: list[int] = field(default_factory=list)
    fingerprints: list[bytes] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    new: list[tuple[Made, int]] = field(default_factory=list)
    read_bytes: int = 0
    changed_bytes: int = 0
    changed_blocks: int = 0
    reused_bytes: int = 0
    waiting: list[Waiting] = field(default_factory=list)
    delta_blocks: int = 0
    delta_plain_bytes: int = 0
    delta_bytes: int = 0


SealedSpan: TypeAlias = SpanOf[SealedBlock]
"""A span whose blocks are here."""


class _Buffers(threading.local):
    """A buffer a thread to read pieces of a span into.

    It begins with a page, as what is copied from the page cache does. Large memory of malloc begins 16 bytes into one,
    and a copy to just there, by the instruction that the kernel uses, takes four to six times as long on AMD EPYC.
    """

    def __init__(self) -> None:
        self.piece = memoryview(mmap.mmap(-1, _PIECE_BYTES))

    def take(self, size: int) -> memoryview:
        if size > len(self.piece):
            self.piece = memoryview(mmap.mmap(-1, size))
        return self.piece


_buffers = _Buffers()

LeafEntries = dict[int, tuple[bytes, Reference]]


def leaf_entries(leaf: VolumeLeaf | None, damaged: Container[bytes]) -> LeafEntries:
    """Return fingerprint and reference by slot, without those that name a damaged id."""
    if leaf is None:
        return {}
    return {
        slot: (fingerprint, (block_id, base_id))
        for slot, fingerprint, block_id, base_id in zip(
            leaf.slots, leaf.fingerprints, leaf.block_ids, leaf.base_ids, strict=True
        )
        if block_id not in damaged and base_id not in damaged
    }


def spans_of_leaf(block_bytes: int) -> list[tuple[int, int]]:
    """Return (first slot, end slot) of the spans that a leaf is read in."""
    step = min(TREE_FAN_OUT, max(1, SPAN_BYTES // block_bytes))
    return [(first, min(TREE_FAN_OUT, first + step)) for first in range(0, TREE_FAN_OUT, step)]


def seal_volume_span(
    context: SpanContext[Made],
    source: SpanSource,
    *,
    leaf_offset: int,
    first_slot: int,
    end_slot: int,
    block_bytes: int,
    parent: LeafEntries,
    base: LeafEntries,
    delta_every: int = 0,
) -> SpanOf[Made]:
    """Read and seal the blocks `first_slot` to before `end_slot` of the leaf that begins at `leaf_offset`.

    Of the changed blocks whose place had another block before, one in `delta_every` is left waiting; none if 0.

    Raises:
        HoldfastError: what the source raises.
    """
    result: SpanOf[Made] = SpanOf()
    step = max(1, _PIECE_BYTES // block_bytes)
    for first in range(first_slot, end_slot, step):
        start = leaf_offset + first * block_bytes
        end = min(leaf_offset + min(first + step, end_slot) * block_bytes, source.size_bytes)
        if start >= end:
            break
        extents = source.allocated(start, end)
        if not extents:
            continue
        view = _buffers.take(step * block_bytes)
        touched = _read(source, extents, start=start, end=end, block_bytes=block_bytes, view=view, result=result)
        for position in touched:
            at = position * block_bytes
            length = min(block_bytes, end - start - at)
            plain = view[at : at + length]
            if not _ZEROS.startswith(plain):  # stops at the first difference, and copies nothing
                _take_block(context, first + position, plain, parent, base, delta_every, result)
    return result


def _take_block(
    context: SpanContext[Made],
    slot: int,
    plain: memoryview,
    parent: LeafEntries,
    base: LeafEntries,
    delta_every: int,
    result: SpanOf[Made],
) -> None:
    """Fingerprint a block, and seal it unless it is known or is to wait."""
    length = len(plain)
    cache = context.cache
    fingerprint = context.ring.fingerprint(plain)
    known = parent.get(slot)
    if known is not None and known[0] == fingerprint:
        reference = known[1]
    else:
        result.changed_bytes += length
        result.changed_blocks += 1
        similar = base.get(slot)
        met = similar[1] if similar is not None and similar[0] == fingerprint else cache.get(fingerprint)
        before = known or similar
        if met is not None:
            reference = met
            result.reused_bytes += length
        elif before is not None and is_tried(fingerprint, delta_every):
            reference = UNSEALED
            result.waiting.append(Waiting(len(result.references), bytes(plain), base_of(before[1])))
        else:
            block = context.sealer.seal(plain, codec=context.codec)
            reference = (block.id, b"")
            result.new.append((block, length))
            cache.put(fingerprint, reference)
    result.slots.append(slot)
    result.fingerprints.append(fingerprint)
    result.references.append(reference)


def is_tried(fingerprint: bytes, delta_every: int) -> bool:
    """Return whether a block is among the one in `delta_every` that are tried as deltas; the same for one content."""
    return delta_every > 0 and fingerprint[0] % delta_every == 0


def base_of(reference: Reference) -> bytes:
    """Return what a successor of a block is coded against: the block, or its own base, as no base is a delta."""
    block_id, base_id = reference
    return base_id or block_id


def _read(
    source: SpanSource,
    extents: Sequence[Extent],
    *,
    start: int,
    end: int,
    block_bytes: int,
    view: memoryview,
    result: SpanOf[Made],
) -> list[int]:
    """Read every block that an extent touches, zeros in its holes; returns their positions, ascending."""
    touched: list[int] = []
    filled_to = start  # all before it is read or zeroed, as far as touched blocks need it
    for extent in extents:
        first = (extent.start - start) // block_bytes
        last = (extent.end - 1 - start) // block_bytes
        head = max(filled_to, start + first * block_bytes)
        if extent.start > head:
            view[head - start : extent.start - start] = bytes(extent.start - head)
        tail = min(end, start + (last + 1) * block_bytes)
        source.read_into(extent.start, view[extent.start - start : extent.end - start])
        result.read_bytes += extent.end - extent.start
        if tail > extent.end:
            view[extent.end - start : tail - start] = bytes(tail - extent.end)
        # The next extent may begin inside this block: it overwrites its part of the zeros.
        filled_to = tail
        touched.extend(range(first if not touched or touched[-1] < first else touched[-1] + 1, last + 1))
    return touched


def seal_cuts(context: SpanContext[SealedBlock], cuts: Sequence[bytes]) -> SealedSpan:
    """Fingerprint and seal cuts of application data, in order; `slots` are their positions in `cuts`."""
    result = SealedSpan()
    for position, plain in enumerate(cuts):
        fingerprint = context.ring.fingerprint(plain)
        reference = context.cache.get(fingerprint)
        result.changed_bytes += len(plain)
        result.changed_blocks += 1
        if reference is not None:
            result.reused_bytes += len(plain)
        else:
            block = context.sealer.seal(plain, codec=context.codec)
            reference = (block.id, b"")
            result.new.append((block, len(plain)))
            context.cache.put(fingerprint, reference)
        result.slots.append(position)
        result.fingerprints.append(fingerprint)
        result.references.append(reference)
    return result
