"""Locks of recovery points: until one ends, nothing forgets its point or discards its VM (ADR 0131).

Invariants:
    * Whoever removes a point compares its lock's key in the same transaction, so no lock comes in between unseen.
    * Setting a lock writes the VM's registration too, which discarding a VM compares: one condition covers the locks of
      all points, however many there are.
    * A lock is made longer or lifted, never made shorter; it vanishes with its point.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.cautious_clock import CautiousClock
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.records import Stored, load, parse, still
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_coordinator.vms import Vms, check_lives
from holdfast_core.model.dates import second_of
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import METADATA_PREFIXES_MAX, POINT_LOCK_S_MAX
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import Condition, Delete, MetadataStore, Operation, Put
from holdfast_proto.v1.records_pb2 import LockRecord, PointRecord

LOCKED_FACT: Final = "locked_until_unix_ms"


@dataclass(frozen=True, slots=True)
class Unlocked:
    """That a point is not locked, for a transaction that removes it: while that holds, and what goes with the point."""

    conditions: Sequence[Condition]
    operations: Sequence[Operation] = field(default=())


class Locks:
    """What is locked of one tenant."""

    def __init__(self, store: MetadataStore, space: TenantKeyspace, clock: CautiousClock) -> None:
        """Bind to the store; locks end by `clock`."""
        self._store = store
        self._space = space
        self._clock = clock

    async def all_of(self, point_ids: Iterable[str]) -> dict[str, Stored[LockRecord]]:
        """Return the locks of these points by point id, those that have ended too."""
        keys = [self._space.lock(point_id) for point_id in point_ids]
        found: dict[str, Stored[LockRecord]] = {}
        for at in range(0, len(keys), METADATA_PREFIXES_MAX):
            portion = keys[at : at + METADATA_PREFIXES_MAX]
            for item in (await self._store.snapshot(portion)).items:
                if item.key in portion:
                    lock = parse(item, LockRecord)
                    found[lock.message.point_id] = lock
        return found

    async def of(self, point_ids: Iterable[str]) -> dict[str, LockRecord]:
        """Return the locks that keep these points now, by point id."""
        locks = (await self.all_of(point_ids)).items()
        return {point_id: lock.message for point_id, lock in locks if self.holds(lock.message)}

    def holds(self, lock: LockRecord) -> bool:
        """Return whether a lock has not ended."""
        return lock.until_unix_ms > self._clock.now_unix_ms()

    async def unlocked(self, point_id: str) -> Unlocked:
        """Return what a transaction compares and removes that forgets the point.

        Raises:
            HoldfastError: CONFLICT, with the fact `locked_until_unix_ms`, while it is locked.
        """
        lock = await load(self._store, self._space.lock(point_id), LockRecord)
        if lock is None:
            return Unlocked([still(self._space.lock(point_id), None)])
        if self.holds(lock.message):
            raise _locked(f"the point {point_id} is", lock.message)
        return Unlocked([lock.unchanged], [Delete(lock.key)])

    async def ended_of(self, vm_id: str, point_ids: Iterable[str]) -> dict[str, str]:
        """Return the keys of locks that have ended by point id, if no other lock keeps a point of the VM.

        Raises:
            HoldfastError: CONFLICT, with the fact `locked_until_unix_ms`, while one is locked.
        """
        locks = await self.all_of(point_ids)
        holding = [lock.message for lock in locks.values() if self.holds(lock.message)]
        if holding:
            last = max(holding, key=lambda lock: lock.until_unix_ms)
            raise _locked(f"the VM {vm_id} has {len(holding)} locked points, of which {last.point_id} is", last)
        return {point_id: lock.key for point_id, lock in locks.items()}


class Locking:
    """Sets and lifts locks of one tenant."""

    def __init__(self, store: MetadataStore, space: TenantKeyspace, ledger: Ledger, *, vms: Vms, clock: Clock) -> None:
        """Bind to the store."""
        self._store = store
        self._space = space
        self._ledger = ledger
        self._vms = vms
        self._clock = clock

    async def lock(self, point_id: str, until_unix_ms: int, entry: Entry) -> LockRecord:
        """Lock a point until then; one that is locked for longer stays so. Returns the lock as it is.

        Raises:
            HoldfastError: INVALID_ARGUMENT for a time that is past; LIMIT_EXCEEDED for one more than 100 years ahead;
                NOT_FOUND if the point is gone or forgotten; CONFLICT if its VM is being discarded, or under contention.
        """
        now_unix_ms = self._clock.now_unix_ms()
        check_until(until_unix_ms, now_unix_ms)
        for _ in range(ATTEMPTS_MAX):
            point = await self._point(point_id)
            vm = await self._vms.get(point.message.vm_id)
            check_lives(vm.message)
            present = await load(self._store, self._space.lock(point_id), LockRecord)
            if present is not None and present.message.until_unix_ms >= until_unix_ms:
                entry.repeated()
                return present.message
            lock = LockRecord(
                point_id=point_id, until_unix_ms=until_unix_ms, principal=entry.principal, set_unix_ms=now_unix_ms
            )
            entry.details["until_unix_ms"] = str(until_unix_ms)
            conditions = [
                point.unchanged,
                vm.unchanged,
                present.unchanged if present is not None else still(self._space.lock(point_id), None),
            ]
            operations = [
                Put(self._space.lock(point_id), lock.SerializeToString()),
                Put(vm.key, vm.message.SerializeToString()),
            ]
            if await self._ledger.apply(entry, conditions, operations) is Outcome.APPLIED:
                return lock
        raise contention(f"locking the point {point_id}")

    async def unlock(self, point_id: str, entry: Entry) -> None:
        """Lift a lock; nothing happens if there is none.

        Raises:
            HoldfastError: CONFLICT under contention.
        """
        for _ in range(ATTEMPTS_MAX):
            present = await load(self._store, self._space.lock(point_id), LockRecord)
            if present is None:
                entry.repeated()
                return
            entry.details["until_unix_ms"] = str(present.message.until_unix_ms)
            if await self._ledger.apply(entry, [present.unchanged], [Delete(present.key)]) is Outcome.APPLIED:
                return
        raise contention(f"unlocking the point {point_id}")

    async def _point(self, point_id: str) -> Stored[PointRecord]:
        place = await self._store.get(self._space.point_id(point_id))
        point = None if place is None else await load(self._store, self._space.point(place.value.decode()), PointRecord)
        if point is None or point.message.point_id != point_id or point.message.forgotten:
            raise HoldfastError(ErrorCode.NOT_FOUND, f"there is no living point {point_id} to lock")
        return point


def check_until(until_unix_ms: int, now_unix_ms: int) -> None:
    """Check that a lock may end then. Pure.

    Raises:
        HoldfastError: INVALID_ARGUMENT for a time that is past; LIMIT_EXCEEDED for one too far ahead, which is most
            often a time in another unit.
    """
    if until_unix_ms <= now_unix_ms:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"a lock until {second_of(until_unix_ms)} has ended already; name a later time"
        )
    if until_unix_ms - now_unix_ms > POINT_LOCK_S_MAX * 1000:
        raise HoldfastError(
            ErrorCode.LIMIT_EXCEEDED, f"a lock lasts {POINT_LOCK_S_MAX // 86_400} days at most; name an earlier time"
        )


def _locked(what: str, lock: LockRecord) -> HoldfastError:
    return HoldfastError(
        ErrorCode.CONFLICT,
        f"{what} locked until {second_of(lock.until_unix_ms)} by {lock.principal}; wait, or let an administrator lift "
        "the lock",
        facts={LOCKED_FACT: str(lock.until_unix_ms), "point_id": lock.point_id},
    )
