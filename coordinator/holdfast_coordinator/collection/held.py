"""What of a tenant has trees: its points, objects and open sessions, as questions about blocks take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.ownership import of_session, of_task, of_vm
from holdfast_coordinator.records import each, parse
from holdfast_core.model.names import split_ids
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1.records_pb2 import ObjectRecord, PointRecord, SessionRecord

MayList = Callable[[str], bool]
"""Whether a caller may list a resource."""


class HeldTree(NamedTuple):
    """A tree and whose it is.

    `block_bytes` is the size of a volume's blocks, 0 for an object or where it is not known.
    """

    resource_id: str
    vm_id: str
    task_id: str
    volume: str
    root: bytes
    block_bytes: int = 0
    is_session: bool = False


async def held_trees(
    store: MetadataStore, space: TenantKeyspace, *, may_see_points: MayList, may_see_objects: MayList
) -> list[HeldTree]:
    """Return all trees of what the caller may list, volumes that are wholly zero and empty objects left out."""
    trees: list[HeldTree] = []
    async for item in each(store, space.points_prefix):
        point = parse(item, PointRecord).message
        if not point.forgotten and may_see_points(of_vm(point.vm_id)):
            trees += [
                HeldTree(point.point_id, point.vm_id, "", volume.name, volume.root, volume.block_bytes)
                for volume in point.volumes
                if volume.root
            ]
    async for item in each(store, space.objects_prefix):
        stored = parse(item, ObjectRecord).message
        if stored.root and may_see_objects(of_task(stored.task_id)):
            trees.append(HeldTree(stored.storage_id, "", stored.task_id, "", stored.root))
    async for item in each(store, space.sessions_prefix):
        session = parse(item, SessionRecord).message
        may_see = may_see_objects if session.task_id else may_see_points
        if may_see(of_session(session)):
            trees += [
                HeldTree(session.session_id, session.vm_id, session.task_id, "", root, is_session=True)
                for root in split_ids(session.pinned_roots)
            ]
    return trees
