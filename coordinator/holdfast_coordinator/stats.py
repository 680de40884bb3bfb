"""Sums over a VM's points or over the tenant. `docs/adr/0043-exclusive-and-shared-bytes.md`.

Most sums are of what the records say. What is exclusive to a VM, what it shares and how it spreads over the nodes needs
the trees and the sealed lengths, which only the nodes know; where they cannot be had, these fields stay unset and the
rest is answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from holdfast_coordinator.barrier import Walk
from holdfast_coordinator.fragments import spread
from holdfast_coordinator.grants import Grants
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.living_reader import living_reader
from holdfast_coordinator.points import Points
from holdfast_coordinator.reach import Collector, IdSample, object_walks, sealed_lengths, volume_walks
from holdfast_coordinator.records import count, each, parse
from holdfast_coordinator.view import ClusterView
from holdfast_coordinator.vms import Vms
from holdfast_core.model.block import Opener
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.layout import Layout
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1.records_pb2 import ObjectRecord, PointRecord, TransferStats
from holdfast_proto.v1.state_pb2 import GetStatsResponse, NodeShare

_SUMMED: Final = tuple(field.name for field in TransferStats.DESCRIPTOR.fields)
# What may keep the trees from being walked; everything else is a fault and is not hidden.
_UNTELLABLE: Final = (
    ErrorCode.UNREACHABLE,
    ErrorCode.MISSING,
    ErrorCode.CORRUPT,
    ErrorCode.LIMIT_EXCEEDED,
    ErrorCode.NOT_READY,
)


class Stats:
    """Sums of one tenant."""

    def __init__(
        self,
        store: MetadataStore,
        space: TenantKeyspace,
        *,
        vms: Vms,
        points: Points,
        view: ClusterView,
        pool: NodePool,
        grants: Grants,
        opener: Opener,
    ) -> None:
        """Bind to the store and the nodes; `opener` needs the structure key alone."""
        self._store = store
        self._space = space
        self._vms = vms
        self._points = points
        self._view = view
        self._pool = pool
        self._grants = grants
        self._opener = opener

    async def of(self, vm_id: str) -> GetStatsResponse:
        """Return the sums over a VM's visible points, or over all points and objects where `vm_id` is empty.

        Raises:
            HoldfastError: NOT_FOUND for an unknown VM; INVALID_ARGUMENT for a malformed name.
        """
        response = GetStatsResponse(cluster_used_bytes=sum(node.used_bytes for node in self._view.state.nodes))
        points = [
            point
            async for item in each(self._store, self._space.points_prefix)
            if not (point := parse(item, PointRecord).message).forgotten
        ]
        objects = [parse(item, ObjectRecord).message async for item in each(self._store, self._space.objects_prefix)]
        if vm_id:
            await self._vms.get(vm_id)
            response.vm_count = 1
            mine = [point for point in points if point.vm_id == vm_id]
            others = [point for point in points if point.vm_id != vm_id]
            _add(response, mine, ())
            await self._add_reach(response, volume_walks(mine), [*volume_walks(others), *object_walks(objects)])
            return response
        response.vm_count = await count(self._store, self._space.vms_prefix)
        _add(response, points, objects)
        await self._add_reach(response, [*volume_walks(points), *object_walks(objects)], ())
        return response

    async def _add_reach(self, response: GetStatsResponse, mine: Iterable[Walk], others: Iterable[Walk]) -> None:
        """Fill in what only `mine` reach, what they share with `others`, and where it all is, if the nodes tell."""
        layouts = (await self._view.current_layouts()).layouts
        reader = living_reader(self._view, self._pool, self._grants.index_reader)
        collector = Collector(reader, self._opener)
        try:
            own, foreign = await collector.collect(mine), await collector.collect(others)
            own.narrow(foreign.bits)
            foreign.narrow(own.bits)
            nodes = [node.node_id for node in self._view.state.nodes if node.up]
            lengths = await sealed_lengths(self._pool, nodes, self._grants.size_scanner(), own.ids)
        except HoldfastError as error:
            if error.code not in _UNTELLABLE:
                raise
            return
        response.exclusive_bytes, response.shared_bytes = split_bytes(own, foreign, lengths)
        if layouts:
            _add_shares(response, own, lengths, layouts[0])


def split_bytes(own: IdSample, foreign: IdSample, lengths: dict[bytes, int]) -> tuple[int, int]:
    """Return the bytes of ids that only `own` has, and of those that both have. Pure; both are equally narrow."""
    scale = 1 << own.bits
    exclusive = sum(lengths.get(block_id, 0) for block_id in own.ids - foreign.ids)
    shared = sum(lengths.get(block_id, 0) for block_id in own.ids & foreign.ids)
    return exclusive * scale, shared * scale


def _add_shares(response: GetStatsResponse, own: IdSample, lengths: dict[bytes, int], newest: Layout) -> None:
    """Fill in how the ids spread over the nodes; a sample stands for as many as it was drawn from."""
    scale = 1 << own.bits
    response.share_blocks = len(own.ids) * scale
    response.shares.extend(
        NodeShare(node_id=share.node_id, zone=share.zone, blocks=share.blocks * scale, bytes=share.bytes * scale)
        for share in spread(own.ids, lengths, newest)
    )


def _add(response: GetStatsResponse, points: Sequence[PointRecord], objects: Sequence[ObjectRecord]) -> None:
    response.point_count = len(points)
    response.object_count = len(objects)
    response.logical_bytes = sum(volume.size_bytes for point in points for volume in point.volumes)
    response.logical_bytes += sum(stored.size_bytes for stored in objects)
    for stats in [*(point.stats for point in points), *(stored.stats for stored in objects)]:
        response.stored_bytes += stats.stored_bytes
        for name in _SUMMED:
            setattr(response.transfer, name, getattr(response.transfer, name) + getattr(stats, name))
