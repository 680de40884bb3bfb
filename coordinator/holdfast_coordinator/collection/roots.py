"""What a collection of one tenant marks from: its sessions, points and objects, all as they were at one revision.

They are copied to a spool first and walked afterwards: reading them takes seconds, walking may take hours, and no
metadata store keeps a revision for that long.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from holdfast_coordinator import keyspace
from holdfast_coordinator.barrier import Walk
from holdfast_coordinator.bootstrap import SYSTEM_TENANT
from holdfast_coordinator.collection.spool import RecordSpool
from holdfast_coordinator.commit_rules import positions
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.records import each, parse
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import split_ids
from holdfast_core.model.tree import DiffWalk, ObjectScan, RootScan
from holdfast_core.runtime.metadata.store import KeyValue, MetadataStore
from holdfast_proto.v1.audit_pb2 import AuditSegment
from holdfast_proto.v1.records_pb2 import ObjectRecord, PointRecord, SessionRecord, VolumeRecord

_PAGE_ITEMS: Final = 1000
_ATTEMPTS: Final = 3
_OBJECT, _POINT, _SESSION, _SEGMENT = range(4)


@dataclass(frozen=True, slots=True)
class Roots:
    """What was read.

    Attributes:
        spool: the records.
        revision: the revision of the metadata store at which all of them were there together.
        points, objects, sessions: how many there are; lineage stubs do not count.
    """

    spool: RecordSpool
    revision: int
    points: int
    objects: int
    sessions: int


class Source(NamedTuple):
    """Where to walk from, and what it is, for messages. Blocks that are named without a tree are in `block_ids`."""

    what: str
    walk: Walk
    block_ids: tuple[bytes, ...] = ()


async def lowest_session_epoch(store: MetadataStore, space: TenantKeyspace, epoch: int) -> int:
    """Return the smallest of `epoch` and the epochs of the tenant's open sessions: its cut-off.

    It may be read before the roots are: who opens a session in between does so under `epoch`, which was raised before,
    so the cut-off is never above that of the roots' revision. It is sure to be below all sessions that stay open
    throughout, although the pages are of several revisions.
    """
    return min(
        [
            epoch,
            *[parse(item, SessionRecord).message.collection_epoch async for item in each(store, space.sessions_prefix)],
        ]
    )


async def read_roots(store: MetadataStore, space: TenantKeyspace, *, scratch: Path | None) -> Roots:
    """Copy what the tenant's blocks are reached from; the cluster's own tenant has segments of the audit log, too.

    Raises:
        HoldfastError: CONFLICT if the store gives revisions up faster than they can be read; DISK_FULL.
    """
    for _ in range(_ATTEMPTS - 1):
        try:
            return await _read_once(store, space, scratch)
        except HoldfastError as error:
            if error.code is not ErrorCode.CONFLICT:
                raise
    return await _read_once(store, space, scratch)


async def _read_once(store: MetadataStore, space: TenantKeyspace, scratch: Path | None) -> Roots:
    prefixes = [space.objects_prefix, space.points_prefix, space.sessions_prefix]
    if space.tenant == SYSTEM_TENANT:
        prefixes.append(keyspace.AUDIT_SEGMENTS_PREFIX)
    spool = RecordSpool(scratch=scratch)
    counts = [0, 0, 0, 0]
    revision = 0
    try:
        async with aclosing(store.scan(prefixes, page_items=_PAGE_ITEMS)) as pages:
            async for page in pages:
                revision = page.revision
                records = [(what, item.value) for item in page.items if (what := _kind(space, item)) is not None]
                for what, _ in records:
                    counts[what] += 1
                spool.add(records)
    except BaseException:
        spool.close()
        raise
    return Roots(spool, revision, points=counts[_POINT], objects=counts[_OBJECT], sessions=counts[_SESSION])


def _kind(space: TenantKeyspace, item: KeyValue) -> int | None:
    """Return what an item is, None for one that reaches nothing."""
    if item.key.startswith(space.points_prefix):
        return None if parse(item, PointRecord).message.forgotten else _POINT
    if item.key.startswith(space.objects_prefix):
        return _OBJECT
    return _SESSION if item.key.startswith(space.sessions_prefix) else _SEGMENT


def sources(roots: Roots, known: Container[bytes]) -> Iterator[Source]:
    """Yield where to walk from; each point looks only where it differs from the one before it of the same VM.

    The walks are good only if all of them are walked to their ends: one relies on what the others find.
    """
    vm_id = ""
    before: dict[tuple[str, int], VolumeRecord] = {}
    for what, data in roots.spool.read():
        if what == _POINT:
            point = PointRecord.FromString(data)
            if point.vm_id != vm_id:
                vm_id, before = point.vm_id, {}
            yield from _of_point(point, before, known)
        elif what == _OBJECT:
            stored = ObjectRecord.FromString(data)
            scan = ObjectScan(stored.root, block_count=stored.block_count, size_bytes=stored.size_bytes, known=known)
            yield Source(f"the object {stored.storage_id} of the task {stored.task_id}", scan)
        elif what == _SESSION:
            session = SessionRecord.FromString(data)
            yield Source(
                f"what the session {session.session_id} builds on",
                RootScan(split_ids(session.pinned_roots), known=known),
            )
        else:
            segment = AuditSegment.FromString(data)
            name = f"the audit log's records from {segment.first} on"
            yield Source(name, RootScan(()), tuple(segment.block_ids))


def _of_point(
    point: PointRecord, before: dict[tuple[str, int], VolumeRecord], known: Container[bytes]
) -> Iterator[Source]:
    for volume in point.volumes:
        old = before.get((volume.name, volume.block_bytes))
        before[volume.name, volume.block_bytes] = volume
        walk = DiffWalk(
            volume.root, positions(volume), old.root if old else b"", positions(old) if old else 0, known=known
        )
        yield Source(f"the volume {volume.name} of the point {point.point_id} of the VM {point.vm_id}", walk)
