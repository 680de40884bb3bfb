"""StateService: the gRPC shell around VMs, sessions, points and objects. Decides nothing itself."""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc.aio

from holdfast_coordinator.access.call import current_call
from holdfast_coordinator.bootstrap import Cluster
from holdfast_coordinator.grants import OBJECT_KINDS, POINT_KINDS, Token, check_keys_may_leave
from holdfast_coordinator.layouts import check_accepts_writes
from holdfast_coordinator.metrics import CoordinatorMetrics
from holdfast_coordinator.tenant import Tenant
from holdfast_coordinator.view import ClusterState, ClusterView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import IDS_PER_REQUEST_MAX
from holdfast_core.model.names import OBJECT_PREFIX, check_id, split_ids
from holdfast_proto.v1 import state_pb2 as pb
from holdfast_proto.v1.state_pb2_grpc import StateServiceServicer

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]


class StateService(StateServiceServicer):
    """VMs, recovery points and stored objects of the tenant that a call is made in."""

    def __init__(self, cluster: Cluster, view: ClusterView, *, metrics: CoordinatorMetrics, encrypted: bool) -> None:
        """Bind to the logic; `encrypted` says whether this service is reached over TLS alone."""
        self._cluster = cluster
        self._view = view
        self._metrics = metrics
        self._encrypted = encrypted

    async def RegisterVm(self, request: pb.RegisterVmRequest, context: Context) -> pb.RegisterVmResponse:
        """Register a VM; idempotent if identical."""
        return pb.RegisterVmResponse(vm=await self._tenant.vms.register(request.vm, replace=request.replace))

    async def GetVm(self, request: pb.GetVmRequest, context: Context) -> pb.GetVmResponse:
        """Return one VM."""
        return pb.GetVmResponse(vm=(await self._tenant.vms.get(request.vm_id)).message)

    async def ListVms(self, request: pb.ListVmsRequest, context: Context) -> pb.ListVmsResponse:
        """List VMs."""
        vms, more = await self._tenant.vms.page(after=request.after, limit=request.limit)
        return pb.ListVmsResponse(vms=vms, more=more)

    async def BeginPoint(self, request: pb.BeginPointRequest, context: Context) -> pb.BeginPointResponse:
        """Open a session for a point."""
        self._check_peer(context)
        state = await self._writable()
        session = await self._tenant.sessions.begin_point(request)
        self._metrics.begun("point")
        token = self._tenant.grants.session_token(session.record.session_id, POINT_KINDS)
        damaged = await self._tenant.damage.ids() if session.parent or session.base else frozenset()
        return pb.BeginPointResponse(
            session_id=session.record.session_id,
            session_ttl_ms=self._ttl_ms,
            key_epoch=session.record.key_epoch,
            vm=session.vm,
            parent=session.parent,
            base=session.base,
            # All of the tenant's: some may lie under other points, which costs the client nothing. What a message does
            # not hold is left out: such a block is reused, and then its commit is refused or heals it.
            damaged_ids=b"".join(sorted(damaged)[:IDS_PER_REQUEST_MAX]),
            grant=self._tenant.grants.grant(state, token),
        )

    async def KeepAlive(self, request: pb.KeepAliveRequest, context: Context) -> pb.KeepAliveResponse:
        """Keep a session's lease."""
        session, left_s = await self._tenant.sessions.keep_alive(request.session_id)
        response = pb.KeepAliveResponse(session_ttl_ms=int(left_s * 1000))
        if self._tenant.grants.is_past_half(session.started_unix_ms):
            token = self._session_token(session.session_id, for_object=bool(session.task_id))
            response.capability = token.text
            response.capability_expires_unix_ms = token.expires_unix_ms
        return response

    async def CommitPoint(self, request: pb.CommitPointRequest, context: Context) -> pb.CommitPointResponse:
        """Make a session's point visible."""
        return pb.CommitPointResponse(point=await self._tenant.commits.commit_point(request))

    async def AbortSession(self, request: pb.AbortSessionRequest, context: Context) -> pb.AbortSessionResponse:
        """End a session without a result."""
        await self._tenant.sessions.abort(request.session_id)
        return pb.AbortSessionResponse()

    async def GetPoint(self, request: pb.GetPointRequest, context: Context) -> pb.GetPointResponse:
        """Return one point."""
        return pb.GetPointResponse(point=(await self._tenant.points.get(request.point_id)).message)

    async def ListPoints(self, request: pb.ListPointsRequest, context: Context) -> pb.ListPointsResponse:
        """List a VM's points, oldest first; an unknown VM without any is NOT_FOUND."""
        points = [stored.message for stored in await self._tenant.points.of_vm(request.vm_id)]
        if not points:
            await self._tenant.vms.get(request.vm_id)
        return pb.ListPointsResponse(
            points=[point for point in points if request.include_forgotten or not point.forgotten]
        )

    async def ResolvePoint(self, request: pb.ResolvePointRequest, context: Context) -> pb.ResolvePointResponse:
        """Find what (snapshot, backup) names and grant reading it."""
        self._check_peer(context)
        point = await self._tenant.points.resolve(request.snapshot_id, request.backup_id)
        token = self._tenant.grants.reader_token(POINT_KINDS)
        return pb.ResolvePointResponse(
            point=point,
            vm=await self._tenant.vms.find(point.vm_id),
            grant=self._tenant.grants.grant(await self._readable(), token),
        )

    async def ForgetPoint(self, request: pb.ForgetPointRequest, context: Context) -> pb.ForgetPointResponse:
        """Forget a point; a lineage stub stays."""
        await self._tenant.points.forget(request.point_id)
        return pb.ForgetPointResponse()

    async def BeginObject(self, request: pb.BeginObjectRequest, context: Context) -> pb.BeginObjectResponse:
        """Open a session for an object."""
        self._check_peer(context)
        state = await self._writable()
        record = await self._tenant.sessions.begin_object(request)
        self._metrics.begun("object")
        token = self._session_token(record.session_id, for_object=True)
        return pb.BeginObjectResponse(
            session_id=record.session_id,
            session_ttl_ms=self._ttl_ms,
            key_epoch=record.key_epoch,
            grant=self._tenant.grants.grant(state, token),
        )

    async def CommitObject(self, request: pb.CommitObjectRequest, context: Context) -> pb.CommitObjectResponse:
        """Make an object visible."""
        return pb.CommitObjectResponse(object=await self._tenant.commits.commit_object(request))

    async def ResolveObject(self, request: pb.ResolveObjectRequest, context: Context) -> pb.ResolveObjectResponse:
        """Find an object and grant reading it."""
        self._check_peer(context)
        stored = (await self._tenant.objects.get(request.storage_id)).message
        token = self._tenant.grants.reader_token(OBJECT_KINDS)
        return pb.ResolveObjectResponse(object=stored, grant=self._tenant.grants.grant(await self._readable(), token))

    async def ListObjects(self, request: pb.ListObjectsRequest, context: Context) -> pb.ListObjectsResponse:
        """List a task's objects, oldest first."""
        return pb.ListObjectsResponse(objects=await self._tenant.objects.of_task(request.task_id))

    async def ForgetObject(self, request: pb.ForgetObjectRequest, context: Context) -> pb.ForgetObjectResponse:
        """Forget an object."""
        await self._tenant.objects.forget(request.storage_id)
        return pb.ForgetObjectResponse()

    async def RefreshGrant(self, request: pb.RefreshGrantRequest, context: Context) -> pb.RefreshGrantResponse:
        """Renew layouts, addresses and capability, for a session or for a reader; asks the store, not the copy."""
        self._check_peer(context)
        if bool(request.session_id) == bool(request.resource_id):
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, "a grant is for a session or for a point or object; name one"
            )
        if request.session_id:
            session = (await self._tenant.sessions.get(request.session_id)).message
            token = self._session_token(session.session_id, for_object=bool(session.task_id))
        else:
            token = self._tenant.grants.reader_token(await self._kinds_of(request.resource_id))
        return pb.RefreshGrantResponse(grant=self._tenant.grants.grant(await self._view.fresh(), token))

    async def ReportDamage(self, request: pb.ReportDamageRequest, context: Context) -> pb.ReportDamageResponse:
        """Record blocks that no owner has any more, once the owners confirm it."""
        await self._kinds_of(request.resource_id)
        recorded = await self._tenant.damage.report(split_ids(request.block_ids), request.resource_id)
        return pb.ReportDamageResponse(recorded=recorded)

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        """Sum over a VM or the tenant."""
        return await self._tenant.stats.of(request.vm_id)

    @property
    def _tenant(self) -> Tenant:
        return current_call().of

    @property
    def _ttl_ms(self) -> int:
        return int(self._tenant.sessions.ttl_s * 1000)

    def _check_peer(self, context: Context) -> None:
        check_keys_may_leave(peer=context.peer(), encrypted=self._encrypted)

    async def _writable(self) -> ClusterState:
        """Return the cluster's state if sessions may begin. Raises NOT_READY."""
        state = await self._readable()
        check_accepts_writes(state, self._cluster)
        return state

    async def _readable(self) -> ClusterState:
        """Return the copy, or what the store says where the copy has no layout: that is the one news not to miss."""
        state = self._view.state
        return state if state.layout_set.layouts else await self._view.fresh()

    def _session_token(self, session_id: str, *, for_object: bool) -> Token:
        return self._tenant.grants.session_token(session_id, OBJECT_KINDS if for_object else POINT_KINDS)

    async def _kinds_of(self, resource_id: str) -> frozenset[int]:
        """Return the kinds of block of an existing point or object. Raises NOT_FOUND."""
        check_id(resource_id, "point or storage id")
        if resource_id.startswith(OBJECT_PREFIX):
            await self._tenant.objects.get(resource_id)
            return OBJECT_KINDS
        await self._tenant.points.get(resource_id)
        return POINT_KINDS
