"""The layout: the first one forms by itself, every later one by an explicit plan and one compare-and-swap.

Old epochs stay alive, newest first, until repair has moved what they own (DESIGN section 6); so the number of changes
is bounded here rather than the number of living layouts left to grow without one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.bootstrap import Cluster
from holdfast_coordinator.transactions import Outcome
from holdfast_coordinator.view import ClusterState, ClusterView, LayoutSet
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout, LayoutNode, LayoutPlan, plan_layout
from holdfast_core.model.limits import MESSAGE_BYTES_MAX
from holdfast_core.runtime.metadata.store import Absent, Condition, ModRevisionIs, Operation, Put
from holdfast_proto.v1.records_pb2 import NodeRecord

# Every Begin carries all living layouts, 24 KiB each with the default partitions.
LIVING_LAYOUTS_MAX: Final = 32
LIVING_LAYOUTS_BYTES_MAX: Final = MESSAGE_BYTES_MAX // 2


class Layouts:
    """Plans layouts and makes them the newest."""

    def __init__(self, view: ClusterView, cluster: Cluster, *, ledger: Ledger) -> None:
        """Bind to the ledger and to the copy."""
        self._ledger = ledger
        self._view = view
        self._cluster = cluster

    async def form_first(self, entry: Entry) -> None:
        """Make the first layout if there is none and enough nodes have registered; of several callers one succeeds.

        `entry` is of the heartbeat that may have completed their number. Nobody asked for the layout, so the record of
        it names the coordinator, under the same request.
        """
        if self._view.state.layout_set.layouts:
            return
        state = await self._view.fresh()
        if state.layout_set.layouts or len(state.records) < self._cluster.nodes_needed:
            return
        plan = await self._planned(state, ())
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
        await self._make_newest(state.layout_set, plan.layout, own)
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
        _check_room(state.layout_set, plan.layout)
        outcome = await self._make_newest(state.layout_set, plan.layout, entry)
        after = (await self._view.fresh()).layout_set.newest
        if outcome is Outcome.APPLIED:
            return plan.layout
        raise _conflict(previous_epoch, after.epoch if after else 0)

    async def _planned(self, state: ClusterState, remove_node_ids: Sequence[str]) -> LayoutPlan:
        for node_id in remove_node_ids:
            if node_id not in state.records:
                raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no node {node_id} to leave out")
        nodes = layout_nodes(state.records, remove_node_ids)
        replicas = self._cluster.record.replicas
        if len(nodes) < replicas:
            raise HoldfastError(
                ErrorCode.NOT_READY, f"{len(nodes)} nodes cannot keep {replicas} replicas; register more nodes first"
            )
        # Planning many partitions takes a while of pure computing; heartbeats go on meanwhile.
        return await asyncio.to_thread(
            plan_layout,
            state.layout_set.newest,
            nodes,
            replicas,
            seed=self._cluster.record.seed,
            partitions=self._cluster.record.partitions,
        )

    async def _make_newest(self, before: LayoutSet, layout: Layout, entry: Entry) -> Outcome:
        key = keyspace.layout_epoch(layout.epoch)
        entry.details["epoch"] = str(layout.epoch)
        conditions: list[Condition] = [ModRevisionIs(keyspace.LAYOUT_HEAD, before.revision), Absent(key)]
        operations: list[Operation] = [
            Put(keyspace.LAYOUT_HEAD, str(layout.epoch).encode()),
            Put(key, layout.to_message().SerializeToString()),
        ]
        return await self._ledger.apply(entry, conditions, operations)


def _check_room(living: LayoutSet, new: Layout) -> None:
    """Check that a grant still holds all living layouts with one more. Raises LIMIT_EXCEEDED."""
    total = sum(len(layout.owners) for layout in (*living.layouts, new))
    if len(living.layouts) >= LIVING_LAYOUTS_MAX or total > LIVING_LAYOUTS_BYTES_MAX:
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


def layout_nodes(records: Mapping[str, NodeRecord], leave_out: Sequence[str]) -> list[LayoutNode]:
    """Return the registered nodes as a layout knows them, by name. Pure."""
    return [
        LayoutNode(node_id=record.node_id, zone=record.zone, capacity_bytes=record.capacity_bytes)
        for node_id, record in sorted(records.items())
        if node_id not in leave_out
    ]


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
        f"{len(state.records)} of {cluster.nodes_needed} storage nodes have registered; writes begin when all have "
        "and the first layout has formed"
    )


def partitions_without_quorum(layout: Layout, up: frozenset[str]) -> int:
    """Count the partitions of which fewer than a write quorum of owners are up. Pure."""
    if all(node.node_id in up for node in layout.nodes):
        return 0
    quorum = layout.write_quorum
    return sum(
        sum(owner in up for owner in layout.owners_of(partition)) < quorum for partition in range(layout.partitions)
    )
