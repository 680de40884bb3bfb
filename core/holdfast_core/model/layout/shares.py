"""How many slots each node should own: the best shares that the zone rule allows, and the bounds around them.

A slot is one owner of one partition. Best means: the fullest node, relative to its capacity, is as little full as the
rules allow, then the next fullest, and so on (the lexicographically optimal point of the polytope of feasible loads;
ADR 0005 argues that rounding it stays feasible). The rules: a node owns a partition at most once; a zone does, too,
while there are at least as many zones as replicas; with fewer zones, every zone owns every partition at least once.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

from holdfast_core.model.layout.table import LayoutNode

TOLERANCE: Final = Fraction(1, 100)


@dataclass(frozen=True, slots=True)
class Problem:
    """What a plan has to solve, over usable nodes only, which are numbered from 0.

    Attributes:
        nodes: the usable nodes.
        zone_of: number of each node's zone.
        zones: names of the zones.
        partitions: number of partitions.
        replicas: owners a partition has; not more than there are nodes.
        members: the nodes of each zone.
    """

    nodes: tuple[LayoutNode, ...]
    zone_of: tuple[int, ...]
    zones: tuple[str, ...]
    partitions: int
    replicas: int
    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, nodes: Sequence[LayoutNode], *, partitions: int, replicas: int) -> Problem:
        """Number the zones of `nodes`, all of which have capacity."""
        zones = tuple(sorted({node.zone for node in nodes}))
        number = {zone: position for position, zone in enumerate(zones)}
        zone_of = tuple(number[node.zone] for node in nodes)
        members: list[list[int]] = [[] for _ in zones]
        for node, zone in enumerate(zone_of):
            members[zone].append(node)
        return cls(tuple(nodes), zone_of, zones, partitions, replicas, tuple(map(tuple, members)))

    @property
    def slots_total(self) -> int:
        """Slots to fill."""
        return self.partitions * self.replicas

    @property
    def zones_distinct(self) -> bool:
        """Whether there are enough zones for all owners of a partition to be in distinct ones."""
        return len(self.zones) >= self.replicas

    @property
    def zones_needed(self) -> int:
        """Distinct zones that the owners of every partition are in, at least."""
        return min(self.replicas, len(self.zones))


def best_shares(problem: Problem) -> list[Fraction]:
    """Return the best number of slots of each node, as exact fractions that add up to all slots."""
    members = problem.members
    shares = [Fraction(0)] * len(problem.nodes)
    free = set(range(len(problem.zones)))
    remaining = Fraction(problem.slots_total)
    while free:
        pool = [node for zone in sorted(free) for node in members[zone]]
        _fill(problem, pool, remaining, shares)
        # Only one kind of bound can bind: zones are capped while there are enough of them, and else are guaranteed.
        # Fixing what breaks it moves the others away from their own bound no further, so one direction suffices.
        broken = [zone for zone in sorted(free) if _breaks_bound(problem, sum(shares[node] for node in members[zone]))]
        if not broken:
            return shares
        for zone in broken:
            _fill(problem, members[zone], Fraction(problem.partitions), shares)
            remaining -= problem.partitions
            free.remove(zone)
    return shares


def _breaks_bound(problem: Problem, zone_slots: Fraction | int) -> bool:
    if problem.zones_distinct:
        return zone_slots > problem.partitions
    return zone_slots < problem.partitions


def _fill(problem: Problem, pool: Sequence[int], total: Fraction, shares: list[Fraction]) -> None:
    """Divide `total` among `pool` by capacity, none above the number of partitions."""
    weight = sum(problem.nodes[node].capacity_bytes for node in pool)
    for node in sorted(pool, key=lambda n: problem.nodes[n].capacity_bytes, reverse=True):
        capacity = problem.nodes[node].capacity_bytes
        shares[node] = min(Fraction(problem.partitions), total * capacity / weight)
        total -= shares[node]
        weight -= capacity


@dataclass(frozen=True, slots=True)
class Bounds:
    """How many slots a node may own: within max(1 %, one partition) of its best share."""

    low: int
    high: int


def bounds_of(problem: Problem, shares: Sequence[Fraction]) -> list[Bounds]:
    """Return each node's bounds."""
    result = []
    for share in shares:
        tolerance = max(share * TOLERANCE, Fraction(1))
        low = max(0, math.ceil(share - tolerance))
        result.append(Bounds(low, min(problem.partitions, math.floor(share + tolerance))))
    return result


def targets(problem: Problem, shares: Sequence[Fraction], bounds: Sequence[Bounds], owned: Sequence[int]) -> list[int]:
    """Return how many slots each node should end with: within its bounds, all slots together, within the zone rule,
    and as near to what it owns as that allows, because the distance is movement."""
    result = [min(max(have, bound.low), bound.high) for have, bound in zip(owned, bounds, strict=True)]
    zone_slots = [sum(result[node] for node in members) for members in problem.members]
    for zone, slots in enumerate(zone_slots):
        if _breaks_bound(problem, Fraction(slots)):
            step = 1 if slots < problem.partitions else -1
            _adjust(
                problem, shares, bounds, result, zone_slots, problem.members[zone], step, problem.partitions - slots
            )
    missing = problem.slots_total - sum(result)
    if missing:
        everyone = list(range(len(problem.nodes)))
        _adjust(problem, shares, bounds, result, zone_slots, everyone, 1 if missing > 0 else -1, missing)
    return result


def _adjust(
    problem: Problem,
    shares: Sequence[Fraction],
    bounds: Sequence[Bounds],
    result: list[int],
    zone_slots: list[int],
    pool: Sequence[int],
    step: int,
    distance: int,
) -> None:
    """Move the targets of `pool` by `distance` in single steps, always where it leaves the share least."""

    def entry(node: int) -> tuple[float, int]:
        return (step * float((result[node] - shares[node]) / shares[node]) if shares[node] else 0.0, node)

    heap = [entry(node) for node in pool]
    heapq.heapify(heap)
    left = abs(distance)
    while left and heap:
        node = heapq.heappop(heap)[1]
        zone = problem.zone_of[node]
        within = result[node] < bounds[node].high if step > 0 else result[node] > bounds[node].low
        if not within or (
            len(pool) == len(problem.nodes) and _breaks_bound(problem, Fraction(zone_slots[zone] + step))
        ):
            continue
        result[node] += step
        zone_slots[zone] += step
        left -= 1
        heapq.heappush(heap, entry(node))
