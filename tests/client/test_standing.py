"""How nodes and layouts stand, from what nodes report."""

from __future__ import annotations

from typing import Any

import pytest

from holdfast.cluster import LayoutInfo, LayoutState, NodeHealing, NodeInfo
from holdfast.standing import LayoutProgress, describe_node, progress_of


def node(
    number: int, *, up: bool = True, layout_epoch: int = 2, healing: NodeHealing | None = None, **fields: Any
) -> NodeInfo:
    """Return a node."""
    plain: dict[str, Any] = dict.fromkeys(("capacity_bytes", "used_bytes", "free_bytes", "block_count"), 0)
    plain |= {"address": "", "zone": "z", "full": False, "quarantined_count": 0, "last_seen_unix_ms": 0}
    return NodeInfo(
        node_id=f"node-{number}",
        up=up,
        layout_epoch=layout_epoch,
        healing=healing or NodeHealing(),
        **plain | fields,
    )


def layout(epoch: int, **slots: int) -> LayoutInfo:
    """Return a layout in which these nodes have so many places."""
    by_name = {name.replace("_", "-"): count for name, count in slots.items()}
    return LayoutInfo(epoch, partitions=16, replicas=3, zones=dict.fromkeys(by_name, "z"), slots=by_name)


OLD, NEW = layout(1, node_1=16, node_2=16, node_3=16), layout(2, node_1=16, node_2=16, node_4=16)


def test_progress_counts_what_nodes_that_fence_the_newest_layout_hold() -> None:
    nodes = [
        node(1, healing=NodeHealing(synced_epoch=2, partitions=16, partitions_synced=16)),
        node(2, healing=NodeHealing(synced_epoch=1, partitions=16, partitions_synced=9, partitions_at_risk=2)),
        node(4, layout_epoch=1, healing=NodeHealing(partitions=16, partitions_synced=16)),
        node(3, healing=NodeHealing(partitions_at_risk=5)),
    ]
    found = progress_of(LayoutState((NEW, OLD), 3, 4), nodes)
    assert found == LayoutProgress(epoch=2, living=2, slots=48, synced=25, at_risk=2)


def test_with_one_layout_everything_is_in_place_whatever_nodes_have_said_yet() -> None:
    assert progress_of(LayoutState((NEW,), 3, 4), []) == LayoutProgress(2, living=1, slots=48, synced=48, at_risk=0)
    assert progress_of(LayoutState((), 3, 0), []) == LayoutProgress(0, living=0, slots=0, synced=0, at_risk=0)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (node(1), "up"),
        (node(1, full=True), "up, full"),
        (node(1, up=False), "down"),
        (node(1, up=False, out=True), "out"),
        (node(1, up=False, out=True, draining=True), "out, draining"),
        (node(1, out=True), "up, coming back"),
        (
            node(1, healing=NodeHealing(partitions=16, partitions_synced=4, partitions_at_risk=3)),
            "up, syncing 4/16, at risk 3",
        ),
        (
            node(1, draining=True, healing=NodeHealing(foreign_blocks=7, unrepaired_blocks=1)),
            "up, draining, handing over 7, unrepaired 1",
        ),
    ],
)
def test_a_node_in_few_words(found: NodeInfo, words: str) -> None:
    assert describe_node(found) == words
