"""Sums over a VM's points or over the tenant. `docs/adr/0043-stats.md`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.points import Points
from holdfast_coordinator.records import count, each, parse
from holdfast_coordinator.view import ClusterView
from holdfast_coordinator.vms import Vms
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1.records_pb2 import ObjectRecord, PointRecord, TransferStats
from holdfast_proto.v1.state_pb2 import GetStatsResponse

_SUMMED: Final = tuple(field.name for field in TransferStats.DESCRIPTOR.fields)


class Stats:
    """Sums of one tenant."""

    def __init__(
        self, store: MetadataStore, space: TenantKeyspace, *, vms: Vms, points: Points, view: ClusterView
    ) -> None:
        """Bind to the store."""
        self._store = store
        self._space = space
        self._vms = vms
        self._points = points
        self._view = view

    async def of(self, vm_id: str) -> GetStatsResponse:
        """Return the sums over a VM's visible points, or over all points and objects where `vm_id` is empty.

        Raises:
            HoldfastError: NOT_FOUND for an unknown VM; INVALID_ARGUMENT for a malformed name.
        """
        response = GetStatsResponse(cluster_used_bytes=sum(node.used_bytes for node in self._view.state.nodes))
        if vm_id:
            await self._vms.get(vm_id)
            response.vm_count = 1
            for stored in await self._points.of_vm(vm_id):
                _add_point(response, stored.message)
            return response
        response.vm_count = await count(self._store, self._space.vms_prefix)
        async for point in self._all_points():
            _add_point(response, point)
        async for item in each(self._store, self._space.objects_prefix):
            stored_object = parse(item, ObjectRecord).message
            response.object_count += 1
            response.logical_bytes += stored_object.size_bytes
            _add_transfer(response, stored_object.stats)
        return response

    async def _all_points(self) -> AsyncIterator[PointRecord]:
        async for item in each(self._store, self._space.points_prefix):
            yield parse(item, PointRecord).message


def _add_point(response: GetStatsResponse, point: PointRecord) -> None:
    if point.forgotten:
        return
    response.point_count += 1
    response.logical_bytes += sum(volume.size_bytes for volume in point.volumes)
    _add_transfer(response, point.stats)


def _add_transfer(response: GetStatsResponse, stats: TransferStats) -> None:
    response.stored_bytes += stats.stored_bytes
    for name in _SUMMED:
        setattr(response.transfer, name, getattr(response.transfer, name) + getattr(stats, name))
