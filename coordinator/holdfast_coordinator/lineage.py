"""Which point a caller means: the parent of a backup, or what to restore. Pure; reading the points is the caller's.

Every function takes all points of one VM, lineage stubs included, oldest first.
"""

from __future__ import annotations

from collections.abc import Sequence

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.records import descends, newest_descendant
from holdfast_proto.v1.records_pb2 import PointRecord


def choose_parent(snapshot_id: str, parent_id: str, points: Sequence[PointRecord]) -> PointRecord:
    """Return the parent of a backup: `parent_id`, or else the newest living point that descends from the snapshot.

    Raises:
        HoldfastError: NO_PARENT if nothing alive descends from the snapshot, or the explicit parent was forgotten;
            MISMATCH if the explicit parent does not descend from the snapshot; NOT_FOUND if either is unknown.
    """
    snapshot = _known(snapshot_id, points, "snapshot")
    if not parent_id:
        newest = newest_descendant(snapshot.point_id, points)
        if newest is None:
            raise HoldfastError(
                ErrorCode.NO_PARENT,
                f"no living point descends from {snapshot_id}; take a new snapshot of {snapshot.vm_id}",
            )
        return newest
    parent = _descendant(parent_id, snapshot, points, "parent")
    if parent.forgotten:
        raise HoldfastError(
            ErrorCode.NO_PARENT, f"the parent {parent_id} was forgotten; name another, or none for the newest"
        )
    return parent


def choose_restored(snapshot_id: str, backup_id: str, points: Sequence[PointRecord]) -> PointRecord:
    """Return the point to restore: the backup, or the snapshot itself where `backup_id` is empty.

    Raises:
        HoldfastError: MISMATCH if the backup does not descend from the snapshot; NOT_FOUND if either is unknown or
            the point to restore was forgotten.
    """
    snapshot = _known(snapshot_id, points, "snapshot")
    point = _descendant(backup_id, snapshot, points, "backup") if backup_id else snapshot
    if point.forgotten:
        raise HoldfastError(
            ErrorCode.NOT_FOUND, f"the point {point.point_id} was forgotten; its content can no longer be restored"
        )
    return point


def choose_heir(point_id: str, points: Sequence[PointRecord]) -> PointRecord | None:
    """Return the nearest living point that builds on this one, the older of two as near; None if there is none."""
    children: dict[str, list[PointRecord]] = {}
    for point in points:
        children.setdefault(point.parent_id, []).append(point)
    generation = children.pop(point_id, [])
    while generation:
        alive = [point for point in generation if not point.forgotten]
        if alive:
            return min(alive, key=lambda point: point.number)
        # Taken out, so that records which name each other as parents end the search.
        generation = [child for point in generation for child in children.pop(point.point_id, [])]
    return None


def _known(point_id: str, points: Sequence[PointRecord], what: str) -> PointRecord:
    for point in points:
        if point.point_id == point_id:
            return point
    raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no {what} {point_id}")


def _descendant(point_id: str, snapshot: PointRecord, points: Sequence[PointRecord], what: str) -> PointRecord:
    point = _known(point_id, points, what)
    if point.point_id != snapshot.point_id and not descends(point.point_id, snapshot.point_id, points):
        raise HoldfastError(
            ErrorCode.MISMATCH, f"the {what} {point_id} does not descend from the snapshot {snapshot.point_id}"
        )
    return point
