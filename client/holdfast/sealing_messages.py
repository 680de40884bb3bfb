"""What the SDK and its sealing processes say to each other.

Each message is one packet of a socket pair: a tuple of numbers, texts and columns of packed bytes, by `marshal`. Both
ends are the same interpreter and the same program, so the form needs no version; a span takes a few calls of it in
place of some hundred objects. Blocks do not travel in messages: they lie end to end in the slot of the arena that
the request names, first the sealed ones, then the plaintext of those that wait; the answer tells their lengths.
"""

from __future__ import annotations

import marshal
import struct
from collections.abc import Container
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

from holdfast.spans import SPAN_BYTES, UNSEALED, LeafEntries, SealedSpan, SpanOf, Waiting
from holdfast_core.model.block import (
    SEALED_OVERHEAD_BYTES,
    SEAM_BYTES,
    Buffer,
    Codec,
    Kind,
    Sealer,
    sealed_beside,
    seam,
)
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.lent import SealingKeys
from holdfast_core.model.limits import BLOCK_ID_BYTES, KIB, TREE_FAN_OUT

if TYPE_CHECKING:  # a worker process loads this module, and does without them
    from holdfast_core.model.tree import VolumeLeaf

MESSAGE_BYTES_MAX: Final = 64 * KIB
"""A request holds two leaves' entries, at most 97 bytes a slot and leaf."""

SLOT_BYTES: Final = SPAN_BYTES + TREE_FAN_OUT * SEALED_OVERHEAD_BYTES
"""Of the arena, for one span's blocks: none is longer than its plaintext and what sealing adds."""

SLOTS: Final = 2
"""Spans that a process has at once: it seals one while the other's blocks are copied away and its next one waits."""

READY: Final = b"ready"
_NO_ID: Final = bytes(BLOCK_ID_BYTES)

PackedEntries: TypeAlias = tuple[bytes, bytes, bytes, bytes, bytes]
"""Columns of a leaf: slots, fingerprints, block ids, which entries have a base (a byte each), ids of bases."""


@dataclass(frozen=True, slots=True)
class VolumeRequest:
    """A volume to seal spans of; its descriptor comes with the packet.

    Attributes:
        volume: number that spans name it by.
        session: number of the session; what the process remembers of content is forgotten with it.
        name, size_bytes, live: see `holdfast.descriptors.RawReader`.
    """

    volume: int
    session: int
    codec: Codec
    keys: SealingKeys
    name: str
    size_bytes: int
    live: bool

    def packed(self) -> bytes:
        """Return the packet. It holds keys."""
        keys = self.keys
        secrets = (int(keys.kind), keys.epoch, keys.cipher_key, keys.nonce_key, keys.fingerprint_key)
        about = (self.volume, self.session, int(self.codec), secrets, self.name, self.size_bytes, self.live)
        return marshal.dumps(("volume", about))

    @classmethod
    def unpacked(cls, body: Any) -> VolumeRequest:
        """Read the packet's body."""
        volume, session, codec, (kind, *keys), name, size_bytes, live = body
        return cls(volume, session, Codec(codec), SealingKeys(Kind(kind), *keys), name, size_bytes, live)


@dataclass(frozen=True, slots=True)
class SpanRequest:
    """A span to seal; see `holdfast.spans.seal_volume_span`."""

    volume: int
    leaf_offset: int
    first_slot: int
    end_slot: int
    block_bytes: int
    parent: PackedEntries | None
    base: PackedEntries | None
    delta_every: int = 0

    def packed(self, slot: int) -> bytes:
        """Return the packet; `slot` of the arena takes the blocks."""
        place = (self.volume, self.leaf_offset, self.first_slot, self.end_slot, self.block_bytes)
        return marshal.dumps(("span", (slot, place, self.parent, self.base, self.delta_every)))

    @classmethod
    def unpacked(cls, body: Any) -> tuple[int, SpanRequest]:
        """Read the packet's body; returns the slot too."""
        slot, (volume, leaf_offset, first_slot, end_slot, block_bytes), parent, base, delta_every = body
        return slot, cls(volume, leaf_offset, first_slot, end_slot, block_bytes, parent, base, delta_every)


def pack_forget(session: int) -> bytes:
    """Return the packet that ends a session: its volumes are closed, its keys and fingerprints forgotten."""
    return marshal.dumps(("forget", session))


def unpack_request(packet: bytes) -> tuple[str, Any]:
    """Return which request it is (volume, span, forget) and its body."""
    kind, body = marshal.loads(packet)
    return kind, body


def pack_entries(leaf: VolumeLeaf | None, damaged: Container[bytes]) -> PackedEntries | None:
    """Return the columns of a leaf without the entries that name a damaged id."""
    if leaf is None:
        return None
    kept = [
        at
        for at, (block_id, base_id) in enumerate(zip(leaf.block_ids, leaf.base_ids, strict=True))
        if block_id not in damaged and base_id not in damaged
    ]
    return (
        bytes([leaf.slots[at] for at in kept]),
        b"".join([leaf.fingerprints[at] for at in kept]),
        b"".join([leaf.block_ids[at] for at in kept]),
        bytes([leaf.base_ids[at] != b"" for at in kept]),
        b"".join([leaf.base_ids[at] for at in kept]),
    )


def unpack_entries(packed: PackedEntries | None) -> LeafEntries:
    """Return what `holdfast.spans.leaf_entries` makes of the same leaf."""
    if packed is None:
        return {}
    slots, fingerprints, block_ids, have_base, bases = packed
    references = zip(_cut(block_ids), _cut_bases(have_base, bases), strict=True)
    return dict(zip(slots, zip(_cut(fingerprints), references, strict=True), strict=True))


