"""How long a layout takes to plan, how even it is, and what a change moves, for ever more nodes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

from holdfast_core.model.layout import Layout, LayoutNode, LayoutPlan, plan_layout

ZONES: Final = 10
REPLICAS: Final = 3


def measure_layouts(sizes: Sequence[tuple[int, int]], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Plan a first layout of each (nodes, partitions), then one node more, and one less. CPU seconds."""
    rows = []
    for count, partitions in sizes:
        first_s, first = _planned(None, count, partitions)
        added_s, added = _planned(first.layout, count + 1, partitions)
        removed_s, removed = _planned(first.layout, count - 1, partitions)
        slots = slots_by_node(first.layout)
        row = {
            "nodes": count,
            "partitions": partitions,
            "first_cpu_s": first_s,
            "add_one_cpu_s": added_s,
            "remove_one_cpu_s": removed_s,
            "fewest_slots": min(slots.values()),
            "most_slots": max(slots.values()),
            "slots": partitions * REPLICAS,
            "add_one_moves": added.slots_moved,
            "remove_one_moves": removed.slots_moved,
            "message_bytes": first.layout.to_message().ByteSize(),
        }
        rows.append(row)
        say(f"layouts: {row}")
    return rows


def slots_by_node(layout: Layout) -> dict[str, int]:
    """Return how many slots each node of a layout has."""
    counts = Counter(name for place in range(layout.partitions) for name in layout.owners_of(place))
    return {node.node_id: counts[node.node_id] for node in layout.nodes}


def _planned(previous: Layout | None, count: int, partitions: int) -> tuple[float, LayoutPlan]:
    nodes = [LayoutNode(f"node-{number:05}", f"zone-{number % ZONES}", 1 << 40) for number in range(count)]
    start_s = time.process_time()
    plan = plan_layout(previous, nodes, REPLICAS, seed=1, partitions=partitions)
    return time.process_time() - start_s, plan
