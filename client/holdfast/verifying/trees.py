"""The trees of volumes and of objects as one thing: nodes at their places, and the blocks that leaves name."""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from holdfast.content import Entry
from holdfast.index import block_count_of
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree import (
    ObjectLeafRef,
    ObjectRef,
    VolumeRef,
    decode_object_leaf,
    decode_volume_leaf,
    leaf_count,
    leaf_span,
    object_children,
    object_root,
    volume_children,
    volume_height,
)
from holdfast_proto.v1.records_pb2 import ObjectRecord, VolumeRecord

_CUT_BYTES_GUESS: Final = 256 * 1024


class Place(NamedTuple):
    """A node of a tree and the bytes that it stands for; `leaf` says whether it names blocks."""

    node_id: bytes
    start: int
    end: int
    leaf: bool
    ref: VolumeRef | ObjectRef


class Tree(Protocol):
    """The tree of a volume or of an object."""

    @property
    def part(self) -> str:
        """Name of the volume; empty for an object."""

    @property
    def block_bytes(self) -> int:
        """About how large its blocks are."""

    def root(self) -> list[Place]:
        """Return the root; nothing where there is no content."""

    def children(self, place: Place, plain: bytes) -> list[Place]:
        """Return the nodes that an inner node names. Raises CORRUPT if it does not fit its place."""

    def entries(self, place: Place, plain: bytes) -> list[Entry]:
        """Return the blocks that a leaf names, keyed by their byte offsets. Raises as `children`."""


class VolumeTree:
    """The tree of a volume of a point."""

    def __init__(self, volume: VolumeRecord) -> None:
        """Take the volume's record."""
        self.part = volume.name
        self.block_bytes = volume.block_bytes
        self._root = volume.root
        self._size = volume.size_bytes
        self._positions = block_count_of(volume)
        self._leaves = leaf_count(self._positions)

    def root(self) -> list[Place]:
        """See `Tree`."""
        return [self._place(VolumeRef(volume_height(self._positions), 0, self._root))] if self._root else []

    def children(self, place: Place, plain: bytes) -> list[Place]:
        """See `Tree`."""
        assert isinstance(place.ref, VolumeRef), "places are this tree's own"
        return [self._place(ref) for ref in volume_children(place.ref, plain, self._leaves)]

    def entries(self, place: Place, plain: bytes) -> list[Entry]:
        """See `Tree`."""
        assert isinstance(place.ref, VolumeRef), "places are this tree's own"
        leaf = decode_volume_leaf(place.node_id, plain, leaf_index=place.ref.place, block_count_total=self._positions)
        entries = []
        for slot, fingerprint, block_id, base_id in zip(
            leaf.slots, leaf.fingerprints, leaf.block_ids, leaf.base_ids, strict=True
        ):
            offset = place.start + slot * self.block_bytes
            entries.append(Entry(offset, min(self.block_bytes, self._size - offset), fingerprint, block_id, base_id))
        return entries

    def _place(self, ref: VolumeRef) -> Place:
        span = leaf_span(ref.level) * TREE_FAN_OUT * self.block_bytes
        start = ref.place * span
        return Place(ref.node_id, start, min(start + span, self._size), ref.level == 0, ref)


class ObjectTree:
    """The tree of a stored object."""

    part = ""
    block_bytes = _CUT_BYTES_GUESS

    def __init__(self, record: ObjectRecord) -> None:
        """Take the object's record."""
        self._record = record

    def root(self) -> list[Place]:
        """See `Tree`."""
        record = self._record
        return [self._place(ref) for ref in object_root(record.root, record.block_count, record.size_bytes)]

    def children(self, place: Place, plain: bytes) -> list[Place]:
        """See `Tree`."""
        assert isinstance(place.ref, ObjectRef), "places are this tree's own"
        return [self._place(ref) for ref in object_children(place.ref, plain)]

    def entries(self, place: Place, plain: bytes) -> list[Entry]:
        """See `Tree`."""
        assert isinstance(place.ref, ObjectRef), "places are this tree's own"
        ref = place.ref
        leaf = decode_object_leaf(ObjectLeafRef(ref.byte_offset, ref.node_id, ref.byte_count, ref.block_count), plain)
        offset, entries = place.start, []
        for length, fingerprint, block_id in zip(leaf.lengths, leaf.fingerprints, leaf.block_ids, strict=True):
            entries.append(Entry(offset, length, fingerprint, block_id, b""))
            offset += length
        return entries

    def _place(self, ref: ObjectRef) -> Place:
        return Place(ref.node_id, ref.byte_offset, ref.byte_offset + ref.byte_count, ref.level == 0, ref)