class PlacedBlock(NamedTuple):
    """A block that was sealed into an arena.

    Attributes:
        id: the hash of its bytes.
        length: how many bytes it has there.
        seam: the first and the last of them; see `holdfast_core.model.block.seam`.
    """

    id: bytes
    length: int
    seam: bytes


class ArenaSealer:
    """Seals blocks end to end into a slot of the arena."""

    def __init__(self, sealer: Sealer) -> None:
        """Take the sealer; `begin` before anything is sealed."""
        self._sealer = sealer
        self._slot = memoryview(b"")
        self._at = 0

    def begin(self, slot: memoryview) -> None:
        """Seal into this slot from now on; what is there is overwritten."""
        self._slot = slot
        self._at = 0

    def seal(self, plain: Buffer, *, codec: Codec) -> PlacedBlock:
        """Seal a block behind the one before it."""
        out = self._slot[self._at :]
        block_id, length = self._sealer.seal_into(plain, out, codec=codec)
        self._at += length
        return PlacedBlock(block_id, length, seam(out[:length]))


def pack_span(span: SpanOf[PlacedBlock], arena: memoryview) -> bytes:
    """Put what waits into the span's slot of the arena, behind what is sealed there; return the answer's packet."""
    at = sum([block.length for block, _ in span.new])
    for item in span.waiting:
        end = at + len(item.plain)
        arena[at:end] = item.plain
        at = end
    count = len(span.new)
    waiting = (
        bytes([item.position for item in span.waiting]),
        struct.pack(f"<{len(span.waiting)}I", *[len(item.plain) for item in span.waiting]),
        b"".join([item.base_id for item in span.waiting]),
    )
    columns = (
        bytes(span.slots),
        b"".join(span.fingerprints),
        b"".join([reference[0] or _NO_ID for reference in span.references]),
        bytes([reference[1] != b"" for reference in span.references]),
        b"".join([reference[1] for reference in span.references]),
        b"".join([block.id for block, _ in span.new]),
        b"".join([block.seam for block, _ in span.new]),
        struct.pack(f"<{count}I", *[block.length for block, _ in span.new]),
        struct.pack(f"<{count}I", *[plain_bytes for _, plain_bytes in span.new]),
    )
    sums = (span.read_bytes, span.changed_bytes, span.changed_blocks, span.reused_bytes)
    return marshal.dumps((True, (sums, columns, waiting)))


def pack_error(error: HoldfastError) -> bytes:
    """Return the answer's packet where a span failed."""
    return marshal.dumps((False, (error.code.name, error.message, error.facts, error.block_ids)))


def unpack_answer(packet: bytes, arena: memoryview) -> SealedSpan:
    """Return a span whose blocks are copied out of its slot of the arena.

    Raises:
        HoldfastError: what sealing the span raised in the process; CORRUPT if the arena holds another block than the
            answer names.
    """
    done, body = marshal.loads(packet)
    if not done:
        code, message, facts, ids = body
        raise HoldfastError(ErrorCode[code], message, facts=facts, block_ids=ids)
    sums, (slots, fingerprints, block_ids, have_base, bases, new_ids, seams, lengths, plain), packed_waiting = body
    count = len(new_ids) // BLOCK_ID_BYTES
    ends = list(accumulate(struct.unpack(f"<{count}I", lengths), initial=0))
    blocks = [
        sealed_beside(block_id, arena[at:end], there)
        for block_id, at, end, there in zip(_cut(new_ids), ends, ends[1:], _cut(seams, SEAM_BYTES), strict=False)
    ]
    references = list(zip(_cut(block_ids), _cut_bases(have_base, bases), strict=True))
    waiting = _unpack_waiting(packed_waiting, arena[ends[-1] :])
    for item in waiting:
        references[item.position] = UNSEALED
    read_bytes, changed_bytes, changed_blocks, reused_bytes = sums
    return SealedSpan(
        slots=list(slots),
        fingerprints=_cut(fingerprints),
        references=references,
        new=list(zip(blocks, struct.unpack(f"<{count}I", plain), strict=True)),
        read_bytes=read_bytes,
        changed_bytes=changed_bytes,
        changed_blocks=changed_blocks,
        reused_bytes=reused_bytes,
        waiting=waiting,
    )


def _unpack_waiting(packed: tuple[bytes, bytes, bytes], arena: memoryview) -> list[Waiting]:
    """Return blocks that wait, their plaintext copied from the beginning of `arena`."""
    positions, lengths, base_ids = packed
    ends = list(accumulate(struct.unpack(f"<{len(positions)}I", lengths), initial=0))
    return [
        Waiting(position, bytes(arena[at:end]), base_id)
        for position, at, end, base_id in zip(positions, ends, ends[1:], _cut(base_ids), strict=False)
    ]


def _cut(column: bytes, size: int = BLOCK_ID_BYTES) -> list[bytes]:
    """Cut a column of ids or fingerprints, or of something else of `size` bytes each."""
    return [column[at : at + size] for at in range(0, len(column), size)]


def _cut_bases(have_base: bytes, bases: bytes) -> list[bytes]:
    """Return an id or b"" for each entry; most volumes have no bases at all."""
    if not bases:
        return [b""] * len(have_base)
    ids = iter(_cut(bases))
    return [next(ids) if has else b"" for has in have_base]
