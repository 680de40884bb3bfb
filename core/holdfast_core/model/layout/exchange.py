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

    def _apply(self, chain: Sequence[tuple[int, int]], *, cost_below: int | None = None) -> bool:
        """Carry out arcs one after another; undo all and return False where one has become impossible, or where their
        cost together is not below `cost_below`."""
        board = self._board
        done: list[tuple[int, int, int]] = []
        used: set[int] = set()
        cost = 0
        for old, new in chain:
            partition = self._cheapest(old, new, used)
            if partition is None:
                break
            cost += board.cost(partition, new) - board.cost(partition, old)
            used.add(partition)
            self.replace(partition, old, new)
            done.append((partition, old, new))
        if len(done) == len(chain) and (cost_below is None or cost < cost_below):
            return True
        for partition, old, new in reversed(done):
            self.replace(partition, new, old)
        return False

    def _cheapest(self, old: int, new: int, used: set[int]) -> int | None:
        """Return the partition in which `new` may best take a slot of `old`, a fresh one if that costs no more."""
        board = self._board
        best: int | None = None
        best_key = (2, True)
        for partition in board.held[old]:
            if board.allowed(partition, old) >> new & 1:
                key = (board.cost(partition, new) - board.cost(partition, old), partition in used)
                if key < best_key:
                    best, best_key = partition, key
                    if key == (-1, False):
                        break
        return best

    def reduce_movement(self, bounds: Sequence[Bounds]) -> None:
        """Carry out rearrangements that lower the movement within the bounds, until none is left.

        A cycle whose steps turn out to exclude each other is undone and ends the search: the plan then keeps the rules,
        but may move more than the least. In 16,000 cycles of random plans that has not happened.
        """
        while cycle := self._negative_cycle(bounds):
            if not self._apply(cycle, cost_below=0):
                return

    def _arcs(self, bounds: Sequence[Bounds]) -> list[list[tuple[int, int]]]:
        """Return per vertex its arcs, as bits with a cost.

        The extra vertex `slack` (the number of `vacant`) lets a chain end at a node that may grow and begin at one that
        may shrink.
        """
        board = self._board
        slack = board.vacant
        arcs = []
        for node in range(slack):
            row = self._row(node)
            grows = 1 << slack if board.load[node] < bounds[node].high else 0
            arcs.append([(row.gain, -1), (row.even | grows, 0), (row.loss, 1)])
        may_shrink = sum(1 << node for node in range(slack) if board.load[node] > bounds[node].low)
        return [*arcs, [(may_shrink, 0)]]

    def _negative_cycle(self, bounds: Sequence[Bounds]) -> list[tuple[int, int]]:
        """Return the arcs of a cycle of negative cost, slack left out, or none (Bellman-Ford from all vertices)."""
        slack = self._board.vacant
        active = {node for node in range(slack) if self._row(node).gain}
        if not active:
            return []
        arcs = self._arcs(bounds)
        distance = [0] * (slack + 1)
        # By distance, all below 0, the bits of the vertices that are as near or nearer.
        near: dict[int, int] = {}
        came_from: dict[int, int] = {}
        while active:
            changed: set[int] = set()
            for node in sorted(active):
                for mask, cost in arcs[node]:
                    reached = distance[node] + cost
                    if reached >= 0:
                        continue
                    # Most arcs lead where it is as near already: those nodes are left out all at once.
                    for other in bits_of(mask & ~near.get(reached, 0)):
                        for level in range(reached, distance[other]):
                            near[level] = near.get(level, 0) | 1 << other
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
