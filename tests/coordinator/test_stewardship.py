"""What a steward plans, from values alone: brakes, company, and no flapping whatever nodes do."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast_coordinator.healing.stewardship import (
    Sighting,
    Sightings,
    Situation,
    StewardRules,
    Stewardship,
    plan_stewardship,
)
from holdfast_proto.v1.common_pb2 import NodeState

RULES = StewardRules(replicas=3, out_after_s=60.0, back_after_s=16.0, together_s=10.0)


def node(number: int, *, down_s: float | None = None, **changes: object) -> Sighting:
    """Return a member that has been up for long, or down for `down_s`."""
    plain = Sighting(
        node_id=f"node-{number}",
        member=True,
        up=down_s is None,
        since_s=1e6 if down_s is None else down_s,
        state=NodeState(),
        weight_bytes=100,
        synced_epoch=1,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def situation(*nodes: Sighting, living: int = 1, has_room: bool = True) -> Situation:
    """Return a situation under the first layout."""
    return Situation(epoch=1, living=living, has_room=has_room, nodes=nodes)


def up(*numbers: int) -> list[Sighting]:
    """Return members that are up."""
    return [node(number) for number in numbers]


@pytest.mark.parametrize(("down_s", "out"), [(0.0, ()), (59.9, ()), (60.0, ("node-5",)), (1e9, ("node-5",))])
def test_a_node_is_left_out_once_its_time_has_come(down_s: float, out: tuple[str, ...]) -> None:
    assert plan_stewardship(situation(*up(1, 2, 3, 4), node(5, down_s=down_s)), RULES).out == out


@pytest.mark.parametrize(
    ("members", "down", "out"), [(6, 2, 2), (6, 3, 0), (9, 3, 3), (9, 4, 0), (93, 31, 31), (4, 1, 1)]
)
def test_a_third_may_be_down_and_no_more(members: int, down: int, out: int) -> None:
    nodes = [node(number, down_s=100 if number <= down else None) for number in range(1, members + 1)]
    plan = plan_stewardship(situation(*nodes), RULES)
    assert len(plan.out) == out
    assert bool(plan.held) == (not out)


def test_those_that_are_down_longest_go_where_not_all_may() -> None:
    nodes = [*up(1, 2, 3), node(4, down_s=80), node(5, down_s=90)]
    plan = plan_stewardship(situation(*nodes), replace(RULES, replicas=4, down_fraction_max=0.5))
    assert plan.out == ("node-5",)
    assert plan.held == "node-4 is not left out: fewer than 4 nodes would remain"


def test_who_is_due_waits_a_little_for_who_soon_will_be() -> None:
    others = up(*range(1, 8))
    assert plan_stewardship(situation(*others, node(8, down_s=62), node(9, down_s=55)), RULES) == Stewardship()
    both = plan_stewardship(situation(*others, node(8, down_s=67), node(9, down_s=60)), RULES)
    assert both.out == ("node-8", "node-9")
    late = plan_stewardship(situation(*others, node(8, down_s=70), node(9, down_s=55)), RULES)
    assert late.out == ("node-8",)
    apart = plan_stewardship(situation(*others, node(8, down_s=60), node(9, down_s=40)), RULES)
    assert apart.out == ("node-8",)


def test_everything_that_is_due_goes_into_one_layout() -> None:
    out = NodeState(out=True)
    plan = plan_stewardship(
        situation(
            *up(1, 2, 3, 4),
            node(5, down_s=100),
            node(6, member=False, state=out, since_s=16.0),
            node(7, state=NodeState(weight_bytes=7)),
            node(8, state=NodeState(draining=True)),
        ),
        RULES,
    )
    assert plan == Stewardship(out=("node-5",), back=("node-6",), converge=True)
    assert plan.reason == "node-5 is out and node-6 is back"


def test_old_layouts_end_before_a_new_one_is_made_and_only_when_all_are_synced() -> None:
    nodes = [*up(1, 2, 3, 4), node(5, down_s=100)]
    assert plan_stewardship(situation(*nodes, living=2), RULES) == Stewardship(retire=True)
    behind = [*nodes[:4], replace(nodes[4], synced_epoch=0)]
    assert plan_stewardship(situation(*behind, living=2), RULES) == Stewardship(out=("node-5",))
    outsider = node(6, member=False, synced_epoch=0)
    assert plan_stewardship(situation(*nodes, outsider, living=2), RULES).retire
    assert not plan_stewardship(situation(*nodes), RULES).retire


def test_without_room_nothing_changes_but_old_layouts_still_end() -> None:
    nodes = [*up(1, 2, 3, 4), node(5, down_s=100, synced_epoch=0)]
    plan = plan_stewardship(situation(*nodes, living=24, has_room=False), RULES)
    assert (plan.changes_layout, plan.held) == (
        False,
        "24 layouts are alive; the next change waits until they settle",
    )
    synced = [*nodes[:4], replace(nodes[4], synced_epoch=1)]
    assert plan_stewardship(situation(*synced, living=24, has_room=False), RULES).retire


def test_a_state_that_would_leave_too_few_nodes_is_held() -> None:
    plan = plan_stewardship(situation(*up(1, 2), node(3, state=NodeState(draining=True))), RULES)
    assert not plan.changes_layout
    assert plan.held == "node-3 is needed: without, fewer than 3 nodes would remain"


def test_nothing_is_planned_before_the_first_layout() -> None:
    nothing = Situation(epoch=0, living=0, has_room=False, nodes=(node(1, member=False, down_s=1e6),))
    assert plan_stewardship(nothing, RULES) == Stewardship()


def test_sightings_count_from_the_last_change_and_forget_who_is_gone() -> None:
    sightings = Sightings()
    assert sightings.look({"a": True, "b": False}, 10.0) == {"a": 0.0, "b": 0.0}
    assert sightings.look({"a": True, "b": True}, 15.0) == {"a": 5.0, "b": 0.0}
    assert sightings.look({"a": True}, 16.0) == {"a": 6.0}
    assert sightings.look({"a": True, "b": True}, 17.0) == {"a": 7.0, "b": 0.0}
    sightings.clear()
    assert sightings.look({"a": True}, 18.0) == {"a": 0.0}


@dataclass
class Model:
    """A cluster whose steward's plans are carried out at once, and what it went through."""

    count: int
    members: set[str] = field(init=False)
    out: set[str] = field(default_factory=set)
    sightings: Sightings = field(default_factory=Sightings)
    changes: list[tuple[float, Stewardship]] = field(default_factory=list)
    history: list[tuple[float, frozenset[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Begin with all nodes in the layout."""
        self.members = {f"node-{number}" for number in range(self.count)}

    def look(self, up: frozenset[str], now_s: float) -> Stewardship:
        """Plan on what is up now, and carry it out."""
        names = [f"node-{number}" for number in range(self.count)]
        since_s = self.sightings.look({name: name in up for name in names}, now_s)
        nodes = tuple(
            Sighting(
                node_id=name,
                member=name in self.members,
                up=name in up,
                since_s=since_s[name],
                state=NodeState(out=name in self.out),
            )
            for name in names
        )
        plan = plan_stewardship(Situation(epoch=1, living=1, has_room=True, nodes=nodes), RULES)
        self.members = self.members - set(plan.out) | set(plan.back)
        self.out = self.out - set(plan.back) | set(plan.out)
        self.history.append((now_s, up))
        if plan.changes_layout:
            self.changes.append((now_s, plan))
        return plan

    def was(self, name: str, *, is_up: bool, from_s: float, to_s: float) -> bool:
        """Return whether a node was up, or down, at every look of a time."""
        return all((name in up) == is_up for at_s, up in self.history if from_s <= at_s <= to_s)


_STEPS = st.lists(
    st.tuples(st.frozensets(st.integers(0, 8)), st.floats(1.0, 90.0)),
    max_size=30,
)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(count=st.integers(3, 9), steps=_STEPS)
def test_whatever_nodes_do_none_flaps_and_enough_remain(count: int, steps: list[tuple[frozenset[int], float]]) -> None:
    model = Model(count)
    now_s = 0.0
    for down, lasts_s in steps:
        up = frozenset(f"node-{number}" for number in range(count) if number not in down)
        end_s = now_s + lasts_s
        while now_s < end_s:
            before = set(model.members)
            plan = model.look(up, now_s)
            assert len(model.members) >= RULES.replicas
            if plan.changes_layout:
                assert model.members != before
                for name in plan.out:
                    assert model.was(name, is_up=False, from_s=now_s - RULES.out_after_s, to_s=now_s)
                    assert now_s >= RULES.out_after_s
                for name in plan.back:
                    assert model.was(name, is_up=True, from_s=now_s - RULES.back_after_s, to_s=now_s)
                if plan.out:
                    assert len(before - up) <= len(before | set(plan.back)) / 3
                assert not model.look(up, now_s).changes_layout
            now_s += 2.0
    touched = [name for _, plan in model.changes for name in (*plan.out, *plan.back)]
    rounds = now_s / (RULES.out_after_s + RULES.back_after_s)
    assert all(touched.count(name) <= 2 * rounds + 2 for name in set(touched))
    # Calm: everybody comes back in the end, in one layout, or in two where some came up so much later than others that
    # they are not waited for: who is up is back after 16 s, and the patience is 10 s.
    changes = len(model.changes)
    for _ in range(30):
        model.look(frozenset(f"node-{number}" for number in range(count)), now_s)
        now_s += 2.0
    assert (len(model.members), model.out) == (count, set())
    assert len(model.changes) - changes <= 2
