"""Index nodes and their bytes (docs/formats.md).

A node is a small header and columns of packed bytes, so that it is read by slicing rather than entry by entry. Every
node has exactly one encoding: what decodes encodes to the same bytes again. A node is never empty.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NoReturn, TypeAlias

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import BLOCK_ID_BYTES, PLAIN_BYTES_MAX, TREE_FAN_OUT

VERSION: Final = 1
TYPE_VOLUME_LEAF: Final = 1
TYPE_VOLUME_INNER: Final = 2
TYPE_OBJECT_LEAF: Final = 3
TYPE_OBJECT_INNER: Final = 4
LEVEL_MAX: Final = 8

_HEADER = struct.Struct("<BBBB")
_BITMAP_BYTES: Final = TREE_FAN_OUT // 8
_OBJECT_BYTES_MAX: Final = 2**63 - 1


@dataclass(frozen=True, slots=True)
class VolumeLeaf:
    """The blocks of 128 neighbouring positions of a volume; positions that are zero are left out.

    Attributes:
        slots: positions within the leaf, ascending, 0 to 127, at least one.
        fingerprints: 32 bytes a slot.
        block_ids: 32 bytes a slot.
        base_ids: a slot's base, 32 bytes, where its block is delta-coded, else empty.
    """

    slots: tuple[int, ...]
    fingerprints: tuple[bytes, ...]
    block_ids: tuple[bytes, ...]
    base_ids: tuple[bytes, ...]

    @property
    def level(self) -> int:
        """Height above the blocks: 0."""
        return 0


@dataclass(frozen=True, slots=True)
class VolumeInner:
    """References to up to 128 nodes of the level below; subtrees that are all zero are left out.

    Attributes:
        level: height above the leaves, at least 1.
        slots: which children there are, ascending, 0 to 127, at least one.
        child_ids: 32 bytes a slot.
    """

    level: int
    slots: tuple[int, ...]
    child_ids: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class ObjectLeaf:
    """Up to 128 consecutive cuts of a stored object.

    Attributes:
        lengths: plain bytes of each cut, at least 1.
        fingerprints: 32 bytes a cut.
        block_ids: 32 bytes a cut.
    """

    lengths: tuple[int, ...]
    fingerprints: tuple[bytes, ...]
    block_ids: tuple[bytes, ...]

    @property
    def level(self) -> int:
        """Height above the blocks: 0."""
        return 0


@dataclass(frozen=True, slots=True)
class ObjectInner:
    """References to up to 128 nodes of the level below, with the bytes that each covers.

    Attributes:
        level: height above the leaves, at least 1.
        child_ids: 32 bytes a child.
        child_bytes: plain bytes of the object below each child, at least 1.
    """

    level: int
    child_ids: tuple[bytes, ...]
    child_bytes: tuple[int, ...]


Node: TypeAlias = VolumeLeaf | VolumeInner | ObjectLeaf | ObjectInner


def encode_node(node: Node) -> bytes:
    """Return the node's bytes, to be sealed as an index block.

    Raises:
        ValueError: columns of different lengths, an id that is not 32 bytes, or any value out of its range.
    """
    if isinstance(node, VolumeLeaf):
        return _encode_volume_leaf(node)
    if isinstance(node, VolumeInner):
        _check_columns(len(node.slots), node.child_ids)
        _check_level(node.level)
        head = _HEADER.pack(VERSION, TYPE_VOLUME_INNER, node.level, len(node.slots))
        return b"".join((head, _bitmap(node.slots), *node.child_ids))
    if isinstance(node, ObjectLeaf):
        count = len(node.lengths)
        _check_columns(count, node.fingerprints, node.block_ids)
        if not all(1 <= length <= PLAIN_BYTES_MAX for length in node.lengths):
            raise ValueError("a cut has 1 byte at least and the plain bytes of a block at most")
        head = _HEADER.pack(VERSION, TYPE_OBJECT_LEAF, 0, count)
        lengths = struct.pack(f"<{count}I", *node.lengths)
        return b"".join((head, lengths, *node.fingerprints, *node.block_ids))
    count = len(node.child_ids)
    _check_columns(count, node.child_ids)
    _check_level(node.level)
    if len(node.child_bytes) != count or not all(1 <= size <= _OBJECT_BYTES_MAX for size in node.child_bytes):
        raise ValueError("every child of an object's inner node covers 1 byte at least")
    head = _HEADER.pack(VERSION, TYPE_OBJECT_INNER, node.level, count)
    return b"".join((head, struct.pack(f"<{count}Q", *node.child_bytes), *node.child_ids))


def _encode_volume_leaf(node: VolumeLeaf) -> bytes:
    count = len(node.slots)
    _check_columns(count, node.fingerprints, node.block_ids)
    if len(node.base_ids) != count:
        raise ValueError("the columns of a node have one length")
    bases = [(slot, base) for slot, base in zip(node.slots, node.base_ids, strict=True) if base]
    if any(len(base) != BLOCK_ID_BYTES for _, base in bases):
        raise ValueError(f"a base id takes {BLOCK_ID_BYTES} bytes or none")
    return b"".join(
        (
            _HEADER.pack(VERSION, TYPE_VOLUME_LEAF, 0, count),
            _bitmap(node.slots),
            _bits([slot for slot, _ in bases]),
            *node.fingerprints,
            *node.block_ids,
            *(base for _, base in bases),
        )
    )


def _check_columns(count: int, *columns: Sequence[bytes]) -> None:
    if not 1 <= count <= TREE_FAN_OUT:
        raise ValueError(f"a node has 1 to {TREE_FAN_OUT} entries, not {count}")
    for column in columns:
        if len(column) != count or any(len(cell) != BLOCK_ID_BYTES for cell in column):
            raise ValueError(f"the columns of a node have one length, and cells of {BLOCK_ID_BYTES} bytes")


def _check_level(level: int) -> None:
    if not 1 <= level <= LEVEL_MAX:
        raise ValueError(f"an inner node has a level from 1 to {LEVEL_MAX}, not {level}")


def _bitmap(slots: Sequence[int]) -> bytes:
    if any(a >= b for a, b in itertools.pairwise(slots)) or slots[0] < 0 or slots[-1] >= TREE_FAN_OUT:
        raise ValueError("slots ascend and stay within the node")
    return _bits(slots)


def _bits(slots: Sequence[int]) -> bytes:
    bits = 0
    for slot in slots:
        bits |= 1 << slot
    return bits.to_bytes(_BITMAP_BYTES, "little")


def decode_node(plain: bytes) -> Node:
    """Return the node that `plain` encodes; any input is safe.

    Raises:
        HoldfastError: CORRUPT if `plain` is not exactly what `encode_node` makes of some node.
    """
    if len(plain) < _HEADER.size:
        _malformed("it is too short")
    version, kind, level, count = _HEADER.unpack_from(plain)
    if version != VERSION:
        _malformed(f"its version {version} is unknown")
    if not 1 <= count <= TREE_FAN_OUT:
        _malformed(f"it claims {count} entries")
    if kind in (TYPE_VOLUME_LEAF, TYPE_OBJECT_LEAF):
        if level:
            _malformed(f"it is a leaf of level {level}")
        return _decode_volume_leaf(plain, count) if kind == TYPE_VOLUME_LEAF else _decode_object_leaf(plain, count)
    if kind not in (TYPE_VOLUME_INNER, TYPE_OBJECT_INNER):
        _malformed(f"its type {kind} is unknown")
    if not 1 <= level <= LEVEL_MAX:
        _malformed(f"it is an inner node of level {level}")
    if kind == TYPE_VOLUME_INNER:
        at = _HEADER.size + _BITMAP_BYTES
        _check_size(plain, at + count * BLOCK_ID_BYTES)
        return VolumeInner(level, _slots(plain, _HEADER.size, count), _cells(plain, at, count))
    at = _HEADER.size + 8 * count
    _check_size(plain, at + count * BLOCK_ID_BYTES)
    child_bytes = struct.unpack_from(f"<{count}Q", plain, _HEADER.size)
    if min(child_bytes) == 0 or max(child_bytes) > _OBJECT_BYTES_MAX:
        _malformed("a child covers no bytes, or more than there can be")
    return ObjectInner(level, _cells(plain, at, count), child_bytes)


def _decode_volume_leaf(plain: bytes, count: int) -> VolumeLeaf:
    at = _HEADER.size + 2 * _BITMAP_BYTES
    bases_at = at + 2 * count * BLOCK_ID_BYTES
    if len(plain) < bases_at:
        _malformed("it is too short")
    slots = _slots(plain, _HEADER.size, count)
    delta_bits = int.from_bytes(plain[_HEADER.size + _BITMAP_BYTES : at], "little")
    if not delta_bits:
        _check_size(plain, bases_at)
        base_ids: tuple[bytes, ...] = (b"",) * count
    else:
        base_count = delta_bits.bit_count()
        _check_size(plain, bases_at + base_count * BLOCK_ID_BYTES)
        bases = iter(_cells(plain, bases_at, base_count))
        if delta_bits & ~int.from_bytes(plain[_HEADER.size : _HEADER.size + _BITMAP_BYTES], "little"):
            _malformed("a base is named for a slot that is empty")
        base_ids = tuple(next(bases) if delta_bits >> slot & 1 else b"" for slot in slots)
    block_ids = _cells(plain, at + count * BLOCK_ID_BYTES, count)
    return VolumeLeaf(slots, _cells(plain, at, count), block_ids, base_ids)


def _decode_object_leaf(plain: bytes, count: int) -> ObjectLeaf:
    at = _HEADER.size + 4 * count
    _check_size(plain, at + 2 * count * BLOCK_ID_BYTES)
    lengths = struct.unpack_from(f"<{count}I", plain, _HEADER.size)
    if min(lengths) == 0 or max(lengths) > PLAIN_BYTES_MAX:
        _malformed("a cut has no bytes, or more than a block may have")
    return ObjectLeaf(lengths, _cells(plain, at, count), _cells(plain, at + count * BLOCK_ID_BYTES, count))


def _slots(plain: bytes, at: int, count: int) -> tuple[int, ...]:
    bits = int.from_bytes(plain[at : at + _BITMAP_BYTES], "little")
    if bits.bit_count() != count:
        _malformed("its bitmap does not fit its count")
    if count == TREE_FAN_OUT:
        return _ALL_SLOTS
    return tuple(slot for slot in _ALL_SLOTS if bits >> slot & 1)


_ALL_SLOTS: Final = tuple(range(TREE_FAN_OUT))


def _cells(plain: bytes, at: int, count: int) -> tuple[bytes, ...]:
    return tuple(
        [plain[cell : cell + BLOCK_ID_BYTES] for cell in range(at, at + count * BLOCK_ID_BYTES, BLOCK_ID_BYTES)]
    )


def _check_size(plain: bytes, size: int) -> None:
    if len(plain) != size:
        _malformed(f"it has {len(plain)} bytes instead of {size}")


def _malformed(reason: str) -> NoReturn:
    raise HoldfastError(ErrorCode.CORRUPT, f"this is no well-formed index node: {reason}")
