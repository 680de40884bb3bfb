"""What an operator decides of a node: draining, weight, removal.

A decision and the layout that follows from it are one transaction, so no crash leaves one without the other.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.healing.members import next_members
from holdfast_coordinator.healing.removal import why_not_removed
from holdfast_coordinator.layouts import Layouts, check_room
from holdfast_coordinator.records import load
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_coordinator.view import ClusterState, ClusterView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout, LayoutNode, LayoutPlan
from holdfast_core.runtime.metadata.store import (
    Absent,
    Condition,
    Delete,
    Exists,
    MetadataStore,
    ModRevisionIs,
    Operation,
    Put,
)
from holdfast_proto.v1.common_pb2 import NodeState, NodeStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeChange:
    """What is to be different about a node; None leaves it as it is.

    Attributes:
        draining: whether it owns nothing in new layouts from now on.
        weight_bytes: weight in new layouts; 0 for the capacity that it reports.
    """

    draining: bool | None = None
    weight_bytes: int | None = None

    def applied_to(self, before: NodeState) -> NodeState:
        """Return the node's state after the change."""
        return NodeState(
            draining=before.draining if self.draining is None else self.draining,
            weight_bytes=before.weight_bytes if self.weight_bytes is None else self.weight_bytes,
            out=before.out,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """What a change came to: the plan (None before the first layout), and whether a new layout was made."""

    plan: LayoutPlan | None
    applied: bool


@dataclass(frozen=True, slots=True)
class _Step:
    """A node's state before and after a change, and the revision that it was read at (0 for none stored)."""

    node_id: str
    before: NodeState
    after: NodeState
    revision: int

    @property
    def reason(self) -> str:
        """Why the layout changes."""
        if self.before.draining != self.after.draining:
            return f"{self.node_id} {'drained' if self.after.draining else 'undrained'}"
        return f"weight of {self.node_id}"


class Nodes:
    """Carries out what operators decide of nodes."""

    def __init__(self, store: MetadataStore, view: ClusterView, layouts: Layouts, *, ledger: Ledger) -> None:
        """Bind to the ledger, and to who makes layouts."""
        self._store = store
        self._view = view
        self._layouts = layouts
        self._ledger = ledger

    async def change(self, node_id: str, change: NodeChange, entry: Entry, *, dry_run: bool = False) -> Decision:
        """Change a node's state, and the layout with it where that makes a difference.

        Raises:
            HoldfastError: NOT_FOUND; NOT_READY if too few nodes would be left; LIMIT_EXCEEDED if too many old layouts
                are alive; CONFLICT under contention.
        """
        for _ in range(ATTEMPTS_MAX):
            # Read before the view: what the view then shows is this or newer, and if it is newer the condition fails.
            found = await load(self._store, keyspace.node_state(node_id), NodeState)
            state = await self._view.fresh()
            if node_id not in state.records:
                raise _unknown(node_id)
            before = NodeState() if found is None else found.message
            step = _Step(node_id, before, change.applied_to(before), 0 if found is None else found.mod_revision)
            plan = await self._plan(state, step)
            newest = state.layout_set.newest
            moves = plan is not None and newest is not None and plan.layout.epoch != newest.epoch
            if dry_run:
                entry.details["dry_run"] = "yes"
                return Decision(plan, applied=False)
            if step.before == step.after and not moves:
                entry.repeated()
                return Decision(plan, applied=False)
            outcome = await self._apply(state, step, plan if moves else None, entry)
            if outcome is Outcome.APPLIED:
                await self._view.fresh()
                return Decision(plan, applied=moves)
        raise contention(f"the change of {node_id}")

    async def remove(self, node_id: str, entry: Entry, *, lost: bool = False) -> None:
        """End a node's membership.

        Raises:
            HoldfastError: NOT_FOUND; NOT_READY, saying what has to happen first; CONFLICT under contention.
        """
        for _ in range(ATTEMPTS_MAX):
            record = await self._store.get(keyspace.node_record(node_id))
            said = await load(self._store, keyspace.node_status(node_id), NodeStatus)
            state = await self._view.fresh()
            if record is None or node_id not in state.records:
                raise _unknown(node_id)
            if why := why_not_removed(state, node_id, lost=lost):
                raise HoldfastError(ErrorCode.NOT_READY, why)
            status_key = keyspace.node_status(node_id)
            conditions: list[Condition] = [
                ModRevisionIs(record.key, record.mod_revision),
                ModRevisionIs(status_key, 0 if said is None else said.mod_revision),
                Absent(keyspace.node_lease(node_id)),
                ModRevisionIs(keyspace.LAYOUT_HEAD, state.layout_set.revision),
            ]
            operations: list[Operation] = [
                Delete(record.key),
                Delete(status_key),
                Delete(keyspace.node_state(node_id)),
            ]
            if lost:
                entry.details["lost"] = "yes"
            if await self._ledger.apply(entry, conditions, operations) is Outcome.APPLIED:
                await self._view.fresh()
                return
        raise contention(f"the removal of {node_id}")

    async def _plan(self, state: ClusterState, step: _Step) -> LayoutPlan | None:
        """Return the layout that follows, the newest one where none does; None before the first."""
        newest = state.layout_set.newest
        if newest is None:
            return None
        members = _members(newest, state, step)
        if members == newest.nodes:
            slots = newest.partitions * newest.replicas
            return LayoutPlan(newest, newest.epoch, 0, slots, ("the layout stays as it is",))
        return await self._layouts.plan_over(newest, members)

    async def _apply(self, state: ClusterState, step: _Step, plan: LayoutPlan | None, entry: Entry) -> Outcome:
        key = keyspace.node_state(step.node_id)
        conditions: list[Condition] = [
            ModRevisionIs(key, step.revision),
            Exists(keyspace.node_record(step.node_id)),
        ]
        operations = [store_state(step.node_id, step.after)]
        entry.details["draining"] = "yes" if step.after.draining else "no"
        entry.details["weight_bytes"] = str(step.after.weight_bytes)
        if plan is None:
            # The layout that this was judged by may not change either, or it could take in what is drained here.
            conditions.append(ModRevisionIs(keyspace.LAYOUT_HEAD, state.layout_set.revision))
            return await self._ledger.apply(entry, conditions, operations)
        check_room(state.layout_set, plan.layout)
        return await self._layouts.make_newest(
            state.layout_set, plan, entry, reason=step.reason, conditions=conditions, operations=operations
        )


def _members(newest: Layout, state: ClusterState, step: _Step) -> tuple[LayoutNode, ...]:
    states = {**state.states, step.node_id: step.after}
    is_member = any(node.node_id == step.node_id for node in newest.nodes)
    comes_back = step.before.draining and not step.after.draining
    reweighed = step.before.weight_bytes != step.after.weight_bytes and is_member
    return next_members(newest, state.records, states, [step.node_id] if comes_back or reweighed else [])


def store_state(node_id: str, state: NodeState) -> Operation:
    """Return what writes a node's state; one that says nothing has no key. Pure."""
    key = keyspace.node_state(node_id)
    return Delete(key) if state == NodeState() else Put(key, state.SerializeToString())


def _unknown(node_id: str) -> HoldfastError:
    return HoldfastError(ErrorCode.NOT_FOUND, f"there is no node {node_id}; `holdfast nodes` lists them")
