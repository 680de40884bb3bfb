"""How nodes and the newest layout stand, worked out from what the nodes report. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from holdfast.cluster import LayoutState, NodeInfo


@dataclass(frozen=True, slots=True)
class LayoutProgress:
    """How far the newest layout has come.

    Attributes:
        epoch: the newest layout; 0 before the first.
        living: how many layouts are alive; with one, all has settled.
        slots: owner slots of the newest layout.
        synced: those that hold all that they have to.
        at_risk: those that do not, because too few former owners can be reached.
    """

    epoch: int
    living: int
    slots: int
    synced: int
    at_risk: int


def progress_of(state: LayoutState, nodes: Sequence[NodeInfo]) -> LayoutProgress:
    """Return how far the newest layout has come, by what its nodes said last."""
    if not state.layouts:
        return LayoutProgress(epoch=0, living=0, slots=0, synced=0, at_risk=0)
    newest = state.layouts[0]
    by_name = {node.node_id: node for node in nodes}
    synced = at_risk = 0
    for node_id, slots in newest.slots.items():
        node = by_name.get(node_id)
        if node is None:
            continue
        at_risk += node.healing.partitions_at_risk
        if node.healing.synced_epoch >= newest.epoch:
            synced += slots
        elif node.layout_epoch >= newest.epoch:
            # Before a node fences the newest layout, what it counts is of an older one.
            synced += min(slots, node.healing.partitions_synced)
    slots = sum(newest.slots.values())
    return LayoutProgress(
        epoch=newest.epoch,
        living=len(state.layouts),
        slots=slots,
        synced=slots if len(state.layouts) == 1 else synced,
        at_risk=at_risk,
    )


def describe_node(node: NodeInfo) -> str:
    """Say in few words how a node is, e.g. "up, draining, at risk 3"."""
    words = ["up" if node.up else "out" if node.out else "down"]
    if node.up and node.out:
        words.append("coming back")
    if node.up and node.full:
        words.append("full")
    if node.draining:
        words.append("draining")
    healing = node.healing
    if healing.partitions_synced < healing.partitions:
        words.append(f"syncing {healing.partitions_synced}/{healing.partitions}")
    if healing.partitions_at_risk:
        words.append(f"at risk {healing.partitions_at_risk}")
    if healing.foreign_blocks:
        words.append(f"handing over {healing.foreign_blocks}")
    if healing.unrepaired_blocks:
        words.append(f"unrepaired {healing.unrepaired_blocks}")
    return ", ".join(words)
