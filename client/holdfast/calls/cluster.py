"""The cluster itself: its state, its nodes, its layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from holdfast.calls.core import AsyncCore, BlockingCore

if TYPE_CHECKING:
    from holdfast.cluster import (
        ClusterRemote,
        ClusterStatus,
        LayoutChange,
        LayoutInfo,
        LayoutPlan,
        LayoutState,
        NodeDecision,
        NodeInfo,
    )


class AsyncClusterCalls(AsyncCore):
    """Calls about the cluster."""

    @property
    def _cluster(self) -> ClusterRemote:
        from holdfast.cluster import ClusterRemote  # what only saves does not wait for this to load

        return ClusterRemote(self._remote.endpoints)

    async def cluster_status(self) -> ClusterStatus:
        """Return how the cluster is."""
        return await self._cluster.cluster_status()

    async def nodes(self) -> list[NodeInfo]:
        """Return the storage nodes by name."""
        return await self._cluster.nodes()

    async def set_node(
        self,
        node_id: str,
        *,
        draining: bool | None = None,
        weight_bytes: int | None = None,
        dry_run: bool = False,
    ) -> NodeDecision:
        """Change what is decided of a node, and the layout with it.

        Args:
            node_id: the node.
            draining: whether it is to own nothing from now on; None leaves that as it is.
            weight_bytes: its weight in new layouts, 0 for its capacity; None leaves it.
            dry_run: only say what would move.

        Raises:
            HoldfastError: NOT_FOUND; NOT_READY if too few nodes would be left; LIMIT_EXCEEDED while too many old
                layouts are alive.
        """
        return await self._cluster.set_node(node_id, draining=draining, weight_bytes=weight_bytes, dry_run=dry_run)

    async def remove_node(self, node_id: str, *, lost: bool = False) -> None:
        """End a node's membership.

        Args:
            node_id: the node.
            lost: remove it with all that it holds, since it never comes back.

        Raises:
            HoldfastError: NOT_FOUND; NOT_READY while it is in the newest layout, is needed, holds blocks that it has
                not handed over, or is up.
        """
        await self._cluster.remove_node(node_id, lost=lost)

    async def layout(self) -> LayoutState:
        """Return the living layouts."""
        return await self._cluster.layout()

    async def plan_layout(self, *, remove: Sequence[str] = ()) -> LayoutPlan:
        """Return what the next layout would change, `remove` left out of it; changes nothing."""
        return await self._cluster.plan_layout(remove)

    async def apply_layout(self, previous_epoch: int, *, remove: Sequence[str] = ()) -> LayoutInfo:
        """Make a planned layout the newest; CONFLICT if another one came in between."""
        return await self._cluster.apply_layout(previous_epoch, remove)

    async def layout_history(self) -> list[LayoutChange]:
        """Return how layouts followed one another, newest first, at most the last 100."""
        return await self._cluster.layout_history()


class ClusterCalls(BlockingCore):
    """The same, blocking."""

    def cluster_status(self) -> ClusterStatus:
        """Return how the cluster is."""
        return self._loop.run(self._core.cluster_status())

    def nodes(self) -> list[NodeInfo]:
        """Return the storage nodes by name."""
        return self._loop.run(self._core.nodes())

    def set_node(
        self,
        node_id: str,
        *,
        draining: bool | None = None,
        weight_bytes: int | None = None,
        dry_run: bool = False,
    ) -> NodeDecision:
        """Change what is decided of a node, and the layout with it."""
        return self._loop.run(
            self._core.set_node(node_id, draining=draining, weight_bytes=weight_bytes, dry_run=dry_run)
        )

    def remove_node(self, node_id: str, *, lost: bool = False) -> None:
        """End a node's membership."""
        self._loop.run(self._core.remove_node(node_id, lost=lost))

    def layout(self) -> LayoutState:
        """Return the living layouts."""
        return self._loop.run(self._core.layout())

    def plan_layout(self, *, remove: Sequence[str] = ()) -> LayoutPlan:
        """Return what the next layout would change."""
        return self._loop.run(self._core.plan_layout(remove=remove))

    def apply_layout(self, previous_epoch: int, *, remove: Sequence[str] = ()) -> LayoutInfo:
        """Make a planned layout the newest."""
        return self._loop.run(self._core.apply_layout(previous_epoch, remove=remove))

    def layout_history(self) -> list[LayoutChange]:
        """Return how layouts followed one another, newest first."""
        return self._loop.run(self._core.layout_history())
