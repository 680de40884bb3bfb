"""Walks that collect every reference that a tree newly makes, leaves included; used as the walks of `walk` are.

A commit checks what these find. References that the older tree makes at the same place are left out: they are durable
by induction. `take` hands out what was found so far, so that memory stays bounded by what one feed can bring.

A collection marks what they find. It walks many trees that share much, so a walk may be told which index nodes it need
not look at again: `known` holds those whose subtrees another walk finds.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import NamedTuple

from holdfast_core.model.tree.objects import (
    ObjectLeafRef,
    ObjectRef,
    decode_object_leaf,
    object_children,
    object_root,
)
from holdfast_core.model.tree.shape import leaf_count, volume_height
from holdfast_core.model.tree.walk import (
    WANTED_MAX,
    VolumeRef,
    decode_volume_leaf,
    first_ids,
    volume_children,
)


class NewReferences(NamedTuple):
    """Ids of index nodes, and of blocks and bases, that were found; an id may come more than once."""

    index_ids: list[bytes]
    block_ids: list[bytes]


class _Pair(NamedTuple):
    """A node of the new tree and what the old tree has at that place or, where the trees' heights differ, around it."""

    new: VolumeRef
    old: VolumeRef | None

    def needs(self) -> Iterator[bytes]:
        if self.old is None or self.old.level <= self.new.level:
            yield self.new.node_id
        if self.old is not None and self.old.level >= self.new.level:
            yield self.old.node_id


class DiffWalk:
    """Finds what a volume's tree references beyond what an older tree references at the same place.

    The two may have different heights, and either root may be b"" (all zero); without an old root it finds everything.

    Attributes:
        new_index_ids: index nodes of the new tree that the old one does not have at that place, not yet taken.
        new_block_ids: blocks and bases that a slot names and that the old slot names in neither role, not yet taken.
    """

    def __init__(
        self, new_root: bytes, new_blocks: int, old_root: bytes, old_blocks: int, *, known: Container[bytes] = ()
    ) -> None:
        """Take each tree's root and its number of positions, zero blocks too; subtrees below `known` are passed by."""
        self._known = known
        self._new_blocks = new_blocks
        self._old_blocks = old_blocks
        self._pending: list[_Pair] = []
        self.new_index_ids: list[bytes] = []
        self.new_block_ids: list[bytes] = []
        if new_root:
            new = VolumeRef(volume_height(new_blocks), 0, new_root)
            old = VolumeRef(volume_height(old_blocks), 0, old_root) if old_root else None
            self._pend(self._pending, new, old)

    @property
    def done(self) -> bool:
        """Whether everything has been found."""
        return not self._pending

    def wanted(self, limit: int = WANTED_MAX) -> list[bytes]:
        """Return ids of nodes to bring next, of either tree, about `limit` at most; none exactly when done."""
        return first_ids((node_id for pair in self._pending for node_id in pair.needs()), max(limit, 2))

    def feed(self, nodes: Mapping[bytes, bytes]) -> None:
        """Take plaintexts of wanted nodes by id, some or all; what is not wanted is ignored, and a node whose
        counterpart is missing is asked for again.

        Raises:
            HoldfastError: CORRUPT, naming the node, if one is malformed or misplaced.
        """
        pending: list[_Pair] = []
        for pair in self._pending:
            if all(node_id in nodes for node_id in pair.needs()):
                self._expand(pair, nodes, pending)
            else:
                pending.append(pair)
        self._pending = pending

    def take(self) -> NewReferences:
        """Return what was found and forget it."""
        taken = NewReferences(self.new_index_ids, self.new_block_ids)
        self.new_index_ids, self.new_block_ids = [], []
        return taken

    def _pend(self, pending: list[_Pair], new: VolumeRef, old: VolumeRef | None) -> None:
        if (old is None or old.node_id != new.node_id) and new.node_id not in self._known:
            pending.append(_Pair(new, old))

    def _expand(self, pair: _Pair, nodes: Mapping[bytes, bytes], pending: list[_Pair]) -> None:
        new, old = pair
        old_leaves = leaf_count(self._old_blocks)
        if old is not None and old.level > new.level:
            # The old tree is the higher one: all that the new one can share lies below its first child.
            children = volume_children(old, nodes[old.node_id], old_leaves)
            self._pend(pending, new, next((child for child in children if child.place == 0), None))
            return
        self.new_index_ids.append(new.node_id)
        if new.level == 0:
            self._compare_leaves(pair, nodes)
            return
        old_children: dict[int, VolumeRef] = {}
        if old is not None:
            below = [old] if old.level < new.level else volume_children(old, nodes[old.node_id], old_leaves)
            old_children = {child.place: child for child in below}
        for child in volume_children(new, nodes[new.node_id], leaf_count(self._new_blocks)):
            self._pend(pending, child, old_children.get(child.place))

    def _compare_leaves(self, pair: _Pair, nodes: Mapping[bytes, bytes]) -> None:
        new, old = pair
        known: dict[int, tuple[bytes, bytes]] = {}
        if old is not None:
            leaf = decode_volume_leaf(
                old.node_id, nodes[old.node_id], leaf_index=old.place, block_count_total=self._old_blocks
            )
            known = {
                slot: (block, base) for slot, block, base in zip(leaf.slots, leaf.block_ids, leaf.base_ids, strict=True)
            }
        leaf = decode_volume_leaf(
            new.node_id, nodes[new.node_id], leaf_index=new.place, block_count_total=self._new_blocks
        )
        for slot, block, base in zip(leaf.slots, leaf.block_ids, leaf.base_ids, strict=True):
            before = known.get(slot, ())
            if block not in before:
                self.new_block_ids.append(block)
            if base and base not in before:
                self.new_block_ids.append(base)


