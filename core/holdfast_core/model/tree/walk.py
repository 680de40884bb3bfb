"""Walks from a volume's root down to its leaves, without fetching: the caller brings the nodes.

Use: while not walk.done, fetch and open what `wanted()` names, `feed` the plaintexts back, and take `leaves`. Leaves
come in ascending order and are themselves not fetched. Memory stays at some hundred references however large the
tree is, if `take_leaves` is called between the feeds.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import Final, NamedTuple, NoReturn

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import TREE_FAN_OUT
from holdfast_core.model.tree.nodes import Node, VolumeInner, VolumeLeaf, decode_node
from holdfast_core.model.tree.shape import leaf_count, leaf_span, volume_height

WANTED_MAX: Final = 64


def first_ids(ids: Iterable[bytes], limit: int) -> list[bytes]:
    """Return the first `limit` distinct ids."""
    found: dict[bytes, None] = {}
    for node_id in ids:
        if len(found) == limit:
            break
        found[node_id] = None
    return list(found)


def misplaced(node_id: bytes, reason: str) -> NoReturn:
    """Refuse a node that is well-formed but does not belong where it is named."""
    raise HoldfastError(ErrorCode.CORRUPT, f"index node {node_id.hex()} {reason}", block_ids=[node_id])


def decode_at(node_id: bytes, plain: bytes) -> Node:
    """Decode a node, naming it in the error.

    Raises:
        HoldfastError: CORRUPT if it is malformed.
    """
    try:
        return decode_node(plain)
    except HoldfastError as error:
        raise HoldfastError(error.code, f"index node {node_id.hex()}: {error.message}", block_ids=[node_id]) from None


class VolumeRef(NamedTuple):
    """A node at its place in a volume's tree."""

    level: int
    place: int
    node_id: bytes


def volume_children(ref: VolumeRef, plain: bytes, leaves: int) -> list[VolumeRef]:
    """Return the children that the inner node at `ref` names, of a tree that has `leaves` leaves.

    Raises:
        HoldfastError: CORRUPT if it is no inner node of that level, or names a child beyond the volume's end.
    """
    node = decode_at(ref.node_id, plain)
    if not isinstance(node, VolumeInner) or node.level != ref.level:
        misplaced(ref.node_id, f"is no inner node of level {ref.level} of a volume")
    first = ref.place * TREE_FAN_OUT
    if (first + node.slots[-1]) * leaf_span(ref.level - 1) >= leaves:
        misplaced(ref.node_id, "names blocks beyond the end of the volume")
    return [
        VolumeRef(ref.level - 1, first + slot, child) for slot, child in zip(node.slots, node.child_ids, strict=True)
    ]


def decode_volume_leaf(leaf_id: bytes, plain: bytes, *, leaf_index: int, block_count_total: int) -> VolumeLeaf:
    """Return the leaf, having checked that it fits its place.

    Raises:
        HoldfastError: CORRUPT, naming the leaf, if it is malformed, no leaf, or names blocks beyond the end.
    """
    node = decode_at(leaf_id, plain)
    if not isinstance(node, VolumeLeaf):
        misplaced(leaf_id, "is no leaf of a volume")
    if leaf_index * TREE_FAN_OUT + node.slots[-1] >= block_count_total:
        misplaced(leaf_id, "names blocks beyond the end of the volume")
    return node


class VolumeWalk:
    """Finds the leaves of a volume, or of a range of its leaves.

    Attributes:
        leaves: (leaf index, leaf id) of what was found and not yet taken, ascending; all-zero leaves are not there.
    """

    def __init__(
        self, root: bytes, block_count_total: int, *, first_leaf: int = 0, end_leaf: int | None = None
    ) -> None:
        """Take the root (b"" for a volume of zeros), the number of positions, and which leaves to find."""
        self._leaf_count = leaf_count(block_count_total)
        self._first = first_leaf
        self._end = self._leaf_count if end_leaf is None else min(end_leaf, self._leaf_count)
        self._pending: list[VolumeRef] = []
        self.leaves: list[tuple[int, bytes]] = []
        if root and self._first < self._end:
            self._pending = [ref for ref in [VolumeRef(volume_height(block_count_total), 0, root)] if self._covers(ref)]
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
        pending: list[VolumeRef] = []
        for ref in self._pending:
            plain = nodes.get(ref.node_id) if ref.level else None
            if plain is None:
                pending.append(ref)
            else:
                pending.extend(filter(self._covers, volume_children(ref, plain, self._leaf_count)))
        self._pending = pending
        self._settle()

    def skip(self, node_ids: Container[bytes]) -> dict[bytes, list[tuple[int, int]]]:
        """Give up wanted nodes that cannot be had; returns the leaves that nobody finds then, as (first, end) by id."""
        skipped: dict[bytes, list[tuple[int, int]]] = {}
        pending: list[VolumeRef] = []
        for ref in self._pending:
            if ref.level and ref.node_id in node_ids:
                span = leaf_span(ref.level)
                first, end = max(ref.place * span, self._first), min((ref.place + 1) * span, self._end)
                skipped.setdefault(ref.node_id, []).append((first, end))
            else:
                pending.append(ref)
        self._pending = pending
        self._settle()
        return skipped

    def take_leaves(self) -> list[tuple[int, bytes]]:
        """Return `leaves` and forget them."""
        taken, self.leaves = self.leaves, []
        return taken

    def _covers(self, ref: VolumeRef) -> bool:
        span = leaf_span(ref.level)
        return ref.place * span < self._end and (ref.place + 1) * span > self._first

    def _settle(self) -> None:
        # A leaf that stands behind an unopened inner node waits, so that leaves come in order.
        ready = 0
        while ready < len(self._pending) and self._pending[ready].level == 0:
            ready += 1
        self.leaves.extend((ref.place, ref.node_id) for ref in self._pending[:ready])
        del self._pending[:ready]
