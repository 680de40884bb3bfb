"""ClusterService: the gRPC shell around membership and layout. Decides nothing itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, TypeAlias

import grpc.aio

from holdfast_coordinator import keyspace
from holdfast_coordinator.access.call import Call, current_call
from holdfast_coordinator.bootstrap import Cluster
from holdfast_coordinator.grants import without_counters
from holdfast_coordinator.healing.condition import condition_of
from holdfast_coordinator.healing.history import read_history
from holdfast_coordinator.healing.nodes import NodeChange
from holdfast_coordinator.healing.parts import HealingParts
from holdfast_coordinator.layouts import partitions_without_quorum, waiting_for_nodes
from holdfast_coordinator.membership import check_speaks_for, of_node
from holdfast_coordinator.records import count, each, parse
from holdfast_coordinator.view import ClusterState, ClusterView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import LayoutPlan
from holdfast_core.model.names import check_name, split_ids
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1 import cluster_pb2 as pb
from holdfast_proto.v1.cluster_pb2_grpc import ClusterServiceServicer
from holdfast_proto.v1.common_pb2 import NodeStatus
from holdfast_proto.v1.records_pb2 import PointRecord

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

LOCATED_IDS_MAX: Final = 4096
_CLUSTER: Final = "cluster"


class ClusterService(ClusterServiceServicer):
    """Membership and layout of the cluster."""

    def __init__(
        self,
        store: MetadataStore,
        cluster: Cluster,
        view: ClusterView,
        healing: HealingParts,
    ) -> None:
        """Bind to the logic."""
        self._store = store
        self._cluster = cluster
        self._view = view
        self._heartbeats = healing.heartbeats
        self._layouts = healing.layouts
        self._nodes = healing.nodes

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        """Register a node and keep its lease; the node that completes the first layout's number makes it form."""
        call = current_call()
        call.require(of_node(request.status.node_id))
        check_speaks_for(call.principal, request.status.node_id)
        return await self._heartbeats.take(request, call.entry)

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:
        """List nodes."""
        call = current_call()
        call.filtered(_CLUSTER)
        return pb.ListNodesResponse(nodes=shown_nodes(call, await self._view.fresh()))

    async def GetLayout(self, request: pb.GetLayoutRequest, context: Context) -> pb.GetLayoutResponse:
        """Return the living layouts."""
        current_call().filtered(_CLUSTER)
        state = await self._view.fresh()
        return pb.GetLayoutResponse(
            layouts=state.layout_set.messages,
            nodes_expected=self._cluster.nodes_needed,
            nodes_registered=len(state.records),
        )

    async def PlanLayout(self, request: pb.PlanLayoutRequest, context: Context) -> pb.PlanLayoutResponse:
        """Compute the next layout; change nothing."""
        current_call().require(_CLUSTER)
        return plan_message(await self._layouts.plan(request.remove_node_ids))

    async def ApplyLayout(self, request: pb.ApplyLayoutRequest, context: Context) -> pb.ApplyLayoutResponse:
        """Apply the plan by one compare-and-swap on the epoch."""
        call = current_call()
        call.require(_CLUSTER)
        layout = await self._layouts.apply(request.previous_epoch, request.remove_node_ids, call.entry)
        return pb.ApplyLayoutResponse(layout=layout.to_message())

    async def SetNode(self, request: pb.SetNodeRequest, context: Context) -> pb.SetNodeResponse:
        """Drain a node, take it back, or change its weight."""
        call = current_call()
        node_id = check_name(request.node_id, "node name")
        call.require(of_node(node_id))
        change = NodeChange(
            draining=request.draining if request.HasField("draining") else None,
            weight_bytes=request.weight_bytes if request.HasField("weight_bytes") else None,
        )
        if change == NodeChange():
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "say what to change: whether it drains, or its weight")
        decision = await self._nodes.change(node_id, change, call.entry, dry_run=request.dry_run)
        return pb.SetNodeResponse(
            plan=None if decision.plan is None else plan_message(decision.plan), applied=decision.applied
        )

    async def RemoveNode(self, request: pb.RemoveNodeRequest, context: Context) -> pb.RemoveNodeResponse:
        """Remove a node that owns nothing."""
        call = current_call()
        node_id = check_name(request.node_id, "node name")
        call.require(of_node(node_id))
        await self._nodes.remove(node_id, call.entry, lost=request.lost)
        return pb.RemoveNodeResponse()

    async def GetLayoutHistory(
        self, request: pb.GetLayoutHistoryRequest, context: Context
    ) -> pb.GetLayoutHistoryResponse:
        """Say how layouts followed one another."""
        current_call().filtered(_CLUSTER)
        return pb.GetLayoutHistoryResponse(changes=await read_history(self._store))

    async def WatchCluster(
        self, request: pb.WatchClusterRequest, context: Context
    ) -> AsyncIterator[pb.WatchClusterResponse]:
        """Stream layouts and nodes, first as they are, then as they change."""
        call = current_call()
        call.filtered(_CLUSTER)
        await self._view.fresh()
        async for state in self._view.changes():
            # A watch outlives what its caller was allowed when it began.
            if not call.may(call.permission, ""):
                raise HoldfastError(ErrorCode.DENIED, f"{call.principal} does not hold {call.permission} any more")
            yield pb.WatchClusterResponse(layouts=state.layout_set.messages, nodes=shown_nodes(call, state))

    async def Locate(self, request: pb.LocateRequest, context: Context) -> pb.LocateResponse:
        """Say which nodes own given blocks."""
        current_call().filtered(_CLUSTER)
        block_ids = split_ids(request.block_ids)
        if len(block_ids) > LOCATED_IDS_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED,
                f"{len(block_ids)} ids are too many to locate at once; {LOCATED_IDS_MAX} at most",
            )
        state = await self._view.fresh()
        layout = state.layout_set.newest
        if layout is None:
            raise HoldfastError(ErrorCode.NOT_READY, waiting_for_nodes(state, self._cluster))
        return pb.LocateResponse(
            locations=[
                pb.LocateResponse.Location(
                    partition=layout.partition_of(block_id), node_ids=layout.owners_of_block(block_id)
                )
                for block_id in block_ids
            ]
        )

    async def GetClusterStatus(
        self, request: pb.GetClusterStatusRequest, context: Context
    ) -> pb.GetClusterStatusResponse:
        """Sum the cluster up, and count what the call's tenant has."""
        call = current_call()
        call.filtered(_CLUSTER)
        state = await self._view.fresh()
        newest = state.layout_set.newest
        space = call.of.space
        return pb.GetClusterStatusResponse(
            cluster_id=self._cluster.record.cluster_id,
            state=condition_of(state, self._cluster),
            writable=newest is not None and not partitions_without_quorum(newest, state.up),
            layout_epoch=newest.epoch if newest else 0,
            replicas=self._cluster.record.replicas,
            nodes=shown_nodes(call, state),
            vm_count=await count(self._store, space.vms_prefix),
            point_count=await self._living_points(space),
            object_count=await count(self._store, space.object_ids_prefix),
            session_count=await count(self._store, space.sessions_prefix),
        )

    async def _living_points(self, space: keyspace.TenantKeyspace) -> int:
        living = 0
        async for item in each(self._store, space.points_prefix):
            living += not parse(item, PointRecord).message.forgotten
        return living


def plan_message(plan: LayoutPlan) -> pb.PlanLayoutResponse:
    """Return a plan as it travels. Pure."""
    return pb.PlanLayoutResponse(
        layout=plan.layout.to_message(),
        previous_epoch=plan.previous_epoch,
        slots_moved=plan.slots_moved,
        slots_total=plan.slots_total,
        explanation=plan.explanation,
    )


def shown_nodes(call: Call, state: ClusterState) -> Sequence[NodeStatus]:
    """Return the nodes as this caller may see them: what they hold is told to those who may read of all tenants."""
    if call.allows_everywhere(call.permission, ""):
        return state.nodes
    return [without_counters(node) for node in state.nodes]
