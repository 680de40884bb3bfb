"""ClusterService: the gRPC shell around membership and layout. Decides nothing itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Final, TypeAlias

import grpc.aio

from holdfast_coordinator import keyspace
from holdfast_coordinator.access.call import current_call
from holdfast_coordinator.bootstrap import Cluster
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.layouts import Layouts, partitions_without_quorum, waiting_for_nodes
from holdfast_coordinator.membership import Membership
from holdfast_coordinator.records import count, each, parse
from holdfast_coordinator.view import ClusterState, ClusterView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import HEARTBEAT_INTERVAL_S
from holdfast_core.model.names import split_ids
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1 import cluster_pb2 as pb
from holdfast_proto.v1.cluster_pb2_grpc import ClusterServiceServicer
from holdfast_proto.v1.records_pb2 import PointRecord

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

LOCATED_IDS_MAX: Final = 4096


class ClusterService(ClusterServiceServicer):
    """Membership and layout of the cluster."""

    def __init__(
        self,
        store: MetadataStore,
        cluster: Cluster,
        chain: KeyChain,
        view: ClusterView,
        membership: Membership,
        layouts: Layouts,
        *,
        heartbeat_interval_s: float = HEARTBEAT_INTERVAL_S,
    ) -> None:
        """Bind to the logic."""
        self._store = store
        self._cluster = cluster
        self._chain = chain
        self._view = view
        self._membership = membership
        self._layouts = layouts
        self._interval_ms = int(heartbeat_interval_s * 1000)

    async def Heartbeat(self, request: pb.HeartbeatRequest, context: Context) -> pb.HeartbeatResponse:
        """Register a node and keep its lease; the node that completes the first layout's number makes it form."""
        lease_id = await self._membership.heartbeat(
            request.status, lease_id=request.lease_id, incarnation=request.incarnation
        )
        await self._layouts.form_first()
        messages = self._view.state.layout_set.messages
        return pb.HeartbeatResponse(
            lease_id=lease_id,
            interval_ms=self._interval_ms,
            layout=messages[0] if messages else None,
            verifying_keys=self._chain.verifying_keys(),
            cluster_id=self._cluster.record.cluster_id,
        )

    async def ListNodes(self, request: pb.ListNodesRequest, context: Context) -> pb.ListNodesResponse:
        """List nodes."""
        return pb.ListNodesResponse(nodes=(await self._view.fresh()).nodes)

    async def GetLayout(self, request: pb.GetLayoutRequest, context: Context) -> pb.GetLayoutResponse:
        """Return the living layouts."""
        state = await self._view.fresh()
        return pb.GetLayoutResponse(
            layouts=state.layout_set.messages,
            nodes_expected=self._cluster.nodes_needed,
            nodes_registered=len(state.records),
        )

    async def PlanLayout(self, request: pb.PlanLayoutRequest, context: Context) -> pb.PlanLayoutResponse:
        """Compute the next layout; change nothing."""
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
        layout = await self._layouts.apply(request.previous_epoch, request.remove_node_ids)
        return pb.ApplyLayoutResponse(layout=layout.to_message())

    async def WatchCluster(
        self, request: pb.WatchClusterRequest, context: Context
    ) -> AsyncIterator[pb.WatchClusterResponse]:
        """Stream layouts and nodes, first as they are, then as they change."""
        await self._view.fresh()
        async for state in self._view.changes():
            yield pb.WatchClusterResponse(layouts=state.layout_set.messages, nodes=state.nodes)

    async def Locate(self, request: pb.LocateRequest, context: Context) -> pb.LocateResponse:
        """Say which nodes own given blocks."""
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
        """Sum the cluster up."""
        state = await self._view.fresh()
        newest = state.layout_set.newest
        sentence = self._sentence(state)
        space = current_call().of.space
        return pb.GetClusterStatusResponse(
            cluster_id=self._cluster.record.cluster_id,
            state=sentence,
            writable=newest is not None and not partitions_without_quorum(newest, state.up),
            layout_epoch=newest.epoch if newest else 0,
            replicas=self._cluster.record.replicas,
            nodes=state.nodes,
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
