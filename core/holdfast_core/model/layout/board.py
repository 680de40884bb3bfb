"""The table of owners while a plan is made: every slot has a node, or is vacant.

Invariant: a partition's distinct zones and vacant slots together are never fewer than the zones it needs, so that it
can always still be completed within the zone rule. Sets of nodes are bits of an integer, which keeps planning fast.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from holdfast_core.model.layout.shares import Problem


class Random:
    """A small deterministic generator (splitmix64): the same seed makes the same plan on every machine."""

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, bound: int) -> int:
        """Return a number from 0 to below `bound`."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((self._state ^ (self._state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return (mixed ^ (mixed >> 31)) % bound

    def shuffled(self, count: int) -> list[int]:
        """Return the numbers below `count` in random order."""
        order = list(range(count))
        for position in range(count - 1, 0, -1):
            other = self.below(position + 1)
            order[position], order[other] = order[other], order[position]
        return order


def bits_of(mask: int) -> Iterator[int]:
    """Yield the numbers of the bits that are set, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class Board:
    """The slots of all partitions.

    Attributes:
        problem: what is to be solved.
        vacant: the number that stands for no node.
        load: slots that each node owns; the last entry counts vacant slots.
        before: per partition, the bits of the nodes that owned it before.
        held: per node (and for vacant), the partitions in which it has a slot, with how many.
    """

    def __init__(self, problem: Problem, before: Sequence[Sequence[int]]) -> None:
        """Take the former owners of each partition as far as they are usable; the rest of the slots is vacant."""
        self.problem = problem
        self.vacant = len(problem.nodes)
        self._all = (1 << self.vacant) - 1
        self._zones_needed = problem.zones_needed
        self._zone_mask = [0] * len(problem.zones)
        for node, zone in enumerate(problem.zone_of):
            self._zone_mask[zone] |= 1 << node
        self.load = [0] * (self.vacant + 1)
        self.held: list[dict[int, int]] = [{} for _ in range(self.vacant + 1)]
        self.before = [sum(1 << node for node in owners) for owners in before]
        self._slots: list[list[int]] = []
        for partition, owners in enumerate(before):
            slots = [*owners, *[self.vacant] * (problem.replicas - len(owners))]
            self._slots.append(slots)
            for node in slots:
                self._count(node, partition, 1)

    def _count(self, node: int, partition: int, by: int) -> None:
        self.load[node] += by
        now = self.held[node].get(partition, 0) + by
        if now:
            self.held[node][partition] = now
        else:
            del self.held[node][partition]

    def slots(self, partition: int) -> Sequence[int]:
        """Return the nodes in a partition's slots, `vacant` among them."""
        return self._slots[partition]

    def replace(self, partition: int, old: int, new: int) -> None:
        """Put `new` where `old` is; either may be `vacant`."""
        slots = self._slots[partition]
        slots[slots.index(old)] = new
        self._count(old, partition, -1)
        self._count(new, partition, 1)

    def drop(self, partition: int, old: int) -> None:
        """Take a slot away."""
        self._slots[partition].remove(old)
        self._count(old, partition, -1)

    def zone_spread(self, partition: int) -> int:
        """Return distinct zones and vacant slots together."""
        slots = self._slots[partition]
        zones = {self.problem.zone_of[node] for node in slots if node != self.vacant}
        return len(zones) + slots.count(self.vacant)

    def allowed(self, partition: int, leaving: int) -> int:
        """Return the bits of the nodes that may take the slot of `leaving`, which may be `vacant`."""
        owners = zones = 0
        distinct = vacancies = 0
        skipped = False
        for node in self._slots[partition]:
            if node == self.vacant:
                vacancies += 1
                continue
            owners |= 1 << node
            if node == leaving:
                skipped = True
                continue
            mask = self._zone_mask[self.problem.zone_of[node]]
            if not zones & mask:
                zones |= mask
                distinct += 1
        if not skipped:
            vacancies -= 1
        if distinct + vacancies >= self._zones_needed:
            return self._all & ~owners
        return self._all & ~owners & ~zones

    def cost(self, partition: int, node: int) -> int:
        """Return what having `node` in `partition` costs in movement: 1 unless it owned it before."""
        return 0 if node == self.vacant or self.before[partition] >> node & 1 else 1
