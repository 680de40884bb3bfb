"""Discarding a VM: its points and its registration go, what its tasks stored stays (ADR 0104, ADR 0105).

Invariants:
    * Nothing goes before every keep rule has its stored object, which is of the newest living point and durable then.
      Every transaction compares what that was found under.
    * Oldest points go first, in portions; the newest living one goes with the registration, in the last transaction. So
      until the end there is something that keep rules can be fulfilled from.
    * Whoever stops in between leaves a VM that is marked as being discarded: no session begins on it, and the same call
      again, to any coordinator, goes on. What is done so far is counted in the key that becomes the receipt.
    * No locked point goes, nor any other of its VM: the registration is compared, which setting a lock writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.barrier import Barrier, Findings
from holdfast_coordinator.durability import Check, Checked, Durability
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.locks import Locks
from holdfast_coordinator.metrics import CoordinatorMetrics
from holdfast_coordinator.objects import Objects
from holdfast_coordinator.records import Stored, each, load, parse, still
from holdfast_coordinator.sessions import Sessions
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_coordinator.usage import UsageChange
from holdfast_coordinator.vms import Vms
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.lifecycle import keep_digest
from holdfast_core.model.limits import KEEP_RULES_MAX, METADATA_LEASE_TTL_S_MAX
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import Condition, Delete, KeyValue, MetadataStore, Operation, Put
from holdfast_proto.v1.records_pb2 import OBJECT_FORM_FILES, KeepRule, ObjectRecord, PointRecord, VmRecord
from holdfast_proto.v1.state_pb2 import DiscardVmRequest, DiscardVmResponse, KeptObject
from holdfast_proto.v1.tenants_pb2 import Quota

# A transaction of the ledger takes 100 operations of its callers; a point takes up to four of them.
POINTS_PER_TXN: Final = 23
RECEIPT_TTL_S: Final = METADATA_LEASE_TTL_S_MAX

_LOST: Final = frozenset({ErrorCode.NOT_DURABLE, ErrorCode.CORRUPT, ErrorCode.MISSING})


@dataclass(slots=True)
class _Kept:
    """A stored object that fulfils a keep rule, and that it is durable."""

    rule: KeepRule
    stored: Stored[ObjectRecord]
    checked: Checked

    def told(self) -> KeptObject:
        stored = self.stored.message
        return KeptObject(
            storage_id=stored.storage_id,
            task_id=stored.task_id,
            keep_rule=self.rule.name,
            size_bytes=stored.size_bytes,
            file_count=stored.origin.file_count,
            point_id=stored.origin.point_id,
            durable_blocks=self.checked.findings.checked,
        )


@dataclass(slots=True)
class _Plan:
    """What is left of a VM, as it was read, and what of its discarding is done.

    Attributes:
        points: lineage stubs too, in the order in which they go.
        done: what is counted so far, as `progress` has it.
        ended_locks: keys of locks that keep their points no more, by point id.
        conditions: under which all this stays true, but for the points' own.
    """

    vm: Stored[VmRecord]
    number: KeyValue | None
    points: list[Stored[PointRecord]]
    progress: KeyValue | None
    done: DiscardVmResponse
    unheld: Condition
    ended_locks: Mapping[str, str]
    steps: int = 0
    kept: Sequence[_Kept] = ()
    checked: dict[str, Checked] = field(default_factory=dict)


class Discards:
    """Ends the lives of one tenant's VMs."""

    def __init__(
        self,
        store: MetadataStore,
        space: TenantKeyspace,
        ledger: Ledger,
        *,
        vms: Vms,
        objects: Objects,
        sessions: Sessions,
        locks: Locks,
        durability: Durability,
        clock: Clock,
        metrics: CoordinatorMetrics,
        quota: Quota,
    ) -> None:
        """Bind to the store; `quota` is what the tenant may have."""
        self._store = store
        self._space = space
        self._ledger = ledger
        self._vms = vms
        self._objects = objects
        self._sessions = sessions
        self._locks = locks
        self._durability = durability
        self._clock = clock
        self._metrics = metrics
        self._quota = quota

    async def discard(
        self, request: DiscardVmRequest, entry: Entry, *, check_kept: Callable[[str], None]
    ) -> DiscardVmResponse:
        """Remove a VM with its points and return the receipt; for a VM that is gone already, the receipt of then.

        `check_kept` is called with the task of each object that is named, and raises if the caller may not see it.

        Raises:
            HoldfastError: NOT_FOUND if there is neither the VM nor a receipt; CONFLICT, with a list of what is missing,
                while a keep rule is not fulfilled, while a point is locked, if another point is the newest by now, or
                under contention; BUSY
                with `seconds_left` while a session holds the VM; LIMIT_EXCEEDED for more objects than a VM has rules;
                what `check_kept` raises; UNREACHABLE if too few nodes or the metadata store do not answer.
        """
        if len(request.storage_ids) > KEEP_RULES_MAX:
            raise HoldfastError(
                ErrorCode.LIMIT_EXCEEDED,
                f"{len(request.storage_ids)} stored objects are named; a VM has {KEEP_RULES_MAX} keep rules at most",
            )
        known: dict[str, Checked] = {}
        for _ in range(ATTEMPTS_MAX):
            plan = await self._read(request.vm_id)
            if isinstance(plan, DiscardVmResponse):
                entry.repeated()
                return plan
            plan.checked = known
            newest = _newest(plan.points)
            if newest != request.newest_point_id:
                raise HoldfastError(
                    ErrorCode.CONFLICT,
                    f"the newest living point of {request.vm_id} is {newest or 'none'}, not "
                    f"{request.newest_point_id or 'none'}; look at what is to be kept again",
                )
            plan.done.newest_point_id = newest
            kept = await self._keep(plan, request.storage_ids, check_kept)
            if kept is None:
                continue
            plan.kept = kept
            while await self._step(plan, entry):
                if not plan.points:
                    self._metrics.discarded()
                    return plan.done
        raise contention(f"discarding the VM {request.vm_id}")

    async def _read(self, vm_id: str) -> _Plan | DiscardVmResponse:
        """Read all that is left of a VM; the receipt if that is nothing."""
        vm = await load(self._store, self._space.vm(vm_id), VmRecord)
        if vm is None:
            receipt = await load(self._store, self._space.discard(vm_id), DiscardVmResponse)
            if receipt is None or not receipt.message.discarded_unix_ms:
                raise HoldfastError(
                    ErrorCode.NOT_FOUND, f"there is no VM {vm_id}, and none was discarded within the last day"
                )
            return receipt.message
        unheld = await self._sessions.check_unheld(vm_id)
        # Read before the points: any point that becomes visible later changes it.
        number = await self._store.get(self._space.point_number(vm_id))
        points = [parse(item, PointRecord) async for item in each(self._store, self._space.points_of(vm_id))]
        newest = _newest(points)
        points.sort(key=lambda point: (point.message.point_id == newest, point.message.number))
        progress = await self._store.get(self._space.discard(vm_id))
        done = DiscardVmResponse(vm_id=vm_id)
        if progress is not None:
            done = parse(progress, DiscardVmResponse).message
        ended_locks = await self._locks.ended_of(vm_id, [point.message.point_id for point in points])
        return _Plan(vm, number, points, progress, done, unheld, ended_locks)

    async def _keep(
        self, plan: _Plan, storage_ids: Sequence[str], check_kept: Callable[[str], None]
    ) -> list[_Kept] | None:
        """Find an object for each keep rule that is durable now; None: layouts or damage changed, decide anew.

        Raises:
            HoldfastError: CONFLICT with a list of what is missing; what `check_kept` raises; UNREACHABLE.
        """
        named: dict[str, Stored[ObjectRecord]] = {}
        for storage_id in dict.fromkeys(storage_ids):
            stored = await self._objects.find(storage_id)
            if stored is not None:
                check_kept(stored.message.task_id)
                named[storage_id] = stored
        vm_id, newest = plan.vm.message.vm_id, plan.done.newest_point_id
        kept: list[_Kept] = []
        missing: dict[str, str] = {}
        for rule in plan.vm.message.keep:
            found = _fulfilling(rule, vm_id, newest, named)
            if found is None:
                missing[rule.name] = f"no object of the task {rule.task_id} holds its files as of {newest or 'a point'}"
                continue
            storage_id = found.message.storage_id
            try:
                # What is visible is marked by every collection and needs no stamp.
                checked = await self._durability.still(
                    plan.checked.get(storage_id), _check_of(found.message), collection_epoch=0
                )
            except HoldfastError as error:
                if error.code not in _LOST:
                    raise
                missing[rule.name] = f"{storage_id} is not durable ({error.code.name}: {error.message})"
                continue
            if checked is None:
                return None
            plan.checked[storage_id] = checked
            kept.append(_Kept(rule, found, checked))
        if missing:
            told = "; ".join(f"{name}: {why}" for name, why in missing.items())
            raise HoldfastError(
                ErrorCode.CONFLICT,
                f"the VM {vm_id} is not discarded, because not all that it must keep is stored: {told}",
                facts={"missing": ",".join(missing)},
            )
        return kept

    async def _step(self, plan: _Plan, entry: Entry) -> bool:
        """Remove the next portion, and the VM with the last; False: something changed, read again.

        `plan.points` is empty exactly when the VM is gone.
        """
        is_last = len(plan.points) <= POINTS_PER_TXN
        portion = plan.points if is_last else plan.points[:POINTS_PER_TXN]
        freed = sum(point.message.charged_bytes for point in portion)
        done = DiscardVmResponse()
        done.CopyFrom(plan.done)
        done.point_count += sum(not point.message.forgotten for point in portion)
        done.released_bytes += freed
        operations: list[Operation] = []
        for point in portion:
            operations += [Delete(point.key), Delete(self._space.point_id(point.message.point_id))]
            if point.message.definition_name:
                operations.append(Delete(self._space.point_definition(point.message.point_id)))
            if point.message.point_id in plan.ended_locks:
                operations.append(Delete(plan.ended_locks[point.message.point_id]))
        if is_last:
            step = entry
            operations += await self._ending(plan, done, step)
        else:
            plan.steps += 1
            step = replace(
                entry,
                # A line of its own beside the call's, which comes with the last portion.
                entry_id=f"{int(entry.entry_id, 16) ^ plan.steps:016x}",
                details={"step": "points", "points": str(len(portion)), "left": str(len(plan.points) - len(portion))},
            )
            operations += self._marking(plan, done)
        usage = UsageChange(tenant=self._space.tenant, quota=self._quota, bytes=-freed, vms=-int(is_last))
        changes = usage if freed or is_last else None
        conditions = self._conditions(plan, portion)
        if await self._ledger.apply(step, conditions, operations, changes) is not Outcome.APPLIED:
            return False
        plan.done, plan.points = done, plan.points[len(portion) :]
        return is_last or await self._advance(plan)

    def _conditions(self, plan: _Plan, portion: Sequence[Stored[PointRecord]]) -> list[Condition]:
        vm_id = plan.vm.message.vm_id
        conditions: list[Condition] = [
            plan.vm.unchanged,
            plan.unheld,
            still(self._space.point_number(vm_id), plan.number),
            still(self._space.discard(vm_id), plan.progress),
            *(point.unchanged for point in portion),
        ]
        for kept in plan.kept:
            conditions += [kept.stored.unchanged, *kept.checked.conditions]
        return list(dict.fromkeys(conditions))

    def _marking(self, plan: _Plan, done: DiscardVmResponse) -> list[Operation]:
        """Return the operations that say that the VM is being discarded, and what is done."""
        vm = plan.vm.message
        operations: list[Operation] = [Put(self._space.discard(vm.vm_id), done.SerializeToString())]
        if not vm.discarding_unix_ms:
            vm.discarding_unix_ms = self._clock.now_unix_ms()
            operations.append(Put(plan.vm.key, vm.SerializeToString()))
        return operations

    async def _ending(self, plan: _Plan, done: DiscardVmResponse, entry: Entry) -> list[Operation]:
        """Fill in the receipt and the entry, and return the operations that put the one for the other."""
        vm = plan.vm.message
        done.discarded_unix_ms = self._clock.now_unix_ms()
        del done.kept[:]
        done.kept.extend(kept.told() for kept in plan.kept)
        entry.details.update(
            {
                "step": "end",
                "points": str(done.point_count),
                "released_bytes": str(done.released_bytes),
                **({"newest": done.newest_point_id} if done.newest_point_id else {}),
                **{f"kept.{number}": kept.storage_id for number, kept in enumerate(done.kept, start=1)},
            }
        )
        lease_id = await self._store.grant_lease(RECEIPT_TTL_S)
        operations: list[Operation] = [
            Delete(plan.vm.key),
            Delete(self._space.point_number(vm.vm_id)),
            Put(self._space.discard(vm.vm_id), done.SerializeToString(), lease_id),
        ]
        if vm.definition_name:
            operations.append(Delete(self._space.vm_definition(vm.vm_id)))
        return operations

    async def _advance(self, plan: _Plan) -> bool:
        """Read what the last portion wrote; False if somebody else goes on with it."""
        vm = await load(self._store, plan.vm.key, VmRecord)
        if vm is None:
            return False
        plan.vm = vm
        plan.progress = await self._store.get(self._space.discard(vm.message.vm_id))
        return True


def _newest(points: Sequence[Stored[PointRecord]]) -> str:
    """Return the id of the newest living point, empty for none."""
    living = [point.message for point in points if not point.message.forgotten]
    return max(living, key=lambda point: point.number).point_id if living else ""


def _fulfilling(
    rule: KeepRule, vm_id: str, newest: str, named: Mapping[str, Stored[ObjectRecord]]
) -> Stored[ObjectRecord] | None:
    """Return the object among those named that holds a rule's files as of the newest point, None if there is none.

    A set without a single file fulfils nothing: that is what a mistyped pattern makes.
    """
    if not newest:
        return None
    digest = keep_digest(rule)
    for stored in named.values():
        record = stored.message
        says = (record.origin.vm_id, record.origin.point_id, record.origin.keep_rule, record.origin.keep_digest)
        if (
            record.task_id == rule.task_id
            and record.form == OBJECT_FORM_FILES
            and record.origin.file_count
            and says == (vm_id, newest, rule.name, digest)
        ):
            return stored
    return None


def _check_of(stored: ObjectRecord) -> Check:
    async def check(barrier: Barrier, damaged: frozenset[bytes]) -> Findings:
        return await barrier.check_object(stored, damaged)

    return check
