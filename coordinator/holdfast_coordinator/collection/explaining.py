"""Why a block is kept: every point, object and session whose trees reach it, and where in them. Pure.

Each index node was read once, however many trees share it. Which of them reach the block is found from the leaves
upwards; then each tree is followed only where it leads there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Final, TypeAlias

from holdfast_coordinator.collection.graph import Graph, Leaf
from holdfast_coordinator.collection.held import HeldTree
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree import ObjectInner, ObjectLeaf
from holdfast_proto.v1.collection_pb2 import BlockHolder

HOLDERS_MAX: Final = 1000
DATA, BASE, INDEX = "data", "base", "index"

Hits: TypeAlias = tuple[tuple[str, int], ...]
"""Where a leaf names the block: the role, and the slot in a volume's leaf or the first byte in an object's."""

AS_INDEX: Final[Hits] = ((INDEX, 0),)
"""What stands for the block itself where it is an index node."""


def hits_of(leaf: Leaf, block_id: bytes) -> Hits:
    """Return where a leaf names a block. Pure."""
    if isinstance(leaf, ObjectLeaf):
        found, at = [], 0
        for length, here in zip(leaf.lengths, leaf.block_ids, strict=True):
            if here == block_id:
                found.append((DATA, at))
            at += length
        return tuple(found)
    slots = list(zip(leaf.slots, leaf.block_ids, leaf.base_ids, strict=True))
    return (
        *((DATA, slot) for slot, here, _ in slots if here == block_id),
        *((BASE, slot) for slot, _, base in slots if base == block_id),
    )


def holders(trees: Iterable[HeldTree], graph: Graph[Hits]) -> tuple[list[BlockHolder], bool]:
    """Return what reaches the block that the graph's hits are of, and whether there is more than `HOLDERS_MAX`."""
    reaching = _reaching(graph)
    found = list(islice((holder for tree in trees for holder in _of_tree(tree, graph, reaching)), HOLDERS_MAX + 1))
    return found[:HOLDERS_MAX], len(found) > HOLDERS_MAX


def _reaching(graph: Graph[Hits]) -> set[bytes]:
    """Return the ids of all nodes from which the block is reached."""
    reaching = {node_id for node_id, hits in graph.leaves.items() if hits}
    # A node's children are of lower levels, so one pass upwards suffices.
    for node_id, node in sorted(graph.inner.items(), key=lambda item: item[1].level):
        if not reaching.isdisjoint(node.child_ids):
            reaching.add(node_id)
    return reaching


def _of_tree(tree: HeldTree, graph: Graph[Hits], reaching: set[bytes]) -> Iterator[BlockHolder]:
    """Yield where a tree names the block, from its beginning on."""
    # A place is a node's number on its level for volumes, and its first byte for objects.
    pending = [(tree.root, 0)] if tree.root in reaching else []
    while pending:
        node_id, place = pending.pop()
        inner = graph.inner.get(node_id)
        if inner is None:
            for role, at in graph.leaves[node_id]:
                yield _holder(tree, role, place, at)
        elif isinstance(inner, ObjectInner):
            starts = [place]
            for size in inner.child_bytes:
                starts.append(starts[-1] + size)
            below = zip(inner.child_ids, starts, strict=False)
            pending.extend([(child, start) for child, start in below if child in reaching][::-1])
        else:
            children = zip(inner.slots, inner.child_ids, strict=True)
            first = place * TREE_FAN_OUT
            pending.extend([(child, first + slot) for slot, child in children if child in reaching][::-1])


def _holder(tree: HeldTree, role: str, place: int, at: int) -> BlockHolder:
    holder = BlockHolder(
        resource_id=tree.resource_id, vm_id=tree.vm_id, task_id=tree.task_id, volume=tree.volume, role=role
    )
    if role != INDEX and not tree.is_session:
        holder.offset_bytes = (place * TREE_FAN_OUT + at) * tree.block_bytes if tree.block_bytes else place + at
    return holder