class ObjectScan:
    """Finds everything that a stored object's tree references; the counterpart of `DiffWalk` for objects.

    Attributes:
        new_index_ids: index nodes, not yet taken.
        new_block_ids: blocks, not yet taken.
    """

    def __init__(self, root: bytes, *, block_count: int, size_bytes: int, known: Container[bytes] = ()) -> None:
        """Take root, block count and size from the object's record; subtrees below `known` are passed by."""
        self._known = known
        self._pending = [ref for ref in object_root(root, block_count, size_bytes) if ref.node_id not in known]
        self.new_index_ids: list[bytes] = []
        self.new_block_ids: list[bytes] = []

    @property
    def done(self) -> bool:
        """Whether everything has been found."""
        return not self._pending

    def wanted(self, limit: int = WANTED_MAX) -> list[bytes]:
        """Return ids of up to `limit` nodes to bring next; none exactly when done."""
        return first_ids((ref.node_id for ref in self._pending), limit)

    def feed(self, nodes: Mapping[bytes, bytes]) -> None:
        """Take plaintexts of wanted nodes by id, some or all; what is not wanted is ignored.

        Raises:
            HoldfastError: CORRUPT, naming the node, if one is malformed or misplaced.
        """
        pending: list[ObjectRef] = []
        for ref in self._pending:
            plain = nodes.get(ref.node_id)
            if plain is None:
                pending.append(ref)
                continue
            self.new_index_ids.append(ref.node_id)
            if ref.level:
                pending.extend(child for child in object_children(ref, plain) if child.node_id not in self._known)
            else:
                leaf_ref = ObjectLeafRef(ref.byte_offset, ref.node_id, ref.byte_count, ref.block_count)
                self.new_block_ids.extend(decode_object_leaf(leaf_ref, plain).block_ids)
        self._pending = pending

    def take(self) -> NewReferences:
        """Return what was found and forget it."""
        taken = NewReferences(self.new_index_ids, self.new_block_ids)
        self.new_index_ids, self.new_block_ids = [], []
        return taken
