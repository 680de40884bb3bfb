"""The layout: the first one forms by itself; every later one is a plan and one compare-and-swap on the whole set.

Old epochs stay alive, newest first, until all that they held is where the newest one wants it (docs/healing.md).
Who gives a layout its nodes is `healing.members`'s business; who asks for one is the operator, a change of a node's
state, or the steward.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Final, TypeAlias

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.bootstrap import Cluster
from holdfast_coordinator.healing.history import layout_change, record_change
from holdfast_coordinator.healing.members import all_members, is_left_out
from holdfast_coordinator.transactions import Outcome
from holdfast_coordinator.view import ClusterState, ClusterView, LayoutSet
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout, LayoutNode, LayoutPlan, plan_layout
from holdfast_core.model.limits import MESSAGE_BYTES_MAX
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import Absent, Condition, ModRevisionIs, Operation, Put

# Every Begin carries all living layouts, 24 KiB each with the default partitions.
LIVING_LAYOUTS_MAX: Final = 32
LIVING_LAYOUTS_BYTES_MAX: Final = MESSAGE_BYTES_MAX // 2

Computing: TypeAlias = Callable[[Callable[[], LayoutPlan]], Awaitable[LayoutPlan]]
"""Runs a computation that takes a while, beside the event loop."""


class Layouts:
    """Plans layouts and makes them the newest."""

    def __init__(
        self,
        view: ClusterView,
        cluster: Cluster,
        *,
        ledger: Ledger,
        clock: Clock,
        computing: Computing = asyncio.to_thread,
    ) -> None:
        """Bind to the ledger and to the copy."""
        self._ledger = ledger
        self._view = view
        self._cluster = cluster
        self._clock = clock
        self._computing = computing
        self._forming = asyncio.Lock()

    async def form_first(self, entry: Entry) -> None:
        """Make the first layout if there is none and enough nodes have registered; of several callers one succeeds.

        `entry` is of the heartbeat that may have completed their number. Nobody asked for the layout, so the record of
        it names the coordinator, under the same request.
        """
        if self._view.state.layout_set.layouts:
            return
        # Every node's heartbeat comes by here, and planning keeps a processor busy for a while.
        async with self._forming:
            await self._form(entry)

    async def _form(self, entry: Entry) -> None:
        state = await self._view.fresh()
        members = all_members(state.records, state.states)
        if state.layout_set.layouts or len(members) < self._cluster.nodes_needed:
            return
        plan = await self.plan_over(None, members)
        own = replace(
            entry,
            principal="coordinator",
            tenant="",
            action="layout.form",
            resource="cluster",
            # The heartbeat's own record may stand beside it; no two records share an id.
            entry_id=f"{int(entry.entry_id, 16) ^ 1:016x}",
            details={},
            written=False,
        )
        await self.make_newest(state.layout_set, plan, own, reason="first layout")
        await self._view.fresh()

    async def plan(self, remove_node_ids: Sequence[str]) -> LayoutPlan:
        """Return what the next layout would be with the nodes that are registered, less those to leave out.

        Raises:
            HoldfastError: NOT_FOUND for an unknown name; NOT_READY if too few nodes are left.
        """
        return await self._planned(await self._view.fresh(), remove_node_ids)

    async def apply(self, previous_epoch: int, remove_node_ids: Sequence[str], entry: Entry) -> Layout:
        """Make the plan the newest layout and return it; a plan that changes nothing returns the present one.

        Raises:
            HoldfastError: as `plan`; CONFLICT if the newest epoch is not `previous_epoch` (any more); LIMIT_EXCEEDED
                if too many old epochs are alive.
        """
        state = await self._view.fresh()
        newest = state.layout_set.newest
        epoch = newest.epoch if newest else 0
        if epoch != previous_epoch:
            raise _conflict(previous_epoch, epoch)
        plan = await self._planned(state, remove_node_ids)
        if newest and plan.layout.nodes == newest.nodes and plan.layout.owners == newest.owners:
            entry.repeated()
            return newest
        check_room(state.layout_set, plan.layout)
        outcome = await self.make_newest(state.layout_set, plan, entry, reason="operator")
        after = (await self._view.fresh()).layout_set.newest
        if outcome is Outcome.APPLIED:
            return plan.layout
        raise _conflict(previous_epoch, after.epoch if after else 0)

    async def plan_over(self, newest: Layout | None, members: Sequence[LayoutNode]) -> LayoutPlan:
        """Return the plan of the layout over exactly these nodes.

        Raises:
            HoldfastError: NOT_READY if they are too few.
        """
        record = self._cluster.record
        if len(members) < record.replicas:
            raise HoldfastError(
                ErrorCode.NOT_READY,
                f"{len(members)} nodes cannot keep {record.replicas} replicas; register more nodes first",
            )
        # Planning many partitions takes a while of pure computing; heartbeats go on meanwhile.
        return await self._computing(
            lambda: plan_layout(newest, members, record.replicas, seed=record.seed, partitions=record.partitions)
        )

    async def make_newest(
        self,
        before: LayoutSet,
        plan: LayoutPlan,
        entry: Entry,
        *,
        reason: str,
        conditions: Sequence[Condition] = (),
        operations: Sequence[Operation] = (),
    ) -> Outcome:
        """Make a plan the newest layout, on condition that the layout set is `before`, with all that goes with it."""
        entry.details["epoch"] = str(plan.layout.epoch)
        change = layout_change(before.newest, plan, reason=reason, now_unix_ms=self._clock.now_unix_ms())
        key = keyspace.layout_epoch(plan.layout.epoch)
        return await self._ledger.apply(
            entry,
            [ModRevisionIs(keyspace.LAYOUT_HEAD, before.revision), Absent(key), *conditions],
            [
                Put(keyspace.LAYOUT_HEAD, str(plan.layout.epoch).encode()),
                Put(key, plan.layout.to_message().SerializeToString()),
                *record_change(change),
                *operations,
            ],
        )

    async def _planned(self, state: ClusterState, remove_node_ids: Sequence[str]) -> LayoutPlan:
        for node_id in remove_node_ids:
            if node_id not in state.records:
                raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no node {node_id} to leave out")
        states = state.states
        plan = await self.plan_over(
            state.layout_set.newest, all_members(state.records, states, leave_out=remove_node_ids)
        )
        left_out = [
            f"{node_id} is {'draining' if decided.draining else 'out'} and owns nothing"
            for node_id, decided in sorted(states.items())
            if is_left_out(decided) and node_id not in remove_node_ids
        ]
        return replace(plan, explanation=(*plan.explanation, *left_out))


def has_room(living: LayoutSet, new: Layout, *, reserve: int = 0) -> bool:
    """Return whether a grant still holds all living layouts with one more, and `reserve` others after it. Pure."""
    total = sum(len(layout.owners) for layout in living.layouts) + len(new.owners) * (1 + reserve)
    return len(living.layouts) + reserve < LIVING_LAYOUTS_MAX and total <= LIVING_LAYOUTS_BYTES_MAX


def check_room(living: LayoutSet, new: Layout) -> None:
    """Check that one more layout may live.

    Raises:
        HoldfastError: LIMIT_EXCEEDED.
    """
    if not has_room(living, new):
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED,
            f"{len(living.layouts)} layouts are alive, as many as allowed; old ones must settle first",
        )


def _conflict(previous_epoch: int, epoch: int) -> HoldfastError:
    return HoldfastError(
        ErrorCode.CONFLICT,
        f"the newest layout has epoch {epoch}, the plan starts from {previous_epoch}; plan again and look at it",
        facts={"epoch": str(epoch)},
    )


def check_accepts_writes(state: ClusterState, cluster: Cluster) -> None:
    """Check that a session may begin: there is a layout, with as many nodes as there are replicas.

    Raises:
        HoldfastError: NOT_READY, saying what is waited for.
    """
    newest = state.layout_set.newest
    if newest is None:
        raise HoldfastError(ErrorCode.NOT_READY, waiting_for_nodes(state, cluster))
    if len(newest.nodes) < newest.replicas:
        raise HoldfastError(
            ErrorCode.NOT_READY, f"the layout has {len(newest.nodes)} nodes for {newest.replicas} replicas; add nodes"
        )


def waiting_for_nodes(state: ClusterState, cluster: Cluster) -> str:
    """Say in one sentence what the first layout waits for. Pure."""
    return (
        f"{len(all_members(state.records, state.states))} of {cluster.nodes_needed} storage nodes have registered; "
        "writes begin when all have and the first layout has formed"
    )


def partitions_without_quorum(layout: Layout, up: frozenset[str]) -> int:
    """Count the partitions of which fewer than a write quorum of owners are up. Pure."""
    if all(node.node_id in up for node in layout.nodes):
        return 0
    quorum = layout.write_quorum
    return sum(
        sum(owner in up for owner in layout.owners_of(partition)) < quorum for partition in range(layout.partitions)
    )
