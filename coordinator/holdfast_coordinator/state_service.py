"""StateService: the gRPC shell around VMs, sessions, points and objects. Decides nothing itself.

Every method says first what it is about: what the request names by name is checked before anything is looked up, what
it names by id as soon as the id has told whose it is.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import grpc.aio

from holdfast_coordinator.access.call import Call, current_call
from holdfast_coordinator.bootstrap import Cluster
from holdfast_coordinator.grants import OBJECT_KINDS, POINT_KINDS, Token, check_keys_may_leave
from holdfast_coordinator.layouts import check_accepts_writes
from holdfast_coordinator.metrics import CoordinatorMetrics
from holdfast_coordinator.ownership import (
    APP_LIST,
    APP_READ,
    CLUSTER_READ,
    POINT_LIST,
    POINT_RESTORE,
    check_may,
    check_owner,
    of_session,
    of_task,
    of_tenant,
    of_vm,
)
from holdfast_coordinator.reach import object_walks, volume_walks
from holdfast_coordinator.tenant import Tenant
from holdfast_coordinator.view import ClusterState, ClusterView
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import IDS_PER_REQUEST_MAX
from holdfast_core.model.names import OBJECT_PREFIX, check_id, check_name, split_ids
from holdfast_proto.v1 import state_pb2 as pb
from holdfast_proto.v1.common_pb2 import Grant
from holdfast_proto.v1.records_pb2 import ObjectRecord, PointRecord, SessionRecord
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
        call = current_call()
        call.require(of_vm(check_name(request.vm.vm_id, "VM name")))

        async def check_template(point_id: str) -> None:
            template = (await call.of.points.get(point_id, what="template")).message
            if template.forgotten:
                raise HoldfastError(ErrorCode.NOT_FOUND, f"the template {point_id} was forgotten; name a living point")
            check_may(call, POINT_LIST, of_vm(template.vm_id))

        vm = await call.of.vms.register(
            request.vm, replace=request.replace, check_template=check_template, entry=call.entry
        )
        return pb.RegisterVmResponse(vm=vm)

    async def GetVm(self, request: pb.GetVmRequest, context: Context) -> pb.GetVmResponse:
        """Return one VM."""
        call = current_call()
        call.require(of_vm(check_name(request.vm_id, "VM name")))
        return pb.GetVmResponse(vm=await call.of.vms.get_whole(request.vm_id))

    async def ListVms(self, request: pb.ListVmsRequest, context: Context) -> pb.ListVmsResponse:
        """List the VMs that the caller may list."""
        call = current_call()
        call.filtered(of_vm("*"))
        vms, more = await call.of.vms.page(
            after=request.after,
            limit=request.limit,
            allowed=lambda vm_id: call.may(call.permission, of_vm(vm_id)),
        )
        return pb.ListVmsResponse(vms=vms, more=more)

    async def BeginPoint(self, request: pb.BeginPointRequest, context: Context) -> pb.BeginPointResponse:
        """Open a session for a point."""
        call = current_call()
        call.require(of_vm(check_name(request.vm_id, "VM name")), otherwise=request.incremental)
        self._check_peer(context)
        state = await self._writable()
        if request.base_id:
            base = await call.of.points.get(request.base_id, what="base point")
            check_may(call, POINT_LIST, of_vm(base.message.vm_id))
        session = await call.of.sessions.begin_point(
            request, call.entry, may_list=lambda vm_id: call.may(POINT_LIST, of_vm(vm_id))
        )
        self._metrics.begun("point")
        damaged = await call.of.damage.ids() if session.parent or session.base else frozenset()
        return pb.BeginPointResponse(
            session_id=session.record.session_id,
            session_ttl_ms=_ttl_ms(call.of),
            key_epoch=session.record.key_epoch,
            vm=session.vm,
            parent=session.parent,
            base=session.base,
            # All of the tenant's: some may lie under other points, which costs the client nothing. What a message does
            # not hold is left out: such a block is reused, and then its commit is refused or heals it.
            damaged_ids=b"".join(sorted(damaged)[:IDS_PER_REQUEST_MAX]),
            grant=session_grant(call, state, session.record),
        )

    async def KeepAlive(self, request: pb.KeepAliveRequest, context: Context) -> pb.KeepAliveResponse:
        """Keep a session's lease."""
        call = current_call()
        session, left_s = await call.of.sessions.keep_alive(request.session_id, call)
        response = pb.KeepAliveResponse(session_ttl_ms=int(left_s * 1000))
        if call.of.grants.is_past_half(session.started_unix_ms):
            token = session_token(call, session)
            response.capability = token.text
            response.capability_expires_unix_ms = token.expires_unix_ms
        return response

    async def CommitPoint(self, request: pb.CommitPointRequest, context: Context) -> pb.CommitPointResponse:
        """Make a session's point visible."""
        call = current_call()
        return pb.CommitPointResponse(point=await call.of.commits.commit_point(request, call))

    async def AbortSession(self, request: pb.AbortSessionRequest, context: Context) -> pb.AbortSessionResponse:
        """End a session without a result."""
        call = current_call()
        await call.of.sessions.abort(request.session_id, call)
        return pb.AbortSessionResponse()

    async def GetPoint(self, request: pb.GetPointRequest, context: Context) -> pb.GetPointResponse:
        """Return one point."""
        call = current_call()
        point = await call.of.points.whole(await self._point(call, request.point_id))
        locks = await call.of.locks.of([point.point_id])
        return pb.GetPointResponse(point=point, lock=locks.get(point.point_id))

    async def ListPoints(self, request: pb.ListPointsRequest, context: Context) -> pb.ListPointsResponse:
        """List a VM's points, oldest first; an unknown VM without any is NOT_FOUND."""
        call = current_call()
        call.require(of_vm(check_name(request.vm_id, "VM name")))
        points = [stored.message for stored in await call.of.points.of_vm(request.vm_id)]
        if not points:
            await call.of.vms.get(request.vm_id)
        locks = await call.of.locks.of(point.point_id for point in points if not point.forgotten)
        return pb.ListPointsResponse(
            points=[point for point in points if request.include_forgotten or not point.forgotten],
            locks=locks.values(),
        )

    async def ResolvePoint(self, request: pb.ResolvePointRequest, context: Context) -> pb.ResolvePointResponse:
        """Find what (snapshot, backup) names and grant reading it."""
        self._check_peer(context)
        call = current_call()
        await self._point(call, request.snapshot_id, what="snapshot")
        point = await call.of.points.resolve(request.snapshot_id, request.backup_id)
        call.entry.details["point"] = point.point_id
        return pb.ResolvePointResponse(
            point=await call.of.points.whole(point),
            vm=await call.of.vms.find(point.vm_id),
            grant=call.of.grants.reader_grant(await self._readable(), POINT_KINDS),
        )

    async def ForgetPoint(self, request: pb.ForgetPointRequest, context: Context) -> pb.ForgetPointResponse:
        """Forget a point; a lineage stub stays."""
        call = current_call()
        await self._point(call, request.point_id)
        await call.of.points.forget(request.point_id, call.entry)
        return pb.ForgetPointResponse()

    async def BeginObject(self, request: pb.BeginObjectRequest, context: Context) -> pb.BeginObjectResponse:
        """Open a session for an object."""
        call = current_call()
        call.require(of_task(check_name(request.task_id, "task name")))
        self._check_peer(context)
        state = await self._writable()
        record = await call.of.sessions.begin_object(request, call.entry)
        self._metrics.begun("object")
        return pb.BeginObjectResponse(
            session_id=record.session_id,
            session_ttl_ms=_ttl_ms(call.of),
            key_epoch=record.key_epoch,
            grant=session_grant(call, state, record),
        )

    async def CommitObject(self, request: pb.CommitObjectRequest, context: Context) -> pb.CommitObjectResponse:
        """Make an object visible."""
        call = current_call()
        return pb.CommitObjectResponse(object=await call.of.commits.commit_object(request, call))

    async def ResolveObject(self, request: pb.ResolveObjectRequest, context: Context) -> pb.ResolveObjectResponse:
        """Find an object and grant reading it."""
        self._check_peer(context)
        call = current_call()
        stored = await self._object(call, request.storage_id)
        grant = call.of.grants.reader_grant(await self._readable(), OBJECT_KINDS)
        return pb.ResolveObjectResponse(object=stored, grant=grant)

    async def ListObjects(self, request: pb.ListObjectsRequest, context: Context) -> pb.ListObjectsResponse:
        """List a task's objects, oldest first."""
        call = current_call()
        call.require(of_task(check_name(request.task_id, "task name")))
        return pb.ListObjectsResponse(objects=await call.of.objects.of_task(request.task_id))

    async def ForgetObject(self, request: pb.ForgetObjectRequest, context: Context) -> pb.ForgetObjectResponse:
        """Forget an object."""
        call = current_call()
        await self._object(call, request.storage_id)
        await call.of.objects.forget(request.storage_id, call.entry)
        return pb.ForgetObjectResponse()

    async def RefreshGrant(self, request: pb.RefreshGrantRequest, context: Context) -> pb.RefreshGrantResponse:
        """Renew layouts, addresses and capability, for a session or for a reader; asks the store, not the copy."""
        self._check_peer(context)
        call = current_call()
        if bool(request.session_id) == bool(request.resource_id):
            raise HoldfastError(
                ErrorCode.INVALID_ARGUMENT, "a grant is for a session or for a point or object; name one"
            )
        if request.session_id:
            session = (await call.of.sessions.get(request.session_id)).message
            check_owner(call, session, "refresh")
            return pb.RefreshGrantResponse(grant=session_grant(call, await self._view.fresh(), session))
        kinds = POINT_KINDS
        if is_object(request.resource_id):
            kinds = OBJECT_KINDS
            await self._object(call, request.resource_id, otherwise=True)
        else:
            await self._point(call, request.resource_id)
        return pb.RefreshGrantResponse(grant=call.of.grants.reader_grant(await self._view.fresh(), kinds))

    async def ReportDamage(self, request: pb.ReportDamageRequest, context: Context) -> pb.ReportDamageResponse:
        """Record blocks that no owner has any more, once the owners confirm it."""
        call = current_call()
        if is_object(request.resource_id):
            walks = object_walks([await self._object(call, request.resource_id)])
        else:
            walks = volume_walks([await self._point(call, request.resource_id)])
        block_ids = split_ids(request.block_ids)
        recorded = await call.of.damage.report(block_ids, request.resource_id, walks, call.entry)
        return pb.ReportDamageResponse(recorded=recorded)

    async def GetStats(self, request: pb.GetStatsRequest, context: Context) -> pb.GetStatsResponse:
        """Sum over a VM or the tenant."""
        call = current_call()
        if request.vm_id:
            call.require(of_vm(check_name(request.vm_id, "VM name")))
        else:
            call.require(of_tenant(call.entry.tenant))
        response = await call.of.stats.of(request.vm_id)
        if not call.allows_everywhere(CLUSTER_READ, ""):
            # What all tenants use together grows with every single write of another.
            response.ClearField("cluster_used_bytes")
        return response

    async def DiscardVm(self, request: pb.DiscardVmRequest, context: Context) -> pb.DiscardVmResponse:
        """End a VM's life, once what its keep rules name is durable."""
        call = current_call()
        call.require(of_vm(check_name(request.vm_id, "VM name")))

        def check_kept(task_id: str) -> None:
            check_may(call, APP_LIST, of_task(task_id))

        return await call.of.discards.discard(request, call.entry, check_kept=check_kept)

    async def LockPoint(self, request: pb.LockPointRequest, context: Context) -> pb.LockPointResponse:
        """Lock a point, or make its lock longer."""
        call = current_call()
        await self._point(call, request.point_id)
        lock = await call.of.locking.lock(request.point_id, request.until_unix_ms, call.entry)
        return pb.LockPointResponse(lock=lock)

    async def UnlockPoint(self, request: pb.UnlockPointRequest, context: Context) -> pb.UnlockPointResponse:
        """Lift a lock before its end."""
        call = current_call()
        await self._point(call, request.point_id)
        await call.of.locking.unlock(request.point_id, call.entry)
        return pb.UnlockPointResponse()

    async def SetRetention(self, request: pb.SetRetentionRequest, context: Context) -> pb.SetRetentionResponse:
        """Say which points of a VM are kept."""
        call = current_call()
        call.require(of_vm(check_name(request.vm_id, "VM name")))
        rules = request.rules if request.HasField("rules") else None
        await call.of.retention.set_rules(request.vm_id, rules, call.entry)
        return pb.SetRetentionResponse()

    async def ApplyRetention(self, request: pb.ApplyRetentionRequest, context: Context) -> pb.ApplyRetentionResponse:
        """Forget what rules do not keep."""
        call = current_call()
        call.require(of_vm(check_name(request.vm_id, "VM name")))
        rules = request.rules if request.HasField("rules") else None
        applied = await call.of.retention.apply(request.vm_id, rules, call.entry, dry_run=request.dry_run)
        return pb.ApplyRetentionResponse(points=applied.told())

    async def _point(self, call: Call, point_id: str, *, what: str = "point") -> PointRecord:
        """Return a point that the caller may have; an id tells nothing before it is looked up.

        Raises:
            HoldfastError: NOT_FOUND; DENIED; INVALID_ARGUMENT for a malformed id.
        """
        point = (await call.of.points.get(point_id, what=what)).message
        call.entry.details["point"] = point_id
        call.require(of_vm(point.vm_id))
        return point

    async def _object(self, call: Call, storage_id: str, *, otherwise: bool = False) -> ObjectRecord:
        """Return an object that the caller may have. Raises as `_point`."""
        stored = (await call.of.objects.get(storage_id)).message
        call.entry.details["object"] = storage_id
        call.require(of_task(stored.task_id), otherwise=otherwise)
        return stored

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


def session_grant(call: Call, state: ClusterState, session: SessionRecord) -> Grant:
    """Return what a session's owner gets: with data for who may restore what it writes, else for writing alone."""
    return call.of.grants.session_grant(state, session, _kinds(session), may_read_data=_may_read_data(call, session))


def session_token(call: Call, session: SessionRecord) -> Token:
    """Return the capability alone, confined as in `session_grant`."""
    return call.of.grants.session_token(session, _kinds(session), may_read_data=_may_read_data(call, session))


def is_object(resource_id: str) -> bool:
    """Return whether an id is of an object rather than of a point. Raises INVALID_ARGUMENT for a malformed one."""
    return check_id(resource_id, "point or storage id").startswith(OBJECT_PREFIX)


def _kinds(session: SessionRecord) -> frozenset[int]:
    return OBJECT_KINDS if session.task_id else POINT_KINDS


def _may_read_data(call: Call, session: SessionRecord) -> bool:
    return call.may(APP_READ if session.task_id else POINT_RESTORE, of_session(session))


def _ttl_ms(tenant: Tenant) -> int:
    return int(tenant.sessions.ttl_s * 1000)
