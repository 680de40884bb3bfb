"""Exchanges between nodes: chains of replacements that shift one slot from one node to another.

Nodes are the vertices; an arc a to b of cost c means that in some partition b may take a's slot, which makes the plan's
movement c larger (-1, 0 or 1). This is the residual graph of a flow problem (partition, zone in partition, node), with
the partitions folded into the arcs: a chain with the fewest arcs never uses a partition in two ways that disturb each
other, because it could then be shortened. A cycle of negative cost is a rearrangement that moves less; where none is
left, movement is least (ADR 0005).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from holdfast_core.model.layout.board import Board, bits_of
from holdfast_core.model.layout.shares import Bounds


class _Row(NamedTuple):
    """Nodes that may take a slot from one node, as bits, by what it costs."""

    gain: int
    even: int
    loss: int

    @property
    def any(self) -> int:
        return self.gain | self.even | self.loss


class Exchange:
    """The graph of exchanges over a board, kept up to date as it applies chains."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._rows: dict[int, _Row] = {}

    def _row(self, node: int) -> _Row:
        row = self._rows.get(node)
        if row is None:
            board = self._board
            gain = even = loss = 0
            for partition in board.held[node]:
                allowed = board.allowed(partition, node)
                before = board.before[partition]
                if board.cost(partition, node):
                    gain |= allowed & before
                    even |= allowed & ~before
                else:
                    even |= allowed & before
                    loss |= allowed & ~before
            row = self._rows[node] = _Row(gain, even, loss)
        return row

    def replace(self, partition: int, old: int, new: int) -> None:
        """Replace an owner on the board and forget what that may have changed in the graph."""
        for node in self._board.slots(partition):
            self._rows.pop(node, None)
        self._board.replace(partition, old, new)
        self._rows.pop(new, None)

    def shift(self, sources: Iterable[int], sinks: int) -> bool:
        """Shift one slot from one of `sources` to one of the nodes in `sinks` (bits) by the shortest chain.

        Returns whether there was one.
        """
        came_from: dict[int, int] = {}
        frontier = list(sources)
        seen = sum(1 << node for node in frontier)
        while frontier:
            following = []
            for node in frontier:
                fresh = self._row(node).any & ~seen
                hit = fresh & sinks
                if hit:
                    return self._apply(_chain(came_from, node, next(bits_of(hit))))
                seen |= fresh
                for other in bits_of(fresh):
                    came_from[other] = node
                    following.append(other)
            frontier = following
        return False

    def _apply(self, chain: Sequence[tuple[int, int]]) -> bool:
        """Carry out arcs, each in a partition of its own; undo all and return False where that is impossible."""
        done: list[tuple[int, int, int]] = []
        used: set[int] = set()
        for old, new in chain:
            partition = self._cheapest(old, new, used)
            if partition is None:
                for at, a, b in reversed(done):
                    self.replace(at, b, a)
                return False
            used.add(partition)
            self.replace(partition, old, new)
            done.append((partition, old, new))
        return True

    def _cheapest(self, old: int, new: int, used: set[int]) -> int | None:
        board = self._board
        best: int | None = None
        best_cost = 2
        for partition in board.held[old]:
            if partition not in used and board.allowed(partition, old) >> new & 1:
                cost = board.cost(partition, new) - board.cost(partition, old)
                if cost < best_cost:
                    best, best_cost = partition, cost
                    if cost < 0:
                        break
        return best

    def reduce_movement(self, bounds: Sequence[Bounds]) -> None:
        """Carry out rearrangements that lower the movement within the bounds, until none is left."""
        while cycle := self._negative_cycle(bounds):
            if not self._apply(cycle):
                return

    def _negative_cycle(self, bounds: Sequence[Bounds]) -> list[tuple[int, int]]:
        """Return the arcs of a cycle of negative cost (Bellman-Ford over all nodes at once), or none.

        The extra vertex `slack` lets a chain end at a node that may grow and begin at one that may shrink; its arcs are
        left out of the answer, as they change nothing on the board.
        """
        board = self._board
        slack = board.vacant
        nodes = range(slack)
        may_shrink = sum(1 << node for node in nodes if board.load[node] > bounds[node].low)
        distance = [0] * (slack + 1)
        came_from: dict[int, int] = {}
        active = {node for node in nodes if self._row(node).gain}
        while active:
            changed: set[int] = set()
            for node in sorted(active):
                if node == slack:
                    arcs = [(may_shrink, 0)]
                else:
                    row = self._row(node)
                    grows = 1 << slack if board.load[node] < bounds[node].high else 0
                    arcs = [(row.gain, -1), (row.even | grows, 0), (row.loss, 1)]
                for mask, cost in arcs:
                    reached = distance[node] + cost
                    for other in bits_of(mask):
                        if reached < distance[other]:
                            distance[other] = reached
                            came_from[other] = node
                            changed.add(other)
            cycle = _find_cycle(came_from)
            if cycle:
                return [arc for arc in cycle if slack not in arc]
            active = changed
        return []


def _chain(came_from: dict[int, int], last: int, end: int) -> list[tuple[int, int]]:
    chain = [(last, end)]
    while chain[-1][0] in came_from:
        node = chain[-1][0]
        chain.append((came_from[node], node))
    # From the end: each replacement then finds the partitions as the search saw them, and no node drops below its load.
    return chain


def _find_cycle(came_from: dict[int, int]) -> list[tuple[int, int]]:
    """Return the arcs of a cycle among the parent links, or none."""
    cleared: set[int] = set()
    for start in came_from:
        path: dict[int, int] = {}
        node = start
        while node in came_from and node not in cleared and node not in path:
            path[node] = len(path)
            node = came_from[node]
        if node in path:
            ring = list(path)[path[node] :]
            return [(came_from[member], member) for member in ring]
        cleared.update(path)
    return []
