"""Recovery points that are visible: finding, listing and forgetting them. `commit` makes them."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.lineage import choose_heir, choose_restored
from holdfast_coordinator.locks import Locks
from holdfast_coordinator.records import Stored, check_fits_answer, load, parse, still
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_coordinator.usage import UsageChange
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import check_id, check_name
from holdfast_core.runtime.metadata.store import Condition, Delete, MetadataStore, Operation, Put
from holdfast_proto.v1.records_pb2 import PointRecord, VolumeRecord
from holdfast_proto.v1.tenants_pb2 import Quota


class Points:
    """Points of one tenant."""

    def __init__(
        self, store: MetadataStore, space: TenantKeyspace, ledger: Ledger, *, locks: Locks, quota: Quota
    ) -> None:
        """Bind to the store; `locks` keep points from being forgotten, `quota` is what the tenant may have."""
        self._store = store
        self._space = space
        self._ledger = ledger
        self._locks = locks
        self._quota = quota

    async def find(self, point_id: str) -> Stored[PointRecord] | None:
        """Return a point or lineage stub, None if there is no such id.

        Raises:
            HoldfastError: INVALID_ARGUMENT for a malformed id.
        """
        check_id(point_id, "point id")
        place = await self._store.get(self._space.point_id(point_id))
        if place is None:
            return None
        # Discarding a VM removes both keys at once, so that either read may find nothing; a new VM of its name may even
        # have its first point there by now.
        found = await load(self._store, self._space.point(place.value.decode()), PointRecord)
        return found if found is not None and found.message.point_id == point_id else None

    async def get(self, point_id: str, *, what: str = "point") -> Stored[PointRecord]:
        """Return a point or lineage stub; `what` names it in the message.

        Raises:
            HoldfastError: NOT_FOUND; INVALID_ARGUMENT for a malformed id.
        """
        found = await self.find(point_id)
        if found is None:
            raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no {what} {point_id}")
        return found

    async def whole(self, point: PointRecord) -> PointRecord:
        """Return the point with the definition that its VM had; everything else of this class leaves that out."""
        if point.definition_name:
            item = await self._store.get(self._space.point_definition(point.point_id))
            point.definition = item.value if item else b""
        return point

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

    async def forget(self, point_id: str, entry: Entry) -> None:
        """Leave only a lineage stub of a point; nothing happens if it is one already.

        What the point was charged for may live on in the points that build on it, so its charge moves to the nearest of
        them that is alive; where there is none, it ends. An open session that builds on the point is not disturbed: it
        pins the roots.

        Raises:
            HoldfastError: NOT_FOUND; INVALID_ARGUMENT for a malformed id; CONFLICT while it is locked, or under
                contention.
        """
        for _ in range(ATTEMPTS_MAX):
            if await self.try_forget(point_id, entry):
                return
        raise contention(f"forgetting the point {point_id}")

    async def try_forget(self, point_id: str, entry: Entry, only_if: Sequence[Condition] = ()) -> bool:
        """Forget a point as `forget` does, if these conditions hold too; False: something changed, read again.

        Raises:
            HoldfastError: as `forget`.
        """
        found = await self.get(point_id)
        if found.message.forgotten:
            entry.repeated()
            return True
        unlocked = await self._locks.unlocked(point_id)
        # Read before the points: any point that becomes visible later changes it, and so the heir stays the heir.
        number_key = self._space.point_number(found.message.vm_id)
        number = await self._store.get(number_key)
        heir = await self._heir(found.message)
        conditions: list[Condition] = [found.unchanged, still(number_key, number), *unlocked.conditions]
        operations: list[Operation] = [
            Put(found.key, stub_of(found.message).SerializeToString()),
            *unlocked.operations,
        ]
        if found.message.definition_name:
            operations.append(Delete(self._space.point_definition(point_id)))
        freed = found.message.charged_bytes
        if heir is not None:
            before = heir.message.charged_bytes
            heir.message.charged_bytes = inherited(heir.message, freed)
            freed -= heir.message.charged_bytes - before
            conditions.append(heir.unchanged)
            operations.append(Put(heir.key, heir.message.SerializeToString()))
        usage = UsageChange(tenant=self._space.tenant, quota=self._quota, bytes=-freed) if freed else None
        together = list(dict.fromkeys([*conditions, *only_if]))
        return await self._ledger.apply(entry, together, operations, usage) is Outcome.APPLIED

    async def _heir(self, point: PointRecord) -> Stored[PointRecord] | None:
        """Return who takes over a point's charge, if there is one and something to take."""
        if not point.charged_bytes:
            return None
        points = await self.of_vm(point.vm_id)
        heir = choose_heir(point.point_id, [stored.message for stored in points])
        return next((stored for stored in points if heir and stored.message.point_id == heir.point_id), None)


def inherited(heir: PointRecord, charge_bytes: int) -> int:
    """Return what a point is charged with once it takes over a forgotten one's charge. Pure.

    Never more than its volumes hold: the rest was of content that went with the forgotten point.
    """
    size_bytes = sum(volume.size_bytes for volume in heir.volumes)
    return max(heir.charged_bytes, min(heir.charged_bytes + charge_bytes, size_bytes))


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
