"""A walk from roots of which nothing but the ids is known: what a session pins; used as the walks of `walk` are.

A node says itself what it is, and everything that it names is found. Whether it stands where a record wants it cannot
be told here, and need not: what is found too much is kept for a while, and nothing is found too little.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import NamedTuple

from holdfast_core.model.tree.diff import NewReferences
from holdfast_core.model.tree.nodes import ObjectInner, VolumeInner, VolumeLeaf
from holdfast_core.model.tree.walk import WANTED_MAX, decode_at, first_ids, misplaced


class _Named(NamedTuple):
    """A node and the level that its parent demands, None for a root."""

    node_id: bytes
    level: int | None


class RootScan:
    """Finds everything below some roots, of volumes or objects.

    Attributes:
        new_index_ids: index nodes, not yet taken.
        new_block_ids: blocks and bases, not yet taken.
    """

    def __init__(self, roots: Iterable[bytes], *, known: Container[bytes] = ()) -> None:
        """Take the ids of the roots; subtrees below `known` are passed by."""
        self._known = known
        self._pending = [_Named(root, None) for root in dict.fromkeys(roots) if root not in known]
        self.new_index_ids: list[bytes] = []
        self.new_block_ids: list[bytes] = []

    @property
    def done(self) -> bool:
        """Whether everything has been found."""
        return not self._pending

    def wanted(self, limit: int = WANTED_MAX) -> list[bytes]:
        """Return ids of up to `limit` nodes to bring next; none exactly when done."""
        return first_ids((named.node_id for named in self._pending), limit)

    def feed(self, nodes: Mapping[bytes, bytes]) -> None:
        """Take plaintexts of wanted nodes by id, some or all; what is not wanted is ignored.

        Raises:
            HoldfastError: CORRUPT, naming the node, if one is malformed or of another level than its parent says.
        """
        pending: list[_Named] = []
        for named in self._pending:
            plain = nodes.get(named.node_id)
            if plain is None:
                pending.append(named)
                continue
            node = decode_at(named.node_id, plain)
            if named.level is not None and node.level != named.level:
                misplaced(named.node_id, f"is of level {node.level} and not of level {named.level}")
            self.new_index_ids.append(named.node_id)
            if isinstance(node, VolumeInner | ObjectInner):
                below = node.level - 1
                pending.extend(_Named(child, below) for child in node.child_ids if child not in self._known)
            else:
                self.new_block_ids.extend(node.block_ids)
                if isinstance(node, VolumeLeaf):
                    self.new_block_ids.extend(filter(None, node.base_ids))
        self._pending = pending

    def take(self) -> NewReferences:
        """Return what was found and forget it."""
        taken = NewReferences(self.new_index_ids, self.new_block_ids)
        self.new_index_ids, self.new_block_ids = [], []
        return taken
