"""Trees for tests: a store of nodes, and volumes built over it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Protocol

from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree import ObjectLeaf, VolumeInner, VolumeLeaf, VolumeTreeBuilder, decode_node
from tests.model.strategies import identity


class NodeStore(dict[bytes, bytes]):
    """Nodes by id."""

    def store(self, plain: bytes) -> bytes:
        """Keep a node's plaintext and return its id."""
        node_id = hashlib.blake2s(plain).digest()
        self[node_id] = plain
        return node_id


class Walk(Protocol):
    """What every walk has."""

    @property
    def done(self) -> bool:
        """Whether everything was found."""

    def wanted(self, limit: int = ...) -> list[bytes]:
        """Ids to bring."""

    def feed(self, nodes: Mapping[bytes, bytes]) -> None:
        """Take nodes."""


def run(walk: Walk, store: Mapping[bytes, bytes], *, limit: int = 64, each: Callable[[], object] | None = None) -> int:
    """Feed a walk until it is done; returns how many nodes were brought."""
    fetched = 0
    while not walk.done:
        wanted = walk.wanted(limit)
        assert 0 < len(wanted) <= max(limit, 2)
        assert len(set(wanted)) == len(wanted)
        fetched += len(wanted)
        walk.feed({node_id: store[node_id] for node_id in wanted})
        if each is not None:
            each()
    assert walk.wanted() == []
    return fetched


Volume = dict[int, tuple[int, int]]
"""A volume's blocks: position to (number of the block, number of its base or 0)."""


def leaf_of(volume: Volume, leaf_index: int) -> VolumeLeaf | None:
    """The leaf that a volume has at a place."""
    first = leaf_index * TREE_FAN_OUT
    entries = [(at - first, *volume[at]) for at in range(first, first + TREE_FAN_OUT) if at in volume]
    if not entries:
        return None
    return VolumeLeaf(
        tuple(slot for slot, _, _ in entries),
        tuple(identity(2**70 + block) for _, block, _ in entries),
        tuple(identity(block) for _, block, _ in entries),
        tuple(identity(base) if base else b"" for _, _, base in entries),
    )


def build_volume(volume: Volume, block_count_total: int, store: NodeStore) -> bytes:
    """Build the tree of a volume and return its root."""
    builder = VolumeTreeBuilder(block_count_total, store.store)
    for leaf_index in range(-(-block_count_total // TREE_FAN_OUT)):
        if any(at // TREE_FAN_OUT == leaf_index for at in volume):
            builder.add_leaf(leaf_index, leaf_of(volume, leaf_index))
        elif leaf_index % 2:
            builder.add_leaf(leaf_index, None)
    return builder.finish()


def reachable(root: bytes, store: Mapping[bytes, bytes]) -> tuple[set[bytes], set[bytes]]:
    """Index ids and block ids (bases too) under a root, by plain recursion."""
    if not root:
        return set(), set()
    node = decode_node(store[root])
    if isinstance(node, VolumeLeaf):
        return {root}, {*node.block_ids, *filter(None, node.base_ids)}
    if isinstance(node, ObjectLeaf):
        return {root}, set(node.block_ids)
    index, blocks = {root}, set[bytes]()
    for child in node.child_ids:
        below = reachable(child, store)
        index |= below[0]
        blocks |= below[1]
    return index, blocks


def node_at_places(
    root: bytes, level: int, store: Mapping[bytes, bytes], index: int = 0
) -> dict[tuple[int, int], bytes]:
    """A volume's nodes by place (level, number)."""
    if not root:
        return {}
    places = {(level, index): root}
    node = decode_node(store[root])
    if isinstance(node, VolumeInner):
        for slot, child in zip(node.slots, node.child_ids, strict=True):
            places |= node_at_places(child, level - 1, store, index * TREE_FAN_OUT + slot)
    return places
