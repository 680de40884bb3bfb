"""A reader of blocks that follows the living layouts, and asks the store for them before anything counts as lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from holdfast_coordinator.view import ClusterView
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.blocks.reader import BlockReader


def living_reader(view: ClusterView, pool: NodePool, capability: Callable[[], str]) -> BlockReader:
    """Return a reader for work that outlasts layout changes; who compares the layouts in a transaction needs none."""

    async def changed_since(layouts: Sequence[Layout]) -> bool:
        changed = await view.changed_since(layouts)
        pool.update(view.state.nodes)
        return changed

    pool.update(view.state.nodes)
    return BlockReader(pool, lambda: view.state.layout_set.layouts, capability, refresh=changed_since)
