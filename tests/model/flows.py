"""An oracle for layouts: least movement by minimum-cost flow, best shares by bisection. Slow, small, independent."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from holdfast_core.model.layout import Layout, LayoutNode

_MUST = 10_000


class _Flow:
    """Minimum-cost flow by successive shortest paths."""

    def __init__(self, vertices: int) -> None:
        self.arcs: list[list[int]] = []
        self.out: list[list[int]] = [[] for _ in range(vertices)]

    def add(self, start: int, end: int, capacity: int, cost: int) -> None:
        """Add an arc and its reverse."""
        for a, b, room, price in ((start, end, capacity, cost), (end, start, 0, -cost)):
            self.out[a].append(len(self.arcs))
            self.arcs.append([b, room, price])

    def solve(self, source: int, sink: int) -> tuple[int, int]:
        """Return the maximal flow and its least cost."""
        flow = total = 0
        while path := self._cheapest_path(source, sink):
            for arc in path:
                self.arcs[arc][1] -= 1
                self.arcs[arc ^ 1][1] += 1
                total += self.arcs[arc][2]
            flow += 1
        return flow, total

    def _cheapest_path(self, source: int, sink: int) -> list[int]:
        distance: dict[int, int] = {source: 0}
        reached_by: dict[int, int] = {}
        queue, queued = deque([source]), {source}
        while queue:
            vertex = queue.popleft()
            queued.discard(vertex)
            for arc in self.out[vertex]:
                end, room, price = self.arcs[arc]
                if room and distance[vertex] + price < distance.get(end, 1 << 40):
                    distance[end] = distance[vertex] + price
                    reached_by[end] = arc
                    if end not in queued:
                        queue.append(end)
                        queued.add(end)
        path = []
        while sink in reached_by and sink != source:
            arc = reached_by[sink]
            path.append(arc)
            sink = self.arcs[arc ^ 1][0]
        return path


def least_movement(
    previous: Layout, nodes: Sequence[LayoutNode], replicas: int, bounds: Sequence[tuple[int, int]]
) -> int:
    """Return the fewest slots that any layout within the zone rule and the bounds can move.

    `nodes` all have capacity; `bounds` are slots of each, at least and at most.
    """
    partitions = previous.partitions
    zones = sorted({node.zone for node in nodes})
    first_node = 2 + partitions * (1 + len(zones))
    flow = _Flow(first_node + len(nodes))
    for partition in range(partitions):
        vertex = 2 + partition
        flow.add(0, vertex, replicas, 0)
        owners = previous.owners_of(partition)
        for number, zone in enumerate(zones):
            in_zone = 2 + partitions + partition * len(zones) + number
            if len(zones) >= replicas:
                flow.add(vertex, in_zone, 1, 0)
            else:
                flow.add(vertex, in_zone, 1, -_MUST)
                flow.add(vertex, in_zone, replicas, 0)
            for position, node in enumerate(nodes):
                if node.zone == zone:
                    flow.add(in_zone, first_node + position, 1, 0 if node.node_id in owners else 1)
    for position, (low, high) in enumerate(bounds):
        flow.add(first_node + position, 1, low, -_MUST)
        flow.add(first_node + position, 1, high - low, 0)
    amount, cost = flow.solve(0, 1)
    must = sum(low for low, _ in bounds) + (partitions * len(zones) if len(zones) < replicas else 0)
    assert amount == partitions * replicas, "the bounds cannot be met at all"
    assert -cost > must * _MUST - _MUST, "the bounds cannot be met at all"
    return cost + must * _MUST


def best_shares_by_bisection(nodes: Sequence[LayoutNode], *, partitions: int, replicas: int) -> list[float]:
    """Return the best share of each node: fill all nodes evenly until a node, or a zone, is bound by the rules."""
    zones = sorted({node.zone for node in nodes})
    distinct = len(zones) >= replicas

    def filled(level: float, pool: Sequence[LayoutNode]) -> float:
        return sum(min(partitions, level * node.capacity_bytes) for node in pool)

    def level_for(total: float, pool: Sequence[LayoutNode]) -> float:
        low, high = 0.0, float(partitions) / min(node.capacity_bytes for node in pool)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if filled(middle, pool) < total else (low, middle)
        return high

    def zone_slots(level: float, pool: Sequence[LayoutNode]) -> float:
        return min(partitions, filled(level, pool)) if distinct else max(partitions, filled(level, pool))

    pools = {zone: [node for node in nodes if node.zone == zone] for zone in zones}
    low, high = 0.0, float(partitions) / min(node.capacity_bytes for node in nodes)
    for _ in range(200):
        middle = (low + high) / 2
        enough = sum(zone_slots(middle, pool) for pool in pools.values()) >= partitions * replicas
        low, high = (low, middle) if enough else (middle, high)
    levels = {zone: level_for(zone_slots(high, pool), pool) for zone, pool in pools.items()}
    return [min(float(partitions), levels[node.zone] * node.capacity_bytes) for node in nodes]
