"""Plans the next layout, purely: the same input makes the same plan everywhere.

Precedence: owners of a partition in distinct zones while there are enough, then balance by capacity to within
max(1 %, one partition) of the best share that the zone rule allows, then least movement. Four steps: keep what the zone
rule lets stay; fill vacant slots where nodes lack most; shift from nodes that have too much, directly, then by chains;
rearrange while that lowers the movement.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout.board import Board, Random, bits_of
from holdfast_core.model.layout.buckets import Buckets
from holdfast_core.model.layout.exchange import Exchange
from holdfast_core.model.layout.explain import explain
from holdfast_core.model.layout.shares import Bounds, Problem, best_shares, bounds_of, targets
from holdfast_core.model.layout.table import Layout, LayoutNode, check_dimensions
from holdfast_core.model.limits import NODES_MAX


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """The next layout, and what it would change.

    Attributes:
        layout: the layout as it would become.
        previous_epoch: epoch that the plan starts from; 0 where there is no layout yet.
        slots_moved: owner slots whose node did not own the partition before; 0 for a first layout.
        slots_total: owner slots in all, partitions * replicas.
        explanation: one line a fact, for people.
    """

    layout: Layout
    previous_epoch: int
    slots_moved: int
    slots_total: int
    explanation: tuple[str, ...]


def plan_layout(
    previous: Layout | None, nodes: Sequence[LayoutNode], replicas: int, *, seed: int, partitions: int
) -> LayoutPlan:
    """Plan the layout that follows `previous` over `nodes`; its epoch is one higher, even where nothing changes.

    Args:
        previous: the newest layout, or None for the first.
        nodes: nodes that shall be in the layout, in any order; those with capacity 0 own nothing.
        replicas: owners a partition shall have.
        seed: seed of the placement hash; fixed for the life of the cluster.
        partitions: number of partitions, a power of two; fixed for the life of the cluster.

    Raises:
        HoldfastError: NOT_READY if fewer nodes have capacity than there are replicas; INVALID_ARGUMENT if a number is
            out of range, a name comes twice, or seed or partitions differ from the previous layout's; LIMIT_EXCEEDED
            if there are too many nodes.
    """
    ordered = tuple(sorted(nodes, key=lambda node: node.node_id))
    usable = [position for position, node in enumerate(ordered) if node.capacity_bytes > 0]
    _check(previous, ordered, replicas=replicas, seed=seed, partitions=partitions)
    if len(usable) < replicas:
        raise HoldfastError(
            ErrorCode.NOT_READY,
            f"{replicas} replicas need {replicas} nodes with capacity, and there are {len(usable)}; add nodes",
        )
    problem = Problem.of([ordered[position] for position in usable], partitions=partitions, replicas=replicas)
    shares = best_shares(problem)
    table = _solve(problem, shares, _former_owners(previous, problem), Random(seed))
    epoch = previous.epoch if previous else 0
    layout = Layout(
        epoch=epoch + 1,
        seed=seed,
        partitions=partitions,
        replicas=replicas,
        nodes=ordered,
        owners=struct.pack(f"<{problem.slots_total}H", *(usable[node] for owners in table for node in owners)),
    )
    moved = _count_moved(previous, layout)
    return LayoutPlan(
        layout, epoch, moved, problem.slots_total, explain(previous, layout, problem, shares, slots_moved=moved)
    )


def _check(previous: Layout | None, nodes: Sequence[LayoutNode], *, replicas: int, seed: int, partitions: int) -> None:
    try:
        check_dimensions(seed=seed, partitions=partitions, replicas=replicas)
    except ValueError as error:
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"the layout cannot be planned: {error}") from error
    if previous is not None and (previous.seed, previous.partitions) != (seed, partitions):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "seed and partitions are fixed for the life of a cluster")
    if len({node.node_id for node in nodes}) != len(nodes):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "two nodes of the layout have one name")
    if any(node.capacity_bytes < 0 for node in nodes):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "a node's capacity cannot be below 0")
    if len(nodes) > NODES_MAX:
        raise HoldfastError(ErrorCode.LIMIT_EXCEEDED, f"a layout takes at most {NODES_MAX} nodes, not {len(nodes)}")


def _former_owners(previous: Layout | None, problem: Problem) -> list[list[int]]:
    """Return the usable nodes that own each partition now."""
    if previous is None:
        return [[] for _ in range(problem.partitions)]
    number = {node.node_id: position for position, node in enumerate(problem.nodes)}
    return [
        [number[name] for name in previous.owners_of(partition) if name in number]
        for partition in range(problem.partitions)
    ]


def _count_moved(previous: Layout | None, layout: Layout) -> int:
    if previous is None:
        return 0
    return sum(
        len(set(layout.owners_of(partition)) - set(previous.owners_of(partition)))
        for partition in range(layout.partitions)
    )


def _solve(
    problem: Problem, shares: Sequence[Fraction], former: Sequence[Sequence[int]], random: Random
) -> list[list[int]]:
    bounds = bounds_of(problem, shares)
    board = Board(problem, former)
    _enforce_rules(board, shares)
    goal = targets(problem, shares, bounds, board.load[: board.vacant])
    order = random.shuffled(problem.partitions)
    _fill_vacancies(board, goal, order, random)
    _shift_directly(board, goal, order, random)
    exchange = Exchange(board)
    _balance(board, exchange, goal, bounds)
    fresh = not any(former)
    if not fresh:
        exchange.reduce_movement(bounds)
    table = []
    for partition in range(problem.partitions):
        slots = list(board.slots(partition))
        # Readers may prefer the first owner; in a fresh table every node shall be first about equally often.
        turn = random.below(len(slots)) if fresh else 0
        table.append(slots[turn:] + slots[:turn])
    return table


def _enforce_rules(board: Board, shares: Sequence[Fraction]) -> None:
    """Take away what a changed number of replicas or changed zones forbid, from the nodes that have most too much."""
    problem = board.problem

    def surplus(node: int) -> tuple[float, int]:
        return (float(board.load[node] - shares[node]), node)

    for partition in range(problem.partitions):
        while len(board.slots(partition)) > problem.replicas:
            slots = board.slots(partition)
            zones = [problem.zone_of[node] for node in slots]
            doubled = [node for node, zone in zip(slots, zones, strict=True) if zones.count(zone) > 1]
            board.drop(partition, max(doubled or slots, key=surplus))
        while board.zone_spread(partition) < problem.zones_needed:
            owners = [node for node in board.slots(partition) if node != board.vacant]
            zones = [problem.zone_of[node] for node in owners]
            doubled = [node for node, zone in zip(owners, zones, strict=True) if zones.count(zone) > 1]
            board.replace(partition, max(doubled, key=surplus), board.vacant)


def _fill_vacancies(board: Board, goal: Sequence[int], order: Sequence[int], random: Random) -> None:
    """Give vacant slots to the nodes that lack most, in the zones that lack most, former owners first.

    Taking the zones that lack most keeps every zone's need below the number of partitions that are left, which is what
    makes a first layout come out exact without any repair.
    """
    problem = board.problem
    lacking = [max(0, want - have) for want, have in zip(goal, board.load, strict=False)]
    zones = Buckets([sum(lacking[node] for node in members) for members in problem.members])
    # Nodes of a zone, by their place in it.
    nodes = [Buckets([lacking[node] for node in members]) for members in problem.members]
    place_of = {node: place for members in problem.members for place, node in enumerate(members)}
    open_nodes = sum(1 << node for node, lack in enumerate(lacking) if lack)

    def best_of(candidates: int) -> int:
        """Return a candidate, of which there are some, in the zone that lacks most."""
        found: list[int] = []

        def has_one(zone: int) -> bool:
            members = problem.members[zone]
            place = nodes[zone].pick(lambda place: bool(candidates >> members[place] & 1), random)
            if place is None:
                return False
            found.append(members[place])
            return True

        zones.pick(has_one, random)
        return found[-1]

    for partition in [p for p in order if p in board.held[board.vacant]]:
        for _ in range(board.held[board.vacant][partition]):
            candidates = board.allowed(partition, board.vacant) & open_nodes
            if not candidates:
                break
            best = best_of(candidates & board.before[partition] or candidates)
            board.replace(partition, board.vacant, best)
            lacking[best] -= 1
            zone = problem.zone_of[best]
            zones.lower(zone)
            nodes[zone].lower(place_of[best])
            if not lacking[best]:
                open_nodes &= ~(1 << best)


def _shift_directly(board: Board, goal: Sequence[int], order: Sequence[int], random: Random) -> None:
    """Replace nodes that have too much by nodes that have too little, at most one slot of a partition a round."""
    open_nodes = sum(1 << node for node, want in enumerate(goal) if board.load[node] < want)
    moved = True
    while open_nodes and moved:
        moved = False
        for partition in order:
            donors = [n for n in board.slots(partition) if n != board.vacant and board.load[n] > goal[n]]
            for donor in sorted(donors, key=lambda n: goal[n] - board.load[n]):
                candidates = board.allowed(partition, donor) & open_nodes
                if not candidates:
                    continue
                most = max(goal[node] - board.load[node] for node in bits_of(candidates))
                level = [node for node in bits_of(candidates) if goal[node] - board.load[node] == most]
                taker = level[random.below(len(level))]
                board.replace(partition, donor, taker)
                if board.load[taker] >= goal[taker]:
                    open_nodes &= ~(1 << taker)
                moved = True
                break


def _balance(board: Board, exchange: Exchange, goal: Sequence[int], bounds: Sequence[Bounds]) -> None:
    """Bring what is left vacant, too much or too little within the bounds, by chains of replacements.

    Raises:
        HoldfastError: INTERNAL if that is impossible, which the argument of ADR 0005 excludes.
    """
    nodes = range(board.vacant)

    def below(limits: Sequence[int]) -> int:
        return sum(1 << node for node in nodes if board.load[node] < limits[node])

    high = [bound.high for bound in bounds]
    low = [bound.low for bound in bounds]
    while board.load[board.vacant]:
        source = [board.vacant]
        if not exchange.shift(source, below(goal)) and not exchange.shift(source, below(high)):
            raise HoldfastError(ErrorCode.INTERNAL, "a layout could not be completed; please report the nodes")
    while heavy := [node for node in nodes if board.load[node] > high[node]]:
        if not exchange.shift(heavy, below(goal)) and not exchange.shift(heavy, below(high)):
            raise HoldfastError(ErrorCode.INTERNAL, "a layout could not be balanced; please report the nodes")
    while light := below(low):
        rich = [node for node in nodes if board.load[node] > goal[node]]
        if not exchange.shift(rich, light) and not exchange.shift([n for n in nodes if board.load[n] > low[n]], light):
            raise HoldfastError(ErrorCode.INTERNAL, "a layout could not be balanced; please report the nodes")
