"""What a commit may say, judged without asking anybody: forms, limits, and the session it belongs to. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from holdfast_coordinator.vms import check_block_bytes
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing
from holdfast_core.model.lifecycle import KEEP_DIGEST_BYTES
from holdfast_core.model.limits import (
    BLOCK_ID_BYTES,
    READING_NOTE_CHARS_MAX,
    VOLUME_SIZE_BYTES_MAX,
    VOLUMES_PER_VM_MAX,
)
from holdfast_core.model.names import check_id, check_name, check_volume_name
from holdfast_core.model.records import object_mac, point_mac
from holdfast_proto.v1.records_pb2 import (
    OBJECT_FORM_FILES,
    Consistency,
    ObjectForm,
    ObjectOrigin,
    ObjectRecord,
    PointRecord,
    Reading,
    SessionRecord,
    VolumeRecord,
)
from holdfast_proto.v1.state_pb2 import CommitObjectRequest, CommitPointRequest

MAC_BYTES: Final = 32


def positions(volume: VolumeRecord) -> int:
    """Return how many block positions a volume has, zero blocks too."""
    return -(-volume.size_bytes // volume.block_bytes)


def check_point_request(request: CommitPointRequest) -> None:
    """Check the form of a commit.

    Raises:
        HoldfastError: INVALID_ARGUMENT or LIMIT_EXCEEDED for what no honest client sends.
    """
    if not request.volumes:
        raise _refused("the commit names no volume")
    if len(request.volumes) > VOLUMES_PER_VM_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED, f"the commit names {len(request.volumes)} volumes; {VOLUMES_PER_VM_MAX} at most"
        )
    names = [volume.name for volume in request.volumes]
    if len(set(names)) != len(names):
        raise _refused("the commit names a volume twice")
    for volume in request.volumes:
        _check_volume(volume)
    _check_mac(request.mac)


def check_object_request(request: CommitObjectRequest) -> None:
    """Check the form of an object's commit. Raises as `check_point_request`."""
    _check_root(request.root, "object")
    if bool(request.root) != bool(request.size_bytes) or bool(request.block_count) != bool(request.size_bytes):
        raise _refused("an empty object has no root and no cuts, any other has both")
    if request.block_count > request.size_bytes:
        raise _refused(f"the object has {request.block_count} cuts in {request.size_bytes} bytes")
    if request.form not in ObjectForm.values():
        raise _refused(f"the object's form {request.form} is not known")
    if request.HasField("origin"):
        if request.form != OBJECT_FORM_FILES:
            raise _refused("only an object that is a set of files says where its files come from")
        _check_origin(request.origin)
    _check_mac(request.mac)


def check_belongs(session: SessionRecord, request: CommitPointRequest) -> None:
    """Check that a commit is for a point, on the parent that its session was begun with.

    Raises:
        HoldfastError: MISMATCH.
    """
    if not session.vm_id:
        raise HoldfastError(ErrorCode.MISMATCH, f"the session {session.session_id} is for an object, not for a point")
    if session.parent_id != request.parent_id:
        raise HoldfastError(
            ErrorCode.MISMATCH,
            f"the commit builds on {request.parent_id or 'nothing'}, its session on {session.parent_id or 'nothing'}",
        )


def new_point(session: SessionRecord, request: CommitPointRequest, ring: KeyRing) -> PointRecord:
    """Return the record that a commit makes, without number and time.

    Raises:
        HoldfastError: INVALID_ARGUMENT if the MAC covers something else; not checked where the data secret is withheld.
    """
    point = PointRecord(
        point_id=session.session_id,
        vm_id=session.vm_id,
        parent_id=session.parent_id,
        volumes=sorted(request.volumes, key=lambda volume: volume.name),
        mac=request.mac,
        stats=request.stats,
        tenant=ring.tenant,
        labels=session.labels,
        definition_name=session.definition_name,
    )
    if ring.has_data and point.mac != point_mac(
        ring,
        tenant=ring.tenant,
        point_id=point.point_id,
        vm_id=point.vm_id,
        parent_id=point.parent_id,
        volumes=point.volumes,
    ):
        raise _refused("the MAC covers something else than what is to be committed")
    return point


