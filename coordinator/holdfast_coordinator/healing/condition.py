"""How the cluster stands, in one sentence. Pure."""

from __future__ import annotations

from holdfast_coordinator.bootstrap import Cluster
from holdfast_coordinator.layouts import partitions_without_quorum, waiting_for_nodes
from holdfast_coordinator.view import ClusterState

READY = "ready"


def condition_of(state: ClusterState, cluster: Cluster) -> str:
    """Return "ready", or what is waited for: the first layout, nodes for writes, former owners, or copies under way."""
    newest = state.layout_set.newest
    if newest is None:
        return waiting_for_nodes(state, cluster)
    down = sorted({node.node_id for node in newest.nodes} - state.up)
    without = partitions_without_quorum(newest, state.up)
    if without:
        return (
            f"{without} of {newest.partitions} partitions have fewer than {newest.write_quorum} owners up; writes "
            f"there wait for {', '.join(down)}"
        )
    at_risk = at_risk_of(state)
    if at_risk:
        gone = sorted(node.node_id for node in state.nodes if not node.up)
        return f"at risk: {at_risk} copies of partitions wait for former owners that cannot be reached" + (
            f"; bring back {', '.join(gone)}" if gone else ""
        )
    unrepaired = sum(node.healing.unrepaired_blocks for node in state.nodes)
    if unrepaired:
        return f"at risk: {unrepaired} copies of blocks are missing or corrupt, and no node that answers has them"
    if len(state.layout_set.layouts) > 1:
        synced, total = synced_of(state)
        return f"healing: {synced} of {total} copies of partitions are where layout {newest.epoch} wants them"
    return READY


def at_risk_of(state: ClusterState) -> int:
    """Return how many copies of partitions the newest layout's nodes report at risk."""
    members = _members(state)
    return sum(node.healing.partitions_at_risk for node in state.nodes if node.node_id in members)


def synced_of(state: ClusterState) -> tuple[int, int]:
    """Return how many copies of partitions are synced under the newest layout, and how many it has in all."""
    newest = state.layout_set.newest
    if newest is None:
        return 0, 0
    owned = dict.fromkeys(_members(state), 0)
    for partition in range(newest.partitions):
        for owner in newest.owners_of(partition):
            owned[owner] += 1
    synced = 0
    for node in state.nodes:
        if node.node_id in owned:
            # What a node says is of the newest layout only once it fences that.
            said = node.healing.partitions_synced if node.layout_epoch >= newest.epoch else 0
            whole = node.healing.synced_epoch >= newest.epoch
            synced += owned[node.node_id] if whole else min(said, owned[node.node_id])
    return synced, sum(owned.values())


def _members(state: ClusterState) -> frozenset[str]:
    newest = state.layout_set.newest
    return frozenset(node.node_id for node in newest.nodes) if newest else frozenset()
