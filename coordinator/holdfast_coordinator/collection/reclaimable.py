"""What forgetting points would free: what they reach and nothing else does. Pure; the graph was read before.

Where a tenant has too many blocks to remember, a fair sample of them is counted, as for other sums (`reach`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from holdfast_coordinator.collection.graph import Graph, Leaf
from holdfast_coordinator.reach import SAMPLED_IDS_MAX, in_sample
from holdfast_core.model.tree import VolumeLeaf

_SEVERAL: Final = -1


class LeafSample:
    """Keeps of every leaf the ids that it names, or a fair sample of them. Belongs to one reading of a graph.

    Attributes:
        bits: how many leading zero bits an id needs to be kept; each id stands for 2**bits.
    """

    def __init__(self, most: int = SAMPLED_IDS_MAX) -> None:
        """Keep at most about `most` ids."""
        self.bits = 0
        self._most = most
        self._kept: list[list[bytes]] = []
        self._count = 0

    def keep(self, leaf: Leaf) -> list[bytes]:
        """Return the ids of a leaf that are kept; the list gets shorter when the sample has to."""
        named = {*leaf.block_ids, *filter(None, leaf.base_ids)} if isinstance(leaf, VolumeLeaf) else set(leaf.block_ids)
        ids = [block_id for block_id in named if in_sample(block_id, self.bits)]
        self._kept.append(ids)
        self._count += len(ids)
        while self._count > self._most:
            self.bits += 1
            for kept in self._kept:
                kept[:] = [block_id for block_id in kept if in_sample(block_id, self.bits)]
            self._count = sum(map(len, self._kept))
        return ids


@dataclass(frozen=True, slots=True)
class Exclusive:
    """Sampled ids that only the points reach: all of them, and those that one point alone does, point by point."""

    together: frozenset[bytes]
    alone: tuple[frozenset[bytes], ...]


def exclusive_to(
    points: Sequence[Sequence[bytes]], others: Iterable[bytes], graph: Graph[list[bytes]], bits: int
) -> Exclusive:
    """Find what only some points reach, given each one's roots, and the roots of everything else.

    Every node is met twice at most: for the first point that reaches it, and for the second.
    """
    outside, outside_ids = _reached(others, graph)
    nodes: dict[bytes, int] = {}
    ids: dict[bytes, int] = {}
    for number, roots in enumerate(points):
        pending = [(root, number) for root in roots]
        while pending:
            node_id, holder = pending.pop()
            before = nodes.get(node_id)
            if node_id in outside or before in (holder, _SEVERAL):
                continue
            holder = holder if before is None else _SEVERAL
            nodes[node_id] = holder
            inner = graph.inner.get(node_id)
            if inner is not None:
                pending.extend((child, holder) for child in inner.child_ids)
            for block_id in graph.leaves.get(node_id, ()):
                if block_id not in outside_ids:
                    ids[block_id] = holder if ids.get(block_id, holder) == holder else _SEVERAL
    ids.update((node_id, holder) for node_id, holder in nodes.items() if in_sample(node_id, bits))
    return Exclusive(
        frozenset(ids),
        tuple(frozenset(_held_by(number, ids)) for number in range(len(points))),
    )


def _held_by(number: int, ids: Mapping[bytes, int]) -> Iterable[bytes]:
    return (block_id for block_id, holder in ids.items() if holder == number)


def _reached(roots: Iterable[bytes], graph: Graph[list[bytes]]) -> tuple[set[bytes], set[bytes]]:
    """Return all nodes and ids below some roots."""
    nodes: set[bytes] = set()
    ids: set[bytes] = set()
    pending = list(roots)
    while pending:
        node_id = pending.pop()
        if node_id in nodes:
            continue
        nodes.add(node_id)
        inner = graph.inner.get(node_id)
        if inner is not None:
            pending.extend(inner.child_ids)
        ids.update(graph.leaves.get(node_id, ()))
    return nodes, ids
