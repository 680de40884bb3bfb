"""Layouts keep DESIGN's precedence: distinct zones, then balance, then least movement."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout, LayoutNode, LayoutPlan, plan_layout
from holdfast_core.model.limits import GIB, NODES_MAX, PARTITIONS_DEFAULT
from tests.model.flows import best_shares_by_bisection, least_movement

SEED = 0xC0FFEE


def make_nodes(count: int, *, zones: int, capacity: int = 100 * GIB) -> list[LayoutNode]:
    """Equal nodes, dealt over zones."""
    return [LayoutNode(f"node-{number:03d}", f"zone-{number % zones}", capacity) for number in range(count)]


def plan(
    previous: Layout | None, nodes: Sequence[LayoutNode], replicas: int = 3, *, partitions: int = PARTITIONS_DEFAULT
) -> LayoutPlan:
    """Plan with the tests' seed."""
    return plan_layout(previous, nodes, replicas, seed=SEED, partitions=partitions)


def slots_of(layout: Layout) -> Counter[str]:
    """Slots that each node owns."""
    return Counter(name for partition in range(layout.partitions) for name in layout.owners_of(partition))


def best_bounds(nodes: Sequence[LayoutNode], *, partitions: int, replicas: int) -> dict[str, tuple[int, int]]:
    """Slots that each node may own: within max(1 %, one partition) of the best share."""
    usable = [node for node in nodes if node.capacity_bytes]
    shares = best_shares_by_bisection(usable, partitions=partitions, replicas=replicas)
    result = {node.node_id: (0, 0) for node in nodes}
    for node, share in zip(usable, shares, strict=True):
        tolerance = max(share / 100, 1) + 1e-6
        result[node.node_id] = (max(0, math.ceil(share - tolerance)), min(partitions, math.floor(share + tolerance)))
    return result


def check_rules(plan: LayoutPlan, nodes: Sequence[LayoutNode], replicas: int) -> None:
    """Zones first, then balance."""
    layout = plan.layout
    zone_of = {node.node_id: node.zone for node in nodes}
    zones = len({node.zone for node in nodes if node.capacity_bytes})
    for partition in range(layout.partitions):
        owners = layout.owners_of(partition)
        assert len(set(owners)) == replicas
        assert len({zone_of[name] for name in owners}) >= min(zones, replicas)
    slots = slots_of(layout)
    for name, (low, high) in best_bounds(nodes, partitions=layout.partitions, replicas=replicas).items():
        assert low <= slots[name] <= high, name


@st.composite
def node_lists(draw: st.DrawFn, *, nodes_max: int = 8) -> list[LayoutNode]:
    """Nodes of few zones and of capacities that differ by up to a hundredfold; some have none."""
    count = draw(st.integers(1, nodes_max))
    zones = draw(st.integers(1, 5))
    capacity = st.one_of(st.just(100), st.integers(1, 100), st.just(0))
    return [
        LayoutNode(f"n{number}", f"z{draw(st.integers(0, zones - 1))}", draw(capacity) * GIB) for number in range(count)
    ]


@settings(max_examples=150)
@given(nodes=node_lists(), replicas=st.integers(1, 4), partitions=st.sampled_from([1, 8, 64]))
def test_a_first_layout_keeps_zones_and_balance(nodes: list[LayoutNode], replicas: int, partitions: int) -> None:
    assume(sum(1 for node in nodes if node.capacity_bytes) >= replicas)
    made = plan(None, nodes, replicas, partitions=partitions)
    check_rules(made, nodes, replicas)
    assert made.slots_moved == made.previous_epoch == 0
    assert made.layout.epoch == 1


@pytest.mark.slow
@settings(max_examples=200)
@given(
    before=node_lists(),
    after=node_lists(),
    replicas_before=st.integers(1, 4),
    replicas=st.integers(1, 4),
    partitions=st.sampled_from([2, 8, 16]),
)
def test_any_change_keeps_the_rules_and_moves_least(
    before: list[LayoutNode], after: list[LayoutNode], replicas_before: int, replicas: int, partitions: int
) -> None:
    usable = [node for node in after if node.capacity_bytes]
    assume(sum(1 for node in before if node.capacity_bytes) >= replicas_before)
    assume(len(usable) >= replicas)
    first = plan(None, before, replicas_before, partitions=partitions).layout
    made = plan(first, after, replicas, partitions=partitions)
    check_rules(made, after, replicas)
    assert made.layout.epoch == 2
    bounds = best_bounds(after, partitions=partitions, replicas=replicas)
    least = least_movement(first, usable, replicas, [bounds[node.node_id] for node in usable])
    assert made.slots_moved == least


