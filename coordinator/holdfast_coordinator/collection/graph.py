"""The index of a tenant as a graph: every node once, however many trees share it. For questions about trees.

In memory, so bounded by `NODES_MAX` index nodes: about 1 TB of distinct content in blocks of 64 KiB.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Generic, TypeAlias, TypeVar

from holdfast_core.model.block import Opener, SealedBlock
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.tree import ObjectInner, ObjectLeaf, VolumeInner, VolumeLeaf, decode_node

Fetch = Callable[[Sequence[bytes]], Awaitable[Mapping[bytes, SealedBlock]]]
Leaf: TypeAlias = VolumeLeaf | ObjectLeaf
Inner: TypeAlias = VolumeInner | ObjectInner
T = TypeVar("T")

NODES_MAX: Final = 131_072
_NODES_PER_READ: Final = 256


@dataclass(slots=True)
class Graph(Generic[T]):
    """Index nodes by id: inner ones as they are, and of each leaf what the question keeps of it."""

    inner: dict[bytes, Inner] = field(default_factory=dict)
    leaves: dict[bytes, T] = field(default_factory=dict)

    def __contains__(self, node_id: object) -> bool:
        """Return whether a node was read."""
        return node_id in self.inner or node_id in self.leaves


async def read_graph(
    roots: Iterable[bytes],
    fetch: Fetch,
    opener: Opener,
    keep: Callable[[Leaf], T],
    *,
    given: Mapping[bytes, T] = MappingProxyType({}),
    nodes_max: int = NODES_MAX,
) -> Graph[T]:
    """Read all index nodes below some roots; those that are `given` are not read, and count as leaves.

    Raises:
        HoldfastError: LIMIT_EXCEEDED for more than `nodes_max` of them; MISSING, CORRUPT or UNREACHABLE if one cannot
            be read.
    """
    graph: Graph[T] = Graph(leaves=dict(given))
    pending = list(dict.fromkeys(root for root in roots if root and root not in given))
    met = {*pending, *given}
    while pending:
        if len(met) > nodes_max:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED, f"the question takes more than {nodes_max} index nodes to answer"
            )
        wanted = pending[-_NODES_PER_READ:]
        del pending[-_NODES_PER_READ:]
        blocks = await fetch(wanted)
        for child in await asyncio.to_thread(_take, graph, blocks, opener, keep):
            if child not in met:
                met.add(child)
                pending.append(child)
    return graph


def _take(
    graph: Graph[T], blocks: Mapping[bytes, SealedBlock], opener: Opener, keep: Callable[[Leaf], T]
) -> list[bytes]:
    """Add nodes to the graph; return the ids of their children."""
    children: list[bytes] = []
    for node_id, block in blocks.items():
        node = decode_node(bytes(opener.open(block)))
        if isinstance(node, VolumeInner | ObjectInner):
            graph.inner[node_id] = node
            children.extend(node.child_ids)
        else:
            graph.leaves[node_id] = keep(node)
    return children
