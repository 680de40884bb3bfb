"""When a node may be taken out of the cluster's books. Pure.

A node that leaves in good order is drained, hands over all that it holds and says so, and is stopped. One that is lost
cannot: then what it held counts as gone, and an older layout that still names it settles without it.
"""

from __future__ import annotations

from holdfast_coordinator.view import ClusterState
from holdfast_core.model.layout import Layout


def why_not_removed(state: ClusterState, node_id: str, *, lost: bool) -> str:
    """Return why a registered node cannot be removed, as one sentence that says what to do; "" if it can.

    Args:
        state: the cluster as it is now.
        node_id: the node.
        lost: whether the operator says that it never comes back, with what it holds.
    """
    node = next(node for node in state.nodes if node.node_id == node_id)
    newest, *older = state.layout_set.layouts or (None,)
    if newest is not None and any(member.node_id == node_id for member in newest.nodes):
        return f"{node_id} is part of the newest layout, {newest.epoch}; drain it first with `holdfast node drain`"
    if not lost:
        sources = [layout.epoch for layout in older if layout is not None and _owns(layout, node_id)]
        if sources:
            return (
                f"{node_id} owns part of layout {sources[0]}, which is still a source of newer ones; wait until "
                "`holdfast layout show` names one layout, or say --lost if the node never comes back"
            )
        # It owns nothing, so whatever it holds is not its own any more; the figure it gives for that may be older than
        # the layout's settling, the number of its blocks is not.
        foreign = max(node.healing.foreign_blocks, node.block_count)
        if foreign:
            return (
                f"{node_id} holds {foreign} blocks that it has not handed over; leave it running until it holds none, "
                "or say --lost if it never comes back"
            )
    if node.up:
        return f"{node_id} is up and would register again; stop it first"
    return ""


def _owns(layout: Layout, node_id: str) -> bool:
    return any(node_id in layout.owners_of(partition) for partition in range(layout.partitions))