@settings(max_examples=25)
@given(nodes=node_lists(nodes_max=6), data=st.data())
def test_a_history_of_changes_stays_within_the_rules(nodes: list[LayoutNode], data: st.DataObject) -> None:
    layout: Layout | None = None
    for step in range(4):
        if step:
            nodes = [node for node in nodes if data.draw(st.integers(0, 3))]
            nodes += [
                LayoutNode(f"s{step}-{node.node_id}", node.zone, node.capacity_bytes)
                for node in data.draw(node_lists(nodes_max=3))
            ]
        if sum(1 for node in nodes if node.capacity_bytes) >= 2:
            made = plan(layout, nodes, 2, partitions=32)
            check_rules(made, nodes, 2)
            layout = made.layout


@pytest.mark.parametrize(("count", "zones"), [(4, 4), (6, 3), (10, 10), (10, 1), (12, 2), (30, 5)])
def test_adding_or_removing_one_of_equals_moves_its_share(count: int, zones: int) -> None:
    nodes = make_nodes(count, zones=zones)
    first = plan(None, nodes).layout
    total = first.partitions * first.replicas
    one_more = make_nodes(count + 1, zones=zones if zones < count else count + 1)
    added = plan(first, one_more)
    check_rules(added, one_more, 3)
    low, _ = best_bounds(one_more, partitions=4096, replicas=3)[one_more[-1].node_id]
    assert added.slots_moved == low
    assert added.slots_moved <= total / (count + 1) + 1
    removed = plan(first, nodes[1:])
    check_rules(removed, nodes[1:], 3)
    assert abs(removed.slots_moved - slots_of(first)["node-000"]) <= (
        0 if zones == count or zones == 1 else total * 0.01
    )


def test_nothing_changes_without_a_reason() -> None:
    nodes = make_nodes(10, zones=3)
    first = plan(None, nodes)
    again = plan(first.layout, list(reversed(nodes)))
    assert again.layout.owners == first.layout.owners
    assert (again.slots_moved, again.previous_epoch, again.layout.epoch) == (0, 1, 2)
    assert again.explanation[0] == "no slot moves"


def test_the_same_input_makes_the_same_plan() -> None:
    nodes = make_nodes(7, zones=3)
    assert plan(None, nodes) == plan(None, nodes)


def test_a_drained_node_owns_nothing_and_stays_in_the_layout() -> None:
    nodes = make_nodes(5, zones=5)
    first = plan(None, nodes).layout
    drained = [LayoutNode("node-000", "zone-0", 0), *nodes[1:]]
    made = plan(first, drained)
    check_rules(made, drained, 3)
    assert slots_of(made.layout)["node-000"] == 0
    assert [node.node_id for node in made.layout.nodes] == [node.node_id for node in nodes]
    assert made.slots_moved == slots_of(first)["node-000"]


def test_a_new_zone_takes_one_owner_of_every_partition() -> None:
    nodes = make_nodes(6, zones=2)
    first = plan(None, nodes).layout
    more = [*nodes, *(LayoutNode(f"new-{number}", "zone-new", 100 * GIB) for number in range(3))]
    made = plan(first, more)
    check_rules(made, more, 3)
    assert made.slots_moved == 4096


def test_more_replicas_move_only_the_new_ones_and_fewer_none() -> None:
    nodes = make_nodes(9, zones=9)
    two = plan(None, nodes, 2).layout
    three = plan(two, nodes, 3)
    check_rules(three, nodes, 3)
    assert three.slots_moved == 4096
    back = plan(three.layout, nodes, 2)
    check_rules(back, nodes, 2)
    assert back.slots_moved == 0


