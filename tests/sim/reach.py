"""What trees reach, for a god who has every block that was ever sealed at hand."""

from __future__ import annotations

from holdfast_core.model.block import Kind
from holdfast_core.model.tree import ObjectInner, VolumeInner, VolumeLeaf, decode_node
from holdfast_storagenode.store import kind_of
from tests.sim.oracle import Oracle, Ref


class Reach:
    """Finds everything below a root: index nodes, blocks and bases."""

    def __init__(self, oracle: Oracle) -> None:
        """Look into the blocks that clients sealed."""
        self._oracle = oracle
        self._below: dict[Ref, frozenset[Ref]] = {}

    def below(self, tenant: int, root: bytes) -> frozenset[Ref]:
        """Return the root with everything that it reaches; nothing for a volume of zeros."""
        if not root:
            return frozenset()
        ref = (tenant, root)
        found = self._below.get(ref)
        if found is None:
            found = self._below[ref] = frozenset({ref}).union(
                *(self.below(tenant, child) for child in self._children(ref))
            )
        return found

    def _children(self, ref: Ref) -> tuple[bytes, ...]:
        block = self._oracle.bodies[ref]
        if kind_of(block.data) != Kind.INDEX:
            return ()
        node = decode_node(self._oracle.rings[ref[0]].opener().open(block))
        if isinstance(node, VolumeInner | ObjectInner):
            return node.child_ids
        if isinstance(node, VolumeLeaf):
            return (*node.block_ids, *filter(None, node.base_ids))
        return node.block_ids
