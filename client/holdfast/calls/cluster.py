"""The cluster itself: its state, its nodes, its layout."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast.calls.core import AsyncCore
from holdfast.results import ClusterStatus, LayoutInfo, LayoutPlan, LayoutState, NodeInfo


class AsyncClusterCalls(AsyncCore):
    """Calls about the cluster."""

    async def cluster_status(self) -> ClusterStatus:
        """Return how the cluster is."""
        return await self._remote.cluster_status()

    async def nodes(self) -> list[NodeInfo]:
        """Return the storage nodes by name."""
        return await self._remote.nodes()

    async def layout(self) -> LayoutState:
        """Return the living layouts."""
        return await self._remote.layout()

    async def plan_layout(self, *, remove: Sequence[str] = ()) -> LayoutPlan:
        """Return what the next layout would change, `remove` left out of it; changes nothing."""
        return await self._remote.plan_layout(remove)

    async def apply_layout(self, previous_epoch: int, *, remove: Sequence[str] = ()) -> LayoutInfo:
        """Make a planned layout the newest; CONFLICT if another one came in between."""
        return await self._remote.apply_layout(previous_epoch, remove)