def test_a_failed_nodes_partitions_are_shared_with_many_others() -> None:
    layout = plan(None, make_nodes(30, zones=30)).layout
    partners = Counter(
        name for partition in range(4096) if "node-000" in (owners := layout.owners_of(partition)) for name in owners
    )
    assert len(partners) == 30
    assert max(count for name, count in partners.items() if name != "node-000") < 80


def test_every_node_is_first_about_equally_often() -> None:
    layout = plan(None, make_nodes(10, zones=10)).layout
    firsts = Counter(layout.owners_of(partition)[0] for partition in range(4096))
    assert 300 < min(firsts.values()) <= max(firsts.values()) < 520


def test_too_few_nodes_are_not_ready() -> None:
    for nodes in ([], make_nodes(2, zones=2), [*make_nodes(2, zones=2), LayoutNode("empty", "z", 0)]):
        with pytest.raises(HoldfastError, match="3 replicas need 3 nodes") as caught:
            plan(None, nodes)
        assert caught.value.code is ErrorCode.NOT_READY


def test_contradictions_are_refused() -> None:
    nodes = make_nodes(3, zones=3)
    first = plan(None, nodes).layout
    wrong: list[tuple[Layout | None, list[LayoutNode], int, int, int]] = [
        (first, nodes, 3, 1, 4096),
        (first, nodes, 3, SEED, 2048),
        (None, nodes, 3, 2**32, 4096),
        (None, nodes, 3, SEED, 100),
        (None, nodes, 0, SEED, 64),
        (None, [*nodes, nodes[0]], 3, SEED, 64),
        (None, [*nodes, LayoutNode("n", "z", -1)], 3, SEED, 64),
    ]
    for previous, members, replicas, seed, partitions in wrong:
        with pytest.raises(HoldfastError) as caught:
            plan_layout(previous, members, replicas, seed=seed, partitions=partitions)
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    with pytest.raises(HoldfastError) as caught:
        plan(None, [LayoutNode(str(number), "z", 0) for number in range(NODES_MAX + 1)])
    assert caught.value.code is ErrorCode.LIMIT_EXCEEDED


@pytest.mark.slow
def test_the_explanation_says_what_matters() -> None:
    lines = "\n".join(plan(None, make_nodes(3, zones=3), partitions=64).explanation)
    assert "first layout: 64 partitions" in lines
    assert "node node-000 (zone zone-0): 64 slots, 33.33%" in lines
    assert "a partition's 3 owners are in distinct zones" in lines
    assert "64 partitions are coarse for 3 of 3 nodes" in lines
    fine = "\n".join(plan(None, make_nodes(3, zones=3)).explanation)
    assert "coarse" not in fine
    one_zone = "\n".join(plan(None, make_nodes(3, zones=1)).explanation)
    assert "its loss takes every copy" in one_zone
    two_zones = "\n".join(plan(None, make_nodes(4, zones=2)).explanation)
    assert "can take up to 2 of 3 copies" in two_zones
    first = plan(None, make_nodes(6, zones=6)).layout
    skewed = [*make_nodes(5, zones=6), LayoutNode("big", "zone-6", 1000 * GIB), LayoutNode("off", "z", 0)]
    changed = "\n".join(plan(first, skewed).explanation)
    assert "slots move (" in changed
    assert "zone zone-6 has 66.7% of the capacity, but the best it can own is 33.3%" in changed
    assert "it has no capacity" in changed
    assert "node node-005 leaves and gives up 2048 slots" in changed
    tiny = plan(None, [*make_nodes(3, zones=3), LayoutNode("tiny", "zone-3", 1)]).explanation
    assert "less than one slot" in "\n".join(tiny)


@pytest.mark.slow
def test_many_nodes_are_placed_as_exactly_as_few() -> None:
    nodes = make_nodes(2000, zones=20)
    first = plan_layout(None, nodes, 3, seed=1, partitions=8192)
    check_rules(first, nodes, 3)
    counts = slots_of(first.layout)
    assert max(counts.values()) - min(counts[node.node_id] for node in nodes) <= 2
    gone = plan_layout(first.layout, nodes[1:], 3, seed=1, partitions=8192)
    assert gone.slots_moved == counts[nodes[0].node_id]
