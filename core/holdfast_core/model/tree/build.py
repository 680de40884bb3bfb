"""Builders of index trees: leaves come in order, a node is stored as soon as it is complete.

At any time a builder holds one unfinished node a level, whatever the volume's size.
"""

from __future__ import annotations

from collections.abc import Callable

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree.nodes import LEVEL_MAX, ObjectInner, ObjectLeaf, VolumeInner, VolumeLeaf, encode_node
from holdfast_core.model.tree.shape import leaf_count, leaf_span, volume_height


class _OpenInner:
    """An inner node that is still being filled; `index` is its place within its level."""

    __slots__ = ("child_ids", "index", "slots")

    def __init__(self) -> None:
        self.index = 0
        self.slots: list[int] = []
        self.child_ids: list[bytes] = []


class VolumeTreeBuilder:
    """Builds the tree of one volume."""

    def __init__(self, block_count_total: int, store: Callable[[bytes], bytes]) -> None:
        """Take the number of positions, zero blocks too, and what stores a node's plaintext and returns its id."""
        self._store = store
        self._leaf_count = leaf_count(block_count_total)
        self._height = volume_height(block_count_total)
        self._open = [_OpenInner() for _ in range(self._height)]
        self._next_leaf = 0
        self._root = b""

    def add_leaf(self, leaf_index: int, leaf: VolumeLeaf | None) -> None:
        """Add the leaf at `leaf_index`, or say with None that it is all zero. Indexes ascend; gaps are all zero.

        Raises:
            ValueError: an index that is out of range or does not ascend.
        """
        self._advance(leaf_index, 1)
        if leaf is not None:
            self._place(0, leaf_index, self._store(encode_node(leaf)))
        self._close_complete()

    def reuse_leaf(self, leaf_index: int, leaf_id: bytes) -> None:
        """Name a leaf that is stored already, as `add_leaf` otherwise."""
        self.reuse_subtree(0, leaf_index, leaf_id)

    def reuse_subtree(self, level: int, index: int, node_id: bytes) -> None:
        """Name a node of any level below or at the root that is stored already, as `add_leaf` otherwise."""
        if not 0 <= level <= self._height:
            raise ValueError(f"the tree has no level {level}")
        self._advance(index * leaf_span(level), leaf_span(level))
        self._place(level, index, node_id)
        self._close_complete()

    def finish(self) -> bytes:
        """Store what is unfinished and return the root's id, or b"" where everything is zero."""
        self._next_leaf = self._leaf_count
        self._close_complete()
        return self._root

    def _advance(self, first_leaf: int, leaves: int) -> None:
        if not self._next_leaf <= first_leaf < self._leaf_count:
            raise ValueError(f"leaf {first_leaf} is out of turn: {self._next_leaf} to {self._leaf_count - 1} may come")
        self._next_leaf = first_leaf
        self._close_complete()
        self._next_leaf = min(first_leaf + leaves, self._leaf_count)

    def _place(self, level: int, index: int, node_id: bytes) -> None:
        if level == self._height:
            self._root = node_id
            return
        parent = self._open[level]
        parent.index = index // TREE_FAN_OUT
        parent.slots.append(index % TREE_FAN_OUT)
        parent.child_ids.append(node_id)

    def _close_complete(self) -> None:
        """Store every open node whose last leaf has passed, from the bottom up."""
        for position, node in enumerate(self._open):
            level = position + 1
            end = min((node.index + 1) * leaf_span(level), self._leaf_count)
            if node.slots and self._next_leaf >= end:
                inner = VolumeInner(level, tuple(node.slots), tuple(node.child_ids))
                index = node.index
                self._open[position] = _OpenInner()
                self._place(level, index, self._store(encode_node(inner)))


class ObjectTreeBuilder:
    """Builds the tree of one stored object; every leaf but the last is full, so the shape follows from the count."""

    def __init__(self, store: Callable[[bytes], bytes]) -> None:
        """Take what stores a node's plaintext and returns its id."""
        self._store = store
        self._lengths: list[int] = []
        self._fingerprints: list[bytes] = []
        self._block_ids: list[bytes] = []
        self._levels: list[tuple[list[bytes], list[int]]] = []
        self.block_count = 0
        self.size_bytes = 0

    def add(self, fingerprint: bytes, block_id: bytes, length: int) -> None:
        """Append one cut of `length` plain bytes, at least 1."""
        if len(self._lengths) == TREE_FAN_OUT:
            self._close_leaf()
        self._lengths.append(length)
        self._fingerprints.append(fingerprint)
        self._block_ids.append(block_id)
        self.block_count += 1
        self.size_bytes += length

    def finish(self) -> bytes:
        """Store what is unfinished and return the root's id, or b"" for an object without bytes."""
        if not self._lengths:
            return b""
        self._close_leaf()
        position = 0
        while position < len(self._levels) - 1 or len(self._levels[position][0]) > 1:
            self._close_inner(position)
            position += 1
        return self._levels[position][0][0]

    def _close_leaf(self) -> None:
        leaf = ObjectLeaf(tuple(self._lengths), tuple(self._fingerprints), tuple(self._block_ids))
        size = sum(self._lengths)
        self._lengths, self._fingerprints, self._block_ids = [], [], []
        self._append(0, self._store(encode_node(leaf)), size)

    def _append(self, position: int, node_id: bytes, size: int) -> None:
        if position == len(self._levels):
            if position > LEVEL_MAX:
                raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, "the object has more blocks than an index tree can hold")
            self._levels.append(([], []))
        if len(self._levels[position][0]) == TREE_FAN_OUT:
            self._close_inner(position)
        child_ids, child_bytes = self._levels[position]
        child_ids.append(node_id)
        child_bytes.append(size)

    def _close_inner(self, position: int) -> None:
        child_ids, child_bytes = self._levels[position]
        self._levels[position] = ([], [])
        inner = ObjectInner(position + 1, tuple(child_ids), tuple(child_bytes))
        self._append(position + 1, self._store(encode_node(inner)), sum(child_bytes))
