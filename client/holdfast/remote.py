"""The coordinator's plain calls, typed: frozen values in and out, nothing kept."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Final

from holdfast import convert
from holdfast.results import ObjectInfo, PointInfo, Stats, VmInfo
from holdfast_core.model.limits import LIST_ITEMS_MAX
from holdfast_core.model.names import check_id, check_name
from holdfast_core.runtime.endpoints import Endpoints
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.records_pb2 import VmRecord
from holdfast_proto.v1.state_pb2_grpc import StateServiceStub

if TYPE_CHECKING:
    from holdfast.lifecycle import DiscardReceipt

_STATS_TIMEOUT_S: Final = 300.0
_DISCARD_TIMEOUT_S: Final = 300.0


class CoordinatorCalls:
    """What one call answers about VMs, points and objects. All methods raise HoldfastError as the coordinator says."""

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
        from holdfast.lifecycle import discard_receipt  # most processes discard nothing

        return discard_receipt(answer)

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

    async def list_objects(self, task_id: str) -> list[ObjectInfo]:
        """Return a task's objects, oldest first."""
        request = state_pb2.ListObjectsRequest(task_id=check_name(task_id, "task name"))
        answer = await self._endpoints.call(lambda channel: StateServiceStub(channel).ListObjects, request)
        return [convert.object_info(stored) for stored in answer.objects]

    async def all_objects(self) -> AsyncGenerator[ObjectInfo, None]:
        """Yield the objects of all tasks that the caller may list, page by page."""
        token = ""
        while True:
            request = state_pb2.ListObjectsRequest(page_token=token)
            answer = await self._endpoints.call(lambda channel: StateServiceStub(channel).ListObjects, request)
            for stored in answer.objects:
                yield convert.object_info(stored)
            token = answer.next_page_token
            if not token:
                return

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
