"""ClusterService: the gRPC shell around membership and layout. Decides nothing itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, TypeAlias

import grpc.aio

from holdfast_coordinator import keyspace
from holdfast_coordinator.access.call import Call, current_call
from holdfast_coordinator.bootstrap import Cluster
from holdfast_coordinator.grants import without_counters
from holdfast_coordinator.healing.heartbeats import Heartbeats
from holdfast_coordinator.layouts import Layouts, partitions_without_quorum, waiting_for_nodes
from holdfast_coordinator.membership import check_speaks_for, of_node
from holdfast_coordinator.records import count, each, parse
from holdfast_coordinator.view import ClusterState, ClusterView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import split_ids
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
        heartbeats: Heartbeats,
        layouts: Layouts,
    ) -> None:
        """Bind to the logic."""
        self._store = store
        self._cluster = cluster
        self._view = view
        self._heartbeats = heartbeats
        self._layouts = layouts

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
        plan = await self._layouts.plan(request.remove_node_ids)
        return pb.PlanLayoutResponse(
            layout=plan.layout.to_message(),
            previous_epoch=plan.previous_epoch,
            slots_moved=plan.slots_moved,
            slots_total=plan.slots_total,
            explanation=plan.explanation,
        )

    async def ApplyLayout(self, request: pb.ApplyLayoutRequest, context: Context) -> pb.ApplyLayoutResponse:
        """Apply the plan by one compare-and-swap on the epoch."""
        call = current_call()
        call.require(_CLUSTER)
        layout = await self._layouts.apply(request.previous_epoch, request.remove_node_ids, call.entry)
        return pb.ApplyLayoutResponse(layout=layout.to_message())

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
        sentence = self._sentence(state)
        space = call.of.space
        return pb.GetClusterStatusResponse(
            cluster_id=self._cluster.record.cluster_id,
            state=sentence,
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

    def _sentence(self, state: ClusterState) -> str:
        """Say in one sentence how the cluster stands; "ready" if there is nothing to say."""
        layout = state.layout_set.newest
        if layout is None:
            return waiting_for_nodes(state, self._cluster)
        down = sorted({node.node_id for node in layout.nodes} - state.up)
        without = partitions_without_quorum(layout, state.up)
        if without:
            return (
                f"{without} of {layout.partitions} partitions have fewer than {layout.write_quorum} owners up; writes "
                f"there wait for {', '.join(down)}"
            )
        return "ready"


def shown_nodes(call: Call, state: ClusterState) -> Sequence[NodeStatus]:
    """Return the nodes as this caller may see them: what they hold is told to those who may read of all tenants."""
    if call.allows_everywhere(call.permission, ""):
        return state.nodes
    return [without_counters(node) for node in state.nodes]
