"""Says in plain lines what a plan does and why it looks as it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Final

from holdfast_core.model.layout.shares import TOLERANCE, Problem
from holdfast_core.model.layout.table import Layout

_NOTABLE: Final = Fraction(1, 50)


def explain(
    previous: Layout | None, layout: Layout, problem: Problem, shares: Sequence[Fraction], *, slots_moved: int
) -> tuple[str, ...]:
    """Return the explanation: movement, zones, warnings, then a line a node."""
    lines = [_movement(previous, layout, slots_moved), _zone_rule(problem)]
    lines.extend(_limited_nodes(problem, shares))
    coarse = _coarse(problem, shares)
    if coarse:
        lines.append(coarse)
    lines.extend(_node_lines(previous, layout))
    return tuple(lines)


def _movement(previous: Layout | None, layout: Layout, slots_moved: int) -> str:
    total = layout.partitions * layout.replicas
    if previous is None:
        return f"first layout: {layout.partitions} partitions, {layout.replicas} owners each, {total} slots"
    if not slots_moved:
        return "no slot moves"
    return f"{slots_moved} of {total} slots move ({slots_moved / total:.1%})"


def _zone_rule(problem: Problem) -> str:
    zones, replicas = len(problem.zones), problem.replicas
    if problem.zones_distinct:
        return f"{len(problem.nodes)} nodes in {zones} zones: a partition's {replicas} owners are in distinct zones"
    if zones == 1:
        return f"all {len(problem.nodes)} nodes are in one zone, {problem.zones[0]}: its loss takes every copy"
    worst = min(replicas - zones + 1, max(len(problem.members[zone]) for zone in range(zones)))
    return (
        f"{len(problem.nodes)} nodes in {zones} zones for {replicas} owners: every partition is in every zone, and the "
        f"loss of one zone can take up to {worst} of {replicas} copies"
    )


def _limited_nodes(problem: Problem, shares: Sequence[Fraction]) -> list[str]:
    capacity = sum(node.capacity_bytes for node in problem.nodes)
    lines = []
    for zone, name in enumerate(problem.zones):
        members = problem.members[zone]
        by_capacity = Fraction(sum(problem.nodes[node].capacity_bytes for node in members), capacity)
        share = sum((shares[node] for node in members), Fraction(0)) / problem.slots_total
        if abs(share - by_capacity) > _NOTABLE:
            lines.append(
                f"zone {name} has {float(by_capacity):.1%} of the capacity, but the best it can own is "
                f"{float(share):.1%} of the slots, because a partition needs owners in {problem.zones_needed} zones"
                f" and distinct nodes"
            )
    return lines


def _coarse(problem: Problem, shares: Sequence[Fraction]) -> str:
    """One partition is the least that can move, so small shares cannot be balanced to 1 %."""
    smallest = min(shares)
    if smallest * TOLERANCE >= 1:
        return ""
    coarse = sum(1 for share in shares if share * TOLERANCE < 1)
    return (
        f"{problem.partitions} partitions are coarse for {coarse} of {len(shares)} nodes: the smallest best share is "
        f"{float(smallest):.1f} slots, so one partition is {float(min(Fraction(1), 1 / smallest)):.1%} of it"
        if smallest >= 1
        else f"{problem.partitions} partitions are too coarse for {coarse} of {len(shares)} nodes: the smallest best "
        f"share is less than one slot"
    )


def _node_lines(previous: Layout | None, layout: Layout) -> list[str]:
    total = layout.partitions * layout.replicas
    now = _slots_by_node(layout)
    before = _slots_by_node(previous) if previous is not None else Counter()
    lines = []
    for node in layout.nodes:
        line = f"node {node.node_id} (zone {node.zone}): {now[node.node_id]} slots, {now[node.node_id] / total:.2%}"
        if previous is not None:
            line += f", {now[node.node_id] - before[node.node_id]:+d}"
        lines.append(line if node.capacity_bytes else f"{line}; it has no capacity")
    names = {node.node_id for node in layout.nodes}
    lines.extend(
        f"node {name} leaves and gives up {slots} slots" for name, slots in before.items() if name not in names
    )
    return lines


def _slots_by_node(layout: Layout) -> Counter[str]:
    return Counter(name for partition in range(layout.partitions) for name in layout.owners_of(partition))
