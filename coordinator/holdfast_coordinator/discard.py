"""Discarding a VM: its points and its registration go, what its tasks stored stays."""

from __future__ import annotations

from typing import Final

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.points import Points
from holdfast_coordinator.records import still
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_coordinator.usage import UsageChange
from holdfast_coordinator.vms import Vms
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import Absent, Condition, Delete, MetadataStore, Operation
from holdfast_proto.v1.state_pb2 import DiscardVmRequest, DiscardVmResponse
from holdfast_proto.v1.tenants_pb2 import Quota

# A transaction of the ledger takes 100 operations of its callers; a point takes two of them.
POINTS_PER_TXN: Final = 40


class Discards:
    """Ends the lives of one tenant's VMs."""

    def __init__(
        self,
        store: MetadataStore,
        space: TenantKeyspace,
        ledger: Ledger,
        *,
        vms: Vms,
        points: Points,
        clock: Clock,
        quota: Quota,
    ) -> None:
        """Bind to the store; `quota` is what the tenant may have."""
        self._store = store
        self._space = space
        self._ledger = ledger
        self._vms = vms
        self._points = points
        self._clock = clock
        self._quota = quota

    async def discard(self, request: DiscardVmRequest, entry: Entry) -> DiscardVmResponse:
        """Remove a VM with its points and return the receipt.

        Raises:
            HoldfastError: NOT_FOUND; CONFLICT if something must be kept first, or under contention.
        """
        for _ in range(ATTEMPTS_MAX):
            vm = await self._vms.get(request.vm_id)
            number_key = self._space.point_number(request.vm_id)
            number = await self._store.get(number_key)
            points = await self._points.of_vm(request.vm_id)
            if vm.message.keep or len(points) > POINTS_PER_TXN:
                raise HoldfastError(ErrorCode.CONFLICT, f"the VM {request.vm_id} has more than can be discarded now")
            freed = sum(point.message.charged_bytes for point in points)
            conditions: list[Condition] = [
                vm.unchanged,
                still(number_key, number),
                Absent(self._space.vm_session(request.vm_id)),
            ]
            operations: list[Operation] = [Delete(vm.key), Delete(number_key)]
            for point in points:
                conditions.append(point.unchanged)
                operations += [Delete(point.key), Delete(self._space.point_id(point.message.point_id))]
            usage = UsageChange(tenant=self._space.tenant, quota=self._quota, bytes=-freed, vms=-1)
            if await self._ledger.apply(entry, conditions, operations, usage) is Outcome.APPLIED:
                return DiscardVmResponse(
                    vm_id=request.vm_id,
                    discarded_unix_ms=self._clock.now_unix_ms(),
                    point_count=sum(not point.message.forgotten for point in points),
                    released_bytes=freed,
                )
        raise contention(f"discarding the VM {request.vm_id}")
