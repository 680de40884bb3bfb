"""The living layouts of one moment, and what follows from them for one node. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from holdfast_core.model.layout import Layout


@dataclass(frozen=True, slots=True)
class Living:
    """Living layouts, newest first, of which there is at least one, and the epoch that the grant is for (0: none).

    Seed and number of partitions are the same in all of them.
    """

    layouts: tuple[Layout, ...]
    granted_epoch: int = 0

    @property
    def newest(self) -> Layout:
        """The layout that writes go to."""
        return self.layouts[0]

    @property
    def older(self) -> tuple[Layout, ...]:
        """The others, newest first."""
        return self.layouts[1:]

    @property
    def may_drop(self) -> bool:
        """Whether there is a grant under which nodes may let go of what they own in no living layout (invariant 9)."""
        return self.granted_epoch == self.newest.epoch and not self.older

    def owners_of(self, partition: int) -> tuple[str, ...]:
        """Return who owns a partition in any living layout, each once, owners in the newest first."""
        return tuple(dict.fromkeys(owner for layout in self.layouts for owner in layout.owners_of(partition)))

    def owns(self, node_id: str, partition: int) -> bool:
        """Return whether a node owns a partition in any living layout."""
        return any(node_id in layout.owners_of(partition) for layout in self.layouts)

    def owned_by(self, node_id: str) -> tuple[int, ...]:
        """Return the partitions that a node owns in the newest layout, ascending."""
        newest = self.newest
        return tuple(place for place in range(newest.partitions) if node_id in newest.owners_of(place))

    def foreign_to(self, node_id: str) -> tuple[int, ...]:
        """Return the partitions that a node owns in no living layout, ascending."""
        return tuple(place for place in range(self.newest.partitions) if not self.owns(node_id, place))


def fenced_needed(layout: Layout) -> int:
    """Return how many owners of a layout must have fenced a newer one, so that no write under it can succeed any more.

    Every write that did succeed is then on at least one of them.
    """
    return layout.replicas - layout.write_quorum + 1


def enough(living: Living, partition: int, nodes: Collection[str], registered: Collection[str] | None = None) -> bool:
    """Return whether `nodes` are enough owners of a partition in each older living layout for a sync of it.

    `registered` are the nodes that the cluster still has, None where that is not known. An operator removes a node
    whose blocks never come back; where too many are gone, all owners that are left have to be looked at, and that is
    enough (ADR 0127).
    """
    return all(_enough(layout, partition, nodes, registered) for layout in living.older)


def _enough(layout: Layout, partition: int, nodes: Collection[str], registered: Collection[str] | None) -> bool:
    owners, needed = layout.owners_of(partition), fenced_needed(layout)
    if sum(owner in nodes for owner in owners) >= needed:
        return True
    if registered is None:
        return False
    left = [owner for owner in owners if owner in registered]
    return len(left) < needed and all(owner in nodes for owner in left)
