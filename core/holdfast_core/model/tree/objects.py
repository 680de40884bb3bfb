"""Walks through the tree of a stored object, by byte offsets; used as the walks of `walk` are.

The shape of the tree follows from the number of blocks, and the record names the size, so every node is held to the
exact number of children and bytes that its place demands.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree.nodes import ObjectInner, ObjectLeaf
from holdfast_core.model.tree.shape import tree_height
from holdfast_core.model.tree.walk import WANTED_MAX, decode_at, first_ids, misplaced


class ObjectLeafRef(NamedTuple):
    """A leaf of a stored object: where its bytes begin, and how many bytes and blocks it must hold."""

    byte_offset: int
    leaf_id: bytes
    byte_count: int
    block_count: int


class ObjectRef(NamedTuple):
    """A node at its place in an object's tree, with what it must cover."""

    level: int
    byte_offset: int
    node_id: bytes
    byte_count: int
    block_count: int


def object_children(ref: ObjectRef, plain: bytes) -> list[ObjectRef]:
    """Return the children that the inner node at `ref` names.

    Raises:
        HoldfastError: CORRUPT if it is no inner node of that level, or covers another number of bytes or blocks.
    """
    node = decode_at(ref.node_id, plain)
    if not isinstance(node, ObjectInner) or node.level != ref.level:
        misplaced(ref.node_id, f"is no inner node of level {ref.level} of an object")
    child_blocks = TREE_FAN_OUT**ref.level
    if len(node.child_ids) != -(-ref.block_count // child_blocks) or sum(node.child_bytes) != ref.byte_count:
        misplaced(ref.node_id, "does not cover what its parent says")
    children = []
    offset = ref.byte_offset
    for position, (child, size) in enumerate(zip(node.child_ids, node.child_bytes, strict=True)):
        blocks = min(child_blocks, ref.block_count - position * child_blocks)
        children.append(ObjectRef(ref.level - 1, offset, child, size, blocks))
        offset += size
    return children


def decode_object_leaf(ref: ObjectLeafRef, plain: bytes) -> ObjectLeaf:
    """Return the leaf, having checked that it holds what its place demands.

    Raises:
        HoldfastError: CORRUPT, naming the leaf, if it is malformed, no leaf, or of other bytes or blocks.
    """
    node = decode_at(ref.leaf_id, plain)
    if not isinstance(node, ObjectLeaf):
        misplaced(ref.leaf_id, "is no leaf of an object")
    if len(node.lengths) != ref.block_count or sum(node.lengths) != ref.byte_count:
        misplaced(ref.leaf_id, "does not hold what its parent says")
    return node


def object_root(root: bytes, block_count: int, size_bytes: int) -> list[ObjectRef]:
    """Return the root at its place, or nothing for an object without bytes."""
    return [ObjectRef(tree_height(block_count), 0, root, size_bytes, block_count)] if root else []


class ObjectWalk:
    """Finds the leaves that hold a range of an object's bytes.

    Attributes:
        leaves: what was found and not yet taken, in order of offset; the first may begin before the range.
    """

    def __init__(
        self, root: bytes, *, block_count: int, size_bytes: int, start: int = 0, end: int | None = None
    ) -> None:
        """Take root, block count and size from the object's record, and the bytes to find, `start` to before `end`."""
        self._start = start
        self._end = size_bytes if end is None else min(end, size_bytes)
        self._pending = object_root(root, block_count, size_bytes) if self._start < self._end else []
        self.leaves: list[ObjectLeafRef] = []
        self._settle()

    @property
    def done(self) -> bool:
        """Whether every leaf has been found."""
        return not self._pending

    def wanted(self, limit: int = WANTED_MAX) -> list[bytes]:
        """Return ids of up to `limit` inner nodes to bring next; none exactly when done."""
        return first_ids((ref.node_id for ref in self._pending if ref.level), limit)

    def feed(self, nodes: Mapping[bytes, bytes]) -> None:
        """Take plaintexts of wanted nodes by id, some or all; what is not wanted is ignored.

        Raises:
            HoldfastError: CORRUPT, naming the node, if one is malformed or misplaced.
        """
        pending: list[ObjectRef] = []
        for ref in self._pending:
            plain = nodes.get(ref.node_id) if ref.level else None
            if plain is None:
                pending.append(ref)
            else:
                pending.extend(filter(self._covers, object_children(ref, plain)))
        self._pending = pending
        self._settle()

    def take_leaves(self) -> list[ObjectLeafRef]:
        """Return `leaves` and forget them."""
        taken, self.leaves = self.leaves, []
        return taken

    def _covers(self, ref: ObjectRef) -> bool:
        return ref.byte_offset < self._end and ref.byte_offset + ref.byte_count > self._start

    def _settle(self) -> None:
        ready = 0
        while ready < len(self._pending) and self._pending[ready].level == 0:
            ready += 1
        self.leaves.extend(
            ObjectLeafRef(ref.byte_offset, ref.node_id, ref.byte_count, ref.block_count)
            for ref in self._pending[:ready]
        )
        del self._pending[:ready]
