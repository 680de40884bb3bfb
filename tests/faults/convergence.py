"""When a cluster has healed: one living layout, everything synced, and every block on all owners."""

from __future__ import annotations

import time

from holdfast import HoldfastError, StateManager
from holdfast.cluster import NodeInfo


def unsettled(manager: StateManager, *, nodes: int) -> str:
    """Return what is not as it should be yet, by what nodes report; empty if nothing. `nodes` are to be up."""
    layouts = manager.layout().layouts
    if len(layouts) != 1:
        return f"{len(layouts)} layouts live"
    status = manager.cluster_status()
    if status.state != "ready" or not status.writable:
        return status.state
    up = [node for node in status.nodes if node.up]
    if len(up) != nodes:
        return f"{len(up)} of {nodes} nodes are up"
    troubles = [f"{node.node_id}: {trouble}" for node in up for trouble in _troubles(node, layouts[0].epoch)]
    return "; ".join(troubles)


def _troubles(node: NodeInfo, epoch: int) -> list[str]:
    healing = node.healing
    counts = {
        "partitions at risk": healing.partitions_at_risk,
        "foreign blocks": healing.foreign_blocks,
        "unrepaired blocks": healing.unrepaired_blocks,
        "blocks set aside": node.quarantined_count,
    }
    troubles = [f"{count} {what}" for what, count in counts.items() if count]
    if healing.partitions and healing.synced_epoch != epoch:
        troubles.append(f"synced under {healing.synced_epoch} and not {epoch}")
    if node.layout_epoch != epoch:
        troubles.append(f"fences {node.layout_epoch} and not {epoch}")
    if node.full:
        troubles.append("full")
    return troubles


def thin(manager: StateManager) -> str:
    """Return what nodes that read and hash everything miss of it; empty if every block is whole on all its owners."""
    report = manager.verify_all(node_only=True)
    if report.damaged_points or report.damaged_objects:
        return f"damage: {report.damaged}"
    return f"{report.thin_blocks} blocks are not on every owner" if report.thin_blocks else ""


def converge(manager: StateManager, *, nodes: int, within_s: float = 120.0) -> None:
    """Wait until the cluster has healed; fail with what it lacks after `within_s`."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            lacking = unsettled(manager, nodes=nodes) or thin(manager)
        except HoldfastError as error:
            lacking = f"{error!r}"
        if not lacking:
            return
        assert time.monotonic() < deadline, f"not healed within {within_s:g} s: {lacking}"
        time.sleep(0.2)
