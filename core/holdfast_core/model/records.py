"""Records of points and objects: what authenticates them, and which point descends from which.

The MAC is keyed with a tenant's data secret, so whoever holds the structure secret alone (a coordinator of a tenant
that keeps its data to itself) cannot swap a root, a size or a parent unseen. docs/formats.md writes its input out.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Sequence
from typing import Final

from blake3 import blake3

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing
from holdfast_proto.v1.records_pb2 import ObjectRecord, PointRecord, VolumeRecord

_POINT_DOMAIN: Final = b"holdfast v1 point record\0"
_OBJECT_DOMAIN: Final = b"holdfast v1 object record\0"
_TEXT = struct.Struct("<H")


def point_mac_input(
    *, tenant: int, point_id: str, vm_id: str, parent_id: str, volumes: Sequence[VolumeRecord]
) -> bytes:
    """Return the bytes that a point's MAC covers; volumes count in order of name, whatever order they come in.

    Raises:
        HoldfastError: INVALID_ARGUMENT if two volumes have one name.
    """
    ordered = sorted(volumes, key=lambda volume: volume.name)
    if len({volume.name for volume in ordered}) != len(ordered):
        raise HoldfastError(ErrorCode.INVALID_ARGUMENT, f"point {point_id} has two volumes of one name")
    parts = [_POINT_DOMAIN, struct.pack("<I", tenant), _text(point_id), _text(vm_id), _text(parent_id)]
    parts.append(struct.pack("<I", len(ordered)))
    for volume in ordered:
        parts.append(_text(volume.name))
        parts.append(struct.pack("<QIB", volume.size_bytes, volume.block_bytes, volume.consistency))
        parts.append(_root(volume.root))
    return b"".join(parts)


def object_mac_input(*, tenant: int, storage_id: str, task_id: str, size_bytes: int, root: bytes) -> bytes:
    """Return the bytes that an object's MAC covers."""
    parts = [_OBJECT_DOMAIN, struct.pack("<I", tenant), _text(storage_id), _text(task_id)]
    return b"".join((*parts, struct.pack("<Q", size_bytes), _root(root)))


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _TEXT.pack(len(encoded)) + encoded


def _root(root: bytes) -> bytes:
    return struct.pack("<B", len(root)) + root


def point_mac(
    ring: KeyRing, *, tenant: int, point_id: str, vm_id: str, parent_id: str, volumes: Sequence[VolumeRecord]
) -> bytes:
    """Return the 32 bytes of a point's MAC.

    Raises:
        HoldfastError: KEY_MISMATCH if the data secret is withheld; INVALID_ARGUMENT if two volumes have one name.
    """
    covered = point_mac_input(tenant=tenant, point_id=point_id, vm_id=vm_id, parent_id=parent_id, volumes=volumes)
    return blake3(covered, key=ring.record_mac_key).digest()


def object_mac(ring: KeyRing, *, tenant: int, storage_id: str, task_id: str, size_bytes: int, root: bytes) -> bytes:
    """Return the 32 bytes of an object's MAC.

    Raises:
        HoldfastError: KEY_MISMATCH if the data secret is withheld.
    """
    covered = object_mac_input(tenant=tenant, storage_id=storage_id, task_id=task_id, size_bytes=size_bytes, root=root)
    return blake3(covered, key=ring.record_mac_key).digest()


def check_point(ring: KeyRing, point: PointRecord) -> None:
    """Check a point's record before anything is restored from it or built on it.

    Raises:
        HoldfastError: CORRUPT if the record is not what was committed, or is another tenant's; KEY_MISMATCH if the data
            secret is withheld.
    """
    expected = point_mac(
        ring,
        tenant=ring.tenant,
        point_id=point.point_id,
        vm_id=point.vm_id,
        parent_id=point.parent_id,
        volumes=point.volumes,
    )
    if point.tenant != ring.tenant or not hmac.compare_digest(expected, point.mac):
        raise HoldfastError(ErrorCode.CORRUPT, f"the record of point {point.point_id} is not what was committed")


def check_object(ring: KeyRing, stored: ObjectRecord) -> None:
    """Check an object's record before anything is read from it.

    Raises:
        HoldfastError: CORRUPT if the record is not what was committed, or is another tenant's; KEY_MISMATCH if the data
            secret is withheld.
    """
    expected = object_mac(
        ring,
        tenant=ring.tenant,
        storage_id=stored.storage_id,
        task_id=stored.task_id,
        size_bytes=stored.size_bytes,
        root=stored.root,
    )
    if stored.tenant != ring.tenant or not hmac.compare_digest(expected, stored.mac):
        raise HoldfastError(ErrorCode.CORRUPT, f"the record of object {stored.storage_id} is not what was committed")


def descends(point_id: str, ancestor_id: str, points: Sequence[PointRecord]) -> bool:
    """Return whether `point_id` is `ancestor_id` or was made on top of it, by the records of one VM.

    Lineage stubs of forgotten points carry the line on. Unknown ids descend from nothing.
    """
    parents = {point.point_id: point.parent_id for point in points}
    return ancestor_id in parents and ancestor_id in _line(point_id, parents)


def newest_descendant(snapshot_id: str, points: Sequence[PointRecord]) -> PointRecord | None:
    """Return the newest living point that is `snapshot_id` or descends from it, or None where there is none.

    Args:
        snapshot_id: where the line begins; may itself be forgotten.
        points: all records of the VM, lineage stubs included. Newest means the highest number.
    """
    parents = {point.point_id: point.parent_id for point in points}
    if snapshot_id not in parents:
        return None
    living = [point for point in points if not point.forgotten and snapshot_id in _line(point.point_id, parents)]
    return max(living, key=lambda point: point.number, default=None)


def _line(point_id: str, parents: dict[str, str]) -> set[str]:
    """Return the point and all its known ancestors; a record that names itself as its ancestor ends the line."""
    line: set[str] = set()
    while point_id in parents and point_id not in line:
        line.add(point_id)
        point_id = parents[point_id]
    return line
