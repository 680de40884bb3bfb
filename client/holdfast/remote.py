"""The coordinator's plain calls, typed: frozen values in and out, nothing kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from holdfast import convert
from holdfast.lifecycle import DiscardReceipt
from holdfast.results import (
    ClusterStatus,
    LayoutChange,
    LayoutInfo,
    LayoutPlan,
    LayoutState,
    NodeDecision,
    NodeInfo,
    ObjectInfo,
    PointInfo,
    Stats,
    VmInfo,
)
from holdfast.retention import PointLock, RetainedPoint, RetentionRules
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import LIST_ITEMS_MAX
from holdfast_core.model.names import check_id, check_name
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_proto.v1 import cluster_pb2, state_pb2
from holdfast_proto.v1.cluster_pb2_grpc import ClusterServiceStub
from holdfast_proto.v1.records_pb2 import VmRecord
from holdfast_proto.v1.state_pb2_grpc import StateServiceStub

_STATS_TIMEOUT_S: Final = 300.0
_DISCARD_TIMEOUT_S: Final = 300.0
_RETENTION_TIMEOUT_S: Final = 300.0


class CoordinatorCalls:
    """Everything that one call to a coordinator answers. All methods raise HoldfastError as the coordinator says."""

    def __init__(self, endpoints: Endpoints) -> None:
        """Bind to the coordinators."""
        self._endpoints = endpoints

    @property
    def endpoints(self) -> Endpoints:
        """The coordinators, for groups of calls that are typed elsewhere."""
        return self._endpoints

    async def register_vm(self, vm: VmRecord, *, replace: bool) -> VmInfo:
        """Register a VM."""
        request = state_pb2.RegisterVmRequest(vm=vm, replace=replace)
        answer = await self._endpoints.call(lambda channel: StateServiceStub(channel).RegisterVm, request)
        return convert.vm_info(answer.vm)

    async def vm(self, vm_id: str) -> VmInfo:
        """Return one VM."""
        request = state_pb2.GetVmRequest(vm_id=check_name(vm_id, "VM name"))
        answer = await self._endpoints.call(lambda channel: StateServiceStub(channel).GetVm, request)
        return convert.vm_info(answer.vm)

    async def list_vms(self) -> list[VmInfo]:
        """Return all VMs by name."""
        vms: list[VmInfo] = []
        while True:
            request = state_pb2.ListVmsRequest(after=vms[-1].vm_id if vms else "", limit=LIST_ITEMS_MAX)
            answer = await self._endpoints.call(lambda channel: StateServiceStub(channel).ListVms, request)
            vms.extend(convert.vm_info(vm) for vm in answer.vms)
            if not answer.more or not answer.vms:
                return vms

    async def discard_vm(self, vm_id: str, storage_ids: Sequence[str], *, newest_point_id: str) -> DiscardReceipt:
        """Discard a VM whose keep rules these objects fulfil, and of which this is the newest living point."""
        request = state_pb2.DiscardVmRequest(
            vm_id=check_name(vm_id, "VM name"), storage_ids=storage_ids, newest_point_id=newest_point_id
        )
        answer = await self._endpoints.call(
            lambda channel: StateServiceStub(channel).DiscardVm, request, timeout_s=_DISCARD_TIMEOUT_S
        )
        return convert.discard_receipt(answer)

    async def points(self, vm_id: str, *, include_forgotten: bool) -> list[PointInfo]:
        """Return a VM's points, oldest first."""
        check_name(vm_id, "VM name")
        request = state_pb2.ListPointsRequest(vm_id=vm_id, include_forgotten=include_forgotten)
        answer = await self._endpoints.call(lambda channel: StateServiceStub(channel).ListPoints, request)
        locks = {lock.point_id: lock for lock in answer.locks}
        return [convert.point_info(point, locks.get(point.point_id)) for point in answer.points]

    async def point(self, point_id: str) -> PointInfo:
        """Return one point; a lineage stub too."""
        request = state_pb2.GetPointRequest(point_id=check_id(point_id, "point id"))
        answer = await self._endpoints.call(lambda channel: StateServiceStub(channel).GetPoint, request)
        return convert.point_info(answer.point, answer.lock if answer.HasField("lock") else None)

    async def forget(self, point_id: str) -> None:
        """Forget a point."""
        request = state_pb2.ForgetPointRequest(point_id=check_id(point_id, "point id"))
        await self._endpoints.call(lambda channel: StateServiceStub(channel).ForgetPoint, request)

    async def lock(self, point_id: str, until_unix_ms: int) -> PointLock:
        """Lock a point until then; returns the lock as it is."""
        if until_unix_ms < 0:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "a lock ends in the future")
        request = state_pb2.LockPointRequest(point_id=check_id(point_id, "point id"), until_unix_ms=until_unix_ms)
        answer = await self._endpoints.call(lambda channel: StateServiceStub(channel).LockPoint, request)
        return convert.point_lock(answer.lock)

    async def unlock(self, point_id: str) -> None:
        """Lift a point's lock."""
        request = state_pb2.UnlockPointRequest(point_id=check_id(point_id, "point id"))
        await self._endpoints.call(lambda channel: StateServiceStub(channel).UnlockPoint, request)

    async def set_retention(self, vm_id: str, rules: RetentionRules | None) -> None:
        """Set a VM's rules of retention; None removes them."""
        message = None if rules is None else convert.retention_message(rules)
        request = state_pb2.SetRetentionRequest(vm_id=check_name(vm_id, "VM name"), rules=message)
        await self._endpoints.call(lambda channel: StateServiceStub(channel).SetRetention, request)

    async def apply_retention(
        self, vm_id: str, rules: RetentionRules | None, *, dry_run: bool
    ) -> Sequence[RetainedPoint]:
        """Apply rules of retention to a VM's points; its own where `rules` is None."""
        message = None if rules is None else convert.retention_message(rules)
        request = state_pb2.ApplyRetentionRequest(vm_id=check_name(vm_id, "VM name"), rules=message, dry_run=dry_run)
        answer = await self._endpoints.call(
            lambda channel: StateServiceStub(channel).ApplyRetention, request, timeout_s=_RETENTION_TIMEOUT_S
        )
        return convert.retained_points(answer.points)

    async def list_objects(self, task_id: str) -> list[ObjectInfo]:
        """Return a task's objects, oldest first."""
        request = state_pb2.ListObjectsRequest(task_id=check_name(task_id, "task name"))
        answer = await self._endpoints.call(lambda channel: StateServiceStub(channel).ListObjects, request)
        return [convert.object_info(stored) for stored in answer.objects]

    async def resolve_object(self, storage_id: str) -> state_pb2.ResolveObjectResponse:
        """Return an object's record and access to it."""
        request = state_pb2.ResolveObjectRequest(storage_id=check_id(storage_id, "storage id"))
        return await self._endpoints.call(lambda channel: StateServiceStub(channel).ResolveObject, request)

    async def resolve_point(self, snapshot_id: str, backup_id: str) -> state_pb2.ResolvePointResponse:
        """Return the record of what (snapshot, backup) names, and access to it."""
        check_id(snapshot_id, "snapshot id")
        if backup_id:
            check_id(backup_id, "backup id")
        request = state_pb2.ResolvePointRequest(snapshot_id=snapshot_id, backup_id=backup_id)
        return await self._endpoints.call(lambda channel: StateServiceStub(channel).ResolvePoint, request)

    async def forget_object(self, storage_id: str) -> None:
        """Forget an object."""
        request = state_pb2.ForgetObjectRequest(storage_id=check_id(storage_id, "storage id"))
        await self._endpoints.call(lambda channel: StateServiceStub(channel).ForgetObject, request)

    async def report_damage(self, block_ids: Sequence[bytes], resource_id: str) -> int:
        """Report blocks that no owner could give; returns how many the coordinator confirmed."""
        request = state_pb2.ReportDamageRequest(block_ids=b"".join(block_ids), resource_id=resource_id)
        answer = await self._endpoints.call(lambda channel: StateServiceStub(channel).ReportDamage, request)
        return answer.recorded

    async def stats(self, vm_id: str) -> Stats:
        """Return sums over a VM, or over the tenant if `vm_id` is empty."""
        if vm_id:
            check_name(vm_id, "VM name")
        request = state_pb2.GetStatsRequest(vm_id=vm_id)
        answer = await self._endpoints.call(
            lambda channel: StateServiceStub(channel).GetStats, request, timeout_s=_STATS_TIMEOUT_S
        )
        return convert.stats_info(answer)

    async def cluster_status(self) -> ClusterStatus:
        """Return how the cluster is."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).GetClusterStatus, cluster_pb2.GetClusterStatusRequest()
        )
        return convert.cluster_status(answer)

    async def nodes(self) -> list[NodeInfo]:
        """Return the registered nodes by name."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).ListNodes, cluster_pb2.ListNodesRequest()
        )
        return [convert.node_info(node) for node in answer.nodes]

    async def layout(self) -> LayoutState:
        """Return the living layouts."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).GetLayout, cluster_pb2.GetLayoutRequest()
        )
        return convert.layout_state(answer)

    async def plan_layout(self, remove: Sequence[str]) -> LayoutPlan:
        """Return what the next layout would change."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).PlanLayout,
            cluster_pb2.PlanLayoutRequest(remove_node_ids=remove),
        )
        return convert.layout_plan(answer)

    async def apply_layout(self, previous_epoch: int, remove: Sequence[str]) -> LayoutInfo:
        """Make the planned layout the newest."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).ApplyLayout,
            cluster_pb2.ApplyLayoutRequest(previous_epoch=previous_epoch, remove_node_ids=remove),
        )
        return convert.layout_info(answer.layout)

    async def set_node(
        self, node_id: str, *, draining: bool | None, weight_bytes: int | None, dry_run: bool
    ) -> NodeDecision:
        """Change what is decided of a node."""
        request = cluster_pb2.SetNodeRequest(
            node_id=check_name(node_id, "node name"), draining=draining, weight_bytes=weight_bytes, dry_run=dry_run
        )
        answer = await self._endpoints.call(lambda channel: ClusterServiceStub(channel).SetNode, request)
        return convert.node_decision(answer)

    async def remove_node(self, node_id: str, *, lost: bool) -> None:
        """End a node's membership."""
        request = cluster_pb2.RemoveNodeRequest(node_id=check_name(node_id, "node name"), lost=lost)
        await self._endpoints.call(lambda channel: ClusterServiceStub(channel).RemoveNode, request)

    async def layout_history(self) -> list[LayoutChange]:
        """Return how layouts followed one another, newest first."""
        answer = await self._endpoints.call(
            lambda channel: ClusterServiceStub(channel).GetLayoutHistory, cluster_pb2.GetLayoutHistoryRequest()
        )
        return [convert.layout_change(change) for change in answer.changes]
