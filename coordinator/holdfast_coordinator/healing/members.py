"""Which nodes the next layout has, and with which weight. Pure.

An operator's plan takes every registered node that is not left out. All other changes begin from the newest layout and
touch what they are about: a node that has registered since, or whose disk has grown, waits for the operator.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from holdfast_core.model.layout import Layout, LayoutNode
from holdfast_proto.v1.common_pb2 import NodeState
from holdfast_proto.v1.records_pb2 import NodeRecord


def is_left_out(state: NodeState) -> bool:
    """Return whether a node in this state owns nothing in new layouts."""
    return state.draining or state.out


def layout_node(record: NodeRecord, state: NodeState) -> LayoutNode:
    """Return a node as a new layout knows it."""
    return LayoutNode(record.node_id, record.zone, state.weight_bytes or record.capacity_bytes)


def all_members(
    records: Mapping[str, NodeRecord], states: Mapping[str, NodeState], leave_out: Collection[str] = ()
) -> tuple[LayoutNode, ...]:
    """Return the nodes of an operator's plan, by name: all that are registered and not left out."""
    return tuple(
        layout_node(record, states[node_id])
        for node_id, record in sorted(records.items())
        if node_id not in leave_out and not is_left_out(states[node_id])
    )


def next_members(
    newest: Layout,
    records: Mapping[str, NodeRecord],
    states: Mapping[str, NodeState],
    anew: Collection[str] = (),
) -> tuple[LayoutNode, ...]:
    """Return the nodes of the layout that follows the newest one, by name, given what is decided of them.

    Args:
        newest: the newest layout, whose nodes stay as they are but for what `states` says.
        records: the registered nodes.
        states: what is decided of each; it takes nodes out, and a weight replaces a capacity.
        anew: nodes that are taken as they are registered now, whether the newest layout has them or not.
    """
    members = {node.node_id: node for node in newest.nodes}
    for node_id in anew:
        members[node_id] = layout_node(records[node_id], states[node_id])
    return tuple(
        _weighed(node, states.get(node_id, NodeState()))
        for node_id, node in sorted(members.items())
        if not is_left_out(states.get(node_id, NodeState()))
    )


def _weighed(node: LayoutNode, state: NodeState) -> LayoutNode:
    return LayoutNode(node.node_id, node.zone, state.weight_bytes or node.capacity_bytes)


def names(node_ids: Collection[str]) -> str:
    """Return names in one phrase, with the verb that fits: `node-1 is`, `node-1, node-2 are`."""
    return f"{', '.join(sorted(node_ids))} {'is' if len(node_ids) == 1 else 'are'}"
