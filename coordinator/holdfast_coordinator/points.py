"""Recovery points that are visible: finding, listing and forgetting them. `commit` makes them."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.lineage import choose_restored
from holdfast_coordinator.records import Stored, check_fits_answer, load, parse
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_id, check_name
from holdfast_core.runtime.metadata.store import MetadataStore, Put
from holdfast_proto.v1.records_pb2 import PointRecord, VolumeRecord


class Points:
    """Points of one tenant."""

    def __init__(self, store: MetadataStore, space: TenantKeyspace) -> None:
        """Bind to the store."""
        self._store = store
        self._space = space

    async def find(self, point_id: str) -> Stored[PointRecord] | None:
        """Return a point or lineage stub, None if there is no such id.

        Raises:
            HoldfastError: INVALID_ARGUMENT for a malformed id.
        """
        check_id(point_id, "point id")
        place = await self._store.get(self._space.point_id(point_id))
        if place is None:
            return None
        # Discarding a VM removes both keys at once, so that either read may find nothing.
        return await load(self._store, self._space.point(place.value.decode()), PointRecord)

    async def get(self, point_id: str, *, what: str = "point") -> Stored[PointRecord]:
        """Return a point or lineage stub; `what` names it in the message.

        Raises:
            HoldfastError: NOT_FOUND; INVALID_ARGUMENT for a malformed id.
        """
        found = await self.find(point_id)
        if found is None:
            raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no {what} {point_id}")
        return found

    async def of_vm(self, vm_id: str) -> Sequence[Stored[PointRecord]]:
        """Return a VM's points, oldest first, lineage stubs included; nothing for an unknown VM.

        Raises:
            HoldfastError: INVALID_ARGUMENT for a malformed name; LIMIT_EXCEEDED for more than one answer holds.
        """
        check_name(vm_id, "VM name")
        snapshot = await self._store.snapshot([self._space.points_of(vm_id)])
        return [parse(item, PointRecord) for item in check_fits_answer(snapshot.items, f"the VM {vm_id}")]

    async def resolve(self, snapshot_id: str, backup_id: str) -> PointRecord:
        """Return what (snapshot, backup) names.

        Raises:
            HoldfastError: NOT_FOUND, MISMATCH as `lineage.choose_restored`; INVALID_ARGUMENT for a malformed id.
        """
        snapshot = await self.get(snapshot_id, what="snapshot")
        if not backup_id or backup_id == snapshot_id:
            return choose_restored(snapshot_id, "", [snapshot.message])
        backup = await self.get(backup_id, what="backup")
        if backup.message.vm_id != snapshot.message.vm_id:
            raise HoldfastError(
                ErrorCode.MISMATCH,
                f"the backup {backup_id} is of the VM {backup.message.vm_id}, the snapshot {snapshot_id} of "
                f"{snapshot.message.vm_id}",
            )
        points = [stored.message for stored in await self.of_vm(snapshot.message.vm_id)]
        return choose_restored(snapshot_id, backup_id, points)

    async def forget(self, point_id: str) -> None:
        """Leave only a lineage stub of a point; nothing happens if it is one already.

        An open session that builds on the point is not disturbed: it pins the roots.

        Raises:
            HoldfastError: NOT_FOUND; INVALID_ARGUMENT for a malformed id; CONFLICT if the record changed meanwhile.
        """
        found = await self.get(point_id)
        if found.message.forgotten:
            return
        stub = stub_of(found.message)
        result = await self._store.txn([found.unchanged], [Put(found.key, stub.SerializeToString())])
        if not result.succeeded:
            now = await self.find(point_id)
            if now is not None and not now.message.forgotten:
                raise HoldfastError(ErrorCode.CONFLICT, f"the point {point_id} changed while it was forgotten")


def stub_of(point: PointRecord) -> PointRecord:
    """Return what stays of a forgotten point: its place in the lineage, and no content. Pure."""
    return PointRecord(
        point_id=point.point_id,
        vm_id=point.vm_id,
        parent_id=point.parent_id,
        created_unix_ms=point.created_unix_ms,
        number=point.number,
        forgotten=True,
        tenant=point.tenant,
    )


def roots_of(volumes: Sequence[VolumeRecord]) -> list[bytes]:
    """Return the root ids of the volumes that are not wholly zero."""
    return [volume.root for volume in volumes if volume.root]
