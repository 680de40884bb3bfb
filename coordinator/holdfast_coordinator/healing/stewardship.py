"""What a steward does about nodes and layouts, given what it sees. Pure: a situation in, a plan out.

It changes the layout as seldom as it can: all that is due goes into one change, what is about to be due is waited for a
little while, and where it is the network that failed nothing is moved at all. Whoever goes out has been down for
`out_after_s` without a break, and whoever comes back has been up for `back_after_s`, so no node can make more than two
changes in the sum of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from holdfast_coordinator.healing.members import is_left_out, names
from holdfast_coordinator.view import ClusterState
from holdfast_core.model.limits import NODES_DOWN_FRACTION_MAX
from holdfast_proto.v1.common_pb2 import NodeState

# Each node of a change takes a condition and an operation of its transaction, which has 128 of each.
NODES_PER_CHANGE_MAX: Final = 40
# How much longer a node that is due waits for others that are nearly so: those that fell together go out together.
TOGETHER_S: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StewardRules:
    """When a steward acts.

    Attributes:
        replicas: owners a partition has; no layout gets fewer nodes.
        out_after_s: time that a node is down before it is left out.
        back_after_s: time that a node which was left out is up before it is taken back.
        together_s: how much longer a node that is due waits for others.
        down_fraction_max: share of the layout's nodes that may be down for one of them to be left out.
    """

    replicas: int
    out_after_s: float
    back_after_s: float
    together_s: float = TOGETHER_S
    down_fraction_max: float = NODES_DOWN_FRACTION_MAX


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """A registered node as the steward sees it.

    Attributes:
        node_id: its name.
        member: whether the newest layout has it.
        up: whether its lease lives.
        since_s: for how long the steward has seen it so, without a break.
        state: what is decided of it.
        weight_bytes: its weight in the newest layout, 0 where it is not in it.
        synced_epoch: newest layout of which it says that it holds all that it has to.
    """

    node_id: str
    member: bool
    up: bool
    since_s: float
    state: NodeState
    weight_bytes: int = 0
    synced_epoch: int = 0

    @property
    def misplaced(self) -> bool:
        """Whether the newest layout has it other than its state says."""
        if not self.member:
            return False
        return is_left_out(self.state) or self.state.weight_bytes not in (0, self.weight_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the steward sees.

    Attributes:
        epoch: newest layout; 0 before the first.
        living: how many layouts are alive.
        has_room: whether another one may be made by itself.
        nodes: all registered nodes.
    """

    epoch: int
    living: int
    has_room: bool
    nodes: tuple[Sighting, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stewardship:
    """What is to be done now.

    Attributes:
        out: nodes to leave out.
        back: nodes to take back.
        converge: whether the layout has to follow decisions that it does not show yet.
        retire: whether the older layouts end.
        held: why something that is due is not done, for people; "" if nothing is held.
    """

    out: tuple[str, ...] = ()
    back: tuple[str, ...] = ()
    converge: bool = False
    retire: bool = False
    held: str = ""

    @property
    def changes_layout(self) -> bool:
        """Whether there is anything to do about nodes."""
        return bool(self.out or self.back or self.converge)

    @property
    def reason(self) -> str:
        """Why the layout changes, a phrase."""
        parts = [f"{names(self.out)} out"] if self.out else []
        parts += [f"{names(self.back)} back"] if self.back else []
        return " and ".join(parts) or "as decided of its nodes"


def plan_stewardship(situation: Situation, rules: StewardRules) -> Stewardship:
    """Return what is to be done in this situation: an end of older layouts comes before a new one."""
    members = [node for node in situation.nodes if node.member]
    if not members:
        return Stewardship()
    if situation.living > 1 and all(node.synced_epoch >= situation.epoch for node in members):
        return Stewardship(retire=True)
    back = _back(situation.nodes, rules)
    misplaced = [node for node in members if node.misplaced and node.node_id not in back]
    leaving = sum(is_left_out(node.state) for node in misplaced)
    joining = sum(not node.member and not node.state.draining for node in situation.nodes if node.node_id in back)
    spare = len(members) + joining - leaving - rules.replicas
    if spare < 0:
        needed = names([node.node_id for node in misplaced])
        return Stewardship(held=f"{needed} needed: without, fewer than {rules.replicas} nodes would remain")
    out, held = _out(members, rules, joining=joining, spare=spare)
    if not (out or back or misplaced):
        return Stewardship(held=held)
    if not situation.has_room:
        return Stewardship(held=f"{situation.living} layouts are alive; the next change waits until they settle")
    return Stewardship(out=out, back=back, converge=bool(misplaced), held=held)


def _out(members: list[Sighting], rules: StewardRules, *, joining: int, spare: int) -> tuple[tuple[str, ...], str]:
    """Return which members to leave out, at most `spare` of them, and why others that are due are not."""
    down = [node for node in members if not node.up]
    leaving = [node for node in down if not is_left_out(node.state)]
    due = [node for node in leaving if node.since_s >= rules.out_after_s]
    if not due:
        return (), ""
    # Those that come back at this moment count: without, they would make a layout of their own, and this the next.
    counted = len(members) + joining
    if len(down) / counted > rules.down_fraction_max:
        return (), f"{len(down)} of {counted} nodes are down, which looks like the network; no node is left out"
    if _wait_for_others(leaving, rules.out_after_s, rules.together_s):
        return (), ""
    due.sort(key=lambda node: (-node.since_s, node.node_id))
    out = [node.node_id for node in due[: min(spare, NODES_PER_CHANGE_MAX)]]
    kept = [node.node_id for node in due[spare:]]
    held = f"{names(kept)} not left out: fewer than {rules.replicas} nodes would remain" if kept else ""
    return tuple(sorted(out)), held


def _back(nodes: Iterable[Sighting], rules: StewardRules) -> tuple[str, ...]:
    """Return which nodes that were left out to take back."""
    up = [node for node in nodes if node.state.out and node.up]
    if _wait_for_others(up, rules.back_after_s, rules.together_s):
        return ()
    due = [node.node_id for node in up if node.since_s >= rules.back_after_s]
    return tuple(sorted(due)[:NODES_PER_CHANGE_MAX])


def _wait_for_others(nodes: Iterable[Sighting], after_s: float, together_s: float) -> bool:
    """Return whether some are due and others soon will be; nobody waits for longer than `together_s`."""
    since = [node.since_s for node in nodes]
    if any(each >= after_s + together_s for each in since):
        return False
    return any(each >= after_s for each in since) and any(after_s - together_s < each < after_s for each in since)


class Sightings:
    """For how long each node has been up or down, by the steward's own monotonic clock. Belongs to one stewardship."""

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self._seen: dict[str, tuple[bool, float]] = {}

    def clear(self) -> None:
        """Forget everything: somebody else may have been looking."""
        self._seen.clear()

    def look(self, up: Mapping[str, bool], now_s: float) -> dict[str, float]:
        """Take in which nodes are up now; return for how many seconds each has been seen as it is."""
        seen = {}
        for node_id, is_up in up.items():
            was_up, _ = before = self._seen.get(node_id, (not is_up, 0.0))
            seen[node_id] = before if was_up == is_up else (is_up, now_s)
        self._seen = seen
        return {node_id: now_s - since_s for node_id, (_, since_s) in seen.items()}


def situation_of(state: ClusterState, since_s: Mapping[str, float], *, has_room: bool) -> Situation:
    """Return what a steward sees in the cluster's state and in how long its nodes have been as they are."""
    newest = state.layout_set.newest
    weights = {node.node_id: node.capacity_bytes for node in newest.nodes} if newest else {}
    return Situation(
        epoch=newest.epoch if newest else 0,
        living=len(state.layout_set.layouts),
        has_room=has_room,
        nodes=tuple(
            Sighting(
                node_id=node.node_id,
                member=node.node_id in weights,
                up=node.up,
                since_s=since_s[node.node_id],
                state=node.state,
                weight_bytes=weights.get(node.node_id, 0),
                synced_epoch=node.healing.synced_epoch,
            )
            for node in state.nodes
        ),
    )
