"""The steward: carries out what `stewardship` plans, and ends layouts that everybody has moved away from.

Every step is one transaction on condition that the layout set is what was planned on and that the stewardship goes on,
so a steward that dies leaves the old state or the new one, and one that does not know yet that it was replaced changes
nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.healing.history import read_history, settle
from holdfast_coordinator.healing.lease import StewardLease
from holdfast_coordinator.healing.members import next_members
from holdfast_coordinator.healing.nodes import store_state
from holdfast_coordinator.healing.stewardship import (
    Sightings,
    StewardRules,
    Stewardship,
    plan_stewardship,
    situation_of,
)
from holdfast_coordinator.layouts import Layouts, has_room
from holdfast_coordinator.records import load
from holdfast_coordinator.transactions import Outcome
from holdfast_coordinator.view import ClusterState, ClusterView
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.logs import get_log
from holdfast_core.runtime.metadata.store import Condition, Delete, MetadataStore, ModRevisionIs, Operation, Put
from holdfast_proto.v1.common_pb2 import NodeState
from holdfast_proto.v1.records_pb2 import GrantRecord

# Layouts that must still find room after one that the steward makes: they are the operator's.
LAYOUTS_RESERVED: Final = 8
_INTERVAL_S: Final = 1.0
_PRINCIPAL: Final = "coordinator"


class Steward:
    """Watches over nodes and layouts: a worker. Does nothing while the lease is somebody else's."""

    def __init__(
        self,
        store: MetadataStore,
        view: ClusterView,
        layouts: Layouts,
        lease: StewardLease,
        *,
        ledger: Ledger,
        rules: StewardRules,
        clock: Clock,
        random_bytes: Callable[[int], bytes],
    ) -> None:
        """Bind to the ledger, and to who makes layouts."""
        self.name = "steward"
        self._store = store
        self._view = view
        self._layouts = layouts
        self._lease = lease
        self._ledger = ledger
        self._rules = rules
        self._clock = clock
        self._random_bytes = random_bytes
        self._sightings = Sightings()
        self._term = 0
        self._held = ""
        self._changes = 0
        self._retirements = 0

    async def step(self) -> float:
        """Look once, and do what is due: at most one change.

        Raises:
            HoldfastError: UNREACHABLE as the store; CONFLICT under contention.
        """
        term = self._lease.term
        if not term or term != self._term:
            # Somebody else may have been looking meanwhile, or nobody: what was seen before counts for nothing.
            self._sightings.clear()
            self._term = term
        if not term:
            return _INTERVAL_S
        # The copy is kept fresh by watches; whether to act is decided on what the store says now.
        plan = self._look(self._view.state)
        if plan.retire or plan.changes_layout:
            state = await self._view.fresh()
            plan = self._look(state)
            if plan.retire:
                await self._retire(state)
            elif plan.changes_layout:
                await self._change(state, plan)
        if plan.held != self._held:
            self._held = plan.held
            if plan.held:
                get_log("steward").warning("the layout stays as it is", why=plan.held)
        return _INTERVAL_S

    def status(self) -> Mapping[str, int]:
        """Return what was done since the start."""
        return {"changes": self._changes, "retirements": self._retirements}

    def _look(self, state: ClusterState) -> Stewardship:
        since_s = self._sightings.look({node.node_id: node.up for node in state.nodes}, self._clock.monotonic_s())
        newest = state.layout_set.newest
        room = newest is not None and has_room(state.layout_set, newest, reserve=LAYOUTS_RESERVED)
        return plan_stewardship(situation_of(state, since_s, has_room=room), self._rules)

    async def _change(self, state: ClusterState, plan: Stewardship) -> None:
        """Make the layout that the plan asks for, with the states of the nodes that it is about."""
        newest = state.layout_set.newest
        changed = await self._changed_states(state, plan)
        if newest is None or changed is None:
            return  # a state has changed since; the next look sees it
        states = {**state.states, **{node_id: after for node_id, after, _ in changed}}
        members = next_members(
            newest, state.records, states, [node_id for node_id in plan.back if not states[node_id].draining]
        )
        conditions: list[Condition] = [ModRevisionIs(keyspace.node_state(name), found) for name, _, found in changed]
        conditions.append(self._lease.still())
        operations = [store_state(node_id, after) for node_id, after, _ in changed]
        entry = self._entry("layout.change", reason=plan.reason)
        if members == newest.nodes:
            conditions.append(ModRevisionIs(keyspace.LAYOUT_HEAD, state.layout_set.revision))
            outcome = await self._ledger.apply(entry, conditions, operations)
        else:
            outcome = await self._layouts.make_newest(
                state.layout_set,
                await self._layouts.plan_over(newest, members),
                entry,
                reason=plan.reason,
                conditions=conditions,
                operations=operations,
            )
        if outcome is Outcome.APPLIED:
            self._changes += 1
            get_log("steward").info("layout changed", why=plan.reason)
        await self._view.fresh()

    async def _changed_states(self, state: ClusterState, plan: Stewardship) -> list[tuple[str, NodeState, int]] | None:
        """Return (node, its state after the change, revision of the present one); None if the copy is behind."""
        changed = []
        for node_id in (*plan.out, *plan.back):
            found = await load(self._store, keyspace.node_state(node_id), NodeState)
            before = NodeState() if found is None else found.message
            if before != state.states[node_id]:
                return None
            after = NodeState()
            after.CopyFrom(before)
            after.out = node_id in plan.out
            changed.append((node_id, after, 0 if found is None else found.mod_revision))
        return changed

    async def _retire(self, state: ClusterState) -> None:
        """End all layouts but the newest, and grant the nodes to let go of what was theirs under those."""
        newest, *older = state.layout_set.layouts
        retired = sorted(layout.epoch for layout in older)
        entry = self._entry("layout.retire", epoch=str(newest.epoch), retired=",".join(map(str, retired)))
        conditions = [ModRevisionIs(keyspace.LAYOUT_HEAD, state.layout_set.revision), self._lease.still()]
        operations: list[Operation] = [
            # Written once more, so that the set has a new revision: commits compare it, and nodes hear of it.
            Put(keyspace.LAYOUT_HEAD, str(newest.epoch).encode()),
            Put(
                keyspace.LAYOUT_GRANT,
                GrantRecord(epoch=newest.epoch, retired_epochs=retired).SerializeToString(),
            ),
            *(Delete(keyspace.layout_epoch(epoch)) for epoch in retired),
            # An account is written only together with the layout set, which the condition holds still.
            *settle(await read_history(self._store), newest.epoch, now_unix_ms=self._clock.now_unix_ms()),
        ]
        if await self._ledger.apply(entry, conditions, operations) is Outcome.APPLIED:
            self._retirements += 1
            get_log("steward").info("layout settled", epoch=newest.epoch, retired=retired)
        await self._view.fresh()

    def _entry(self, action: str, **details: str) -> Entry:
        entry_id = self._random_bytes(8).hex()
        return Entry(
            principal=_PRINCIPAL,
            tenant="",
            action=action,
            resource="cluster",
            request_id=entry_id,
            entry_id=entry_id,
            details=details,
        )