def new_object(session: SessionRecord, request: CommitObjectRequest, ring: KeyRing) -> ObjectRecord:
    """Return the record that an object's commit makes, without time.

    Raises:
        HoldfastError: MISMATCH if the session is for a point; INVALID_ARGUMENT as `new_point`.
    """
    if not session.task_id:
        raise HoldfastError(ErrorCode.MISMATCH, f"the session {session.session_id} is for a point, not for an object")
    stored = ObjectRecord(
        storage_id=session.session_id,
        task_id=session.task_id,
        size_bytes=request.size_bytes,
        root=request.root,
        mac=request.mac,
        stats=request.stats,
        block_count=request.block_count,
        tenant=ring.tenant,
        form=request.form,
        origin=request.origin if request.HasField("origin") else None,
    )
    if ring.has_data and stored.mac != object_mac(
        ring,
        tenant=ring.tenant,
        storage_id=stored.storage_id,
        task_id=stored.task_id,
        size_bytes=stored.size_bytes,
        root=stored.root,
    ):
        raise _refused("the MAC covers something else than what is to be committed")
    return stored


def comparable(
    volumes: Sequence[VolumeRecord], parent: PointRecord | None, base: PointRecord | None
) -> Mapping[str, VolumeRecord]:
    """Return, by name, the older volumes that vouch for what the new ones inherit.

    The parent's where it has one of that name and block size, else the base's. Another block size puts other bytes at
    each position, so nothing is inherited there.
    """
    found: dict[str, VolumeRecord] = {}
    for older in (base, parent):
        if older is not None:
            found.update({volume.name: volume for volume in older.volumes})
    return {
        volume.name: found[volume.name]
        for volume in volumes
        if volume.name in found and found[volume.name].block_bytes == volume.block_bytes
    }


def _check_volume(volume: VolumeRecord) -> None:
    check_volume_name(volume.name)
    check_block_bytes(volume.block_bytes, volume.name)
    _check_root(volume.root, f"volume {volume.name}")
    if volume.size_bytes > VOLUME_SIZE_BYTES_MAX:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED,
            f"the volume {volume.name} has {volume.size_bytes} bytes; {VOLUME_SIZE_BYTES_MAX} are allowed",
        )
    if volume.block_count > positions(volume):
        raise _refused(f"the volume {volume.name} has {volume.block_count} blocks in {volume.size_bytes} bytes")
    if bool(volume.root) != bool(volume.block_count):
        raise _refused(f"the volume {volume.name} has a root without blocks, or blocks without a root")
    if volume.consistency not in Consistency.values() or not volume.consistency:
        raise _refused(f"the volume {volume.name} does not say how its source stood")
    if volume.reading not in Reading.values():
        raise _refused(f"the volume {volume.name} says in no known way how it was read")
    if len(volume.reading_note) > READING_NOTE_CHARS_MAX:
        raise _refused(
            f"the note on how the volume {volume.name} was read has {len(volume.reading_note)} characters; "
            f"{READING_NOTE_CHARS_MAX} are allowed"
        )


def _check_origin(origin: ObjectOrigin) -> None:
    if origin.vm_id or origin.point_id or origin.volume:
        check_name(origin.vm_id, "VM name")
        check_id(origin.point_id, "point id")
        check_volume_name(origin.volume)
    if bool(origin.keep_rule) != bool(origin.keep_digest) or len(origin.keep_digest) not in (0, KEEP_DIGEST_BYTES):
        raise _refused("an object names a keep rule with its digest, or neither")
    if origin.keep_rule:
        check_name(origin.keep_rule, "keep rule's name")
        if not origin.point_id:
            raise _refused(f"an object that fulfils the keep rule {origin.keep_rule} names the point it comes from")


def _check_root(root: bytes, what: str) -> None:
    if len(root) not in (0, BLOCK_ID_BYTES):
        raise _refused(f"the root of the {what} has {len(root)} bytes; an id has {BLOCK_ID_BYTES}")


def _check_mac(mac: bytes) -> None:
    if len(mac) != MAC_BYTES:
        raise _refused(f"the MAC has {len(mac)} bytes; it takes {MAC_BYTES}")


def _refused(message: str) -> HoldfastError:
    return HoldfastError(ErrorCode.INVALID_ARGUMENT, message)
