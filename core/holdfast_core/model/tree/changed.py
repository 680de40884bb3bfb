"""A walk beside a change hint: down only to leaves that the hint touches, past everything else by its id.

Used as `VolumeWalk` is. What is not touched is kept as a whole subtree, however large, and is never fetched; so the
cost follows what changed and not the volume's size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from holdfast_core.model.tree.shape import leaf_count, leaf_span, volume_height
from holdfast_core.model.tree.walk import WANTED_MAX, VolumeRef, first_ids, volume_children


class Place(NamedTuple):
    """A node of the older tree: a touched leaf, or the root of a subtree that is kept."""

    ref: VolumeRef
    touched: bool

    @property
    def first_leaf(self) -> int:
        """Index of the first leaf that the place covers."""
        return self.ref.place * leaf_span(self.ref.level)

    @property
    def end_leaf(self) -> int:
        """Index behind the last leaf that the place covers, whether or not the volume reaches so far."""
        return (self.ref.place + 1) * leaf_span(self.ref.level)


class ChangedWalk:
    """Finds the leaves of an older tree that a hint touches, and the subtrees between them.

    Places come in ascending order; where the older tree is all zero there is none. Leaves that lie beyond the newer
    volume's end come too, as long as the hint touches them.
    """

    def __init__(self, root: bytes, old_blocks: int, new_blocks: int, touched: Callable[[int, int], bool]) -> None:
        """Take the older root, both numbers of positions, and what tells whether a range of leaves is touched.

        Where the sizes differ, everything from the smaller end on has to be touched: a node that is kept must mean the
        same in the newer tree.
        """
        self._old_leaves = leaf_count(old_blocks)
        self._height = volume_height(new_blocks)
        self._touched = touched
        self._pending: list[Place] = []
        self._ready: list[Place] = []
        if root:
            self._pending = [self._place(VolumeRef(volume_height(old_blocks), 0, root))]
            self._settle()

    @property
    def done(self) -> bool:
        """Whether every place has been found."""
        return not self._pending

    def wanted(self, limit: int = WANTED_MAX) -> list[bytes]:
        """Return ids of up to `limit` inner nodes to bring next; none exactly when done."""
        return first_ids((place.ref.node_id for place in self._pending if self._opens(place)), limit)

    def feed(self, nodes: Mapping[bytes, bytes]) -> None:
        """Take plaintexts of wanted nodes by id, some or all; what is not wanted is ignored.

        Raises:
            HoldfastError: CORRUPT, naming the node, if one is malformed or misplaced.
        """
        pending: list[Place] = []
        for place in self._pending:
            plain = nodes.get(place.ref.node_id) if self._opens(place) else None
            if plain is None:
                pending.append(place)
            else:
                pending.extend(map(self._place, volume_children(place.ref, plain, self._old_leaves)))
        self._pending = pending
        self._settle()

    def take(self) -> list[Place]:
        """Return the places found so far and forget them."""
        taken, self._ready = self._ready, []
        return taken

    def _place(self, ref: VolumeRef) -> Place:
        span = leaf_span(ref.level)
        # A node above the newer tree's root has no place in it, whatever the hint says.
        above = ref.level > self._height
        return Place(ref, above or self._touched(ref.place * span, (ref.place + 1) * span))

    @staticmethod
    def _opens(place: Place) -> bool:
        return place.touched and place.ref.level > 0

    def _settle(self) -> None:
        # What stands behind an unopened inner node waits, so that places come in order.
        ready = 0
        while ready < len(self._pending) and not self._opens(self._pending[ready]):
            ready += 1
        self._ready.extend(self._pending[:ready])
        del self._pending[:ready]
