"""Open sessions: beginning, keeping and ending them. DESIGN section 10; `docs/adr/0041-sessions.md`.

A session is two keys under one lease: its record, and for a point the key that holds the VM. Both are made, and both
removed, by one transaction each; when the lease ends, the store removes both at once. Whoever takes over deletes the
first session's record in the transaction that makes the second: from then on the first cannot commit, whatever it does.
The id is made from the caller's nonce, so that the same Begin sent again, to any coordinator, finds what it made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.collection.epochs import present_epoch
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.lineage import choose_parent
from holdfast_coordinator.ownership import Caller, check_owner, describe_step, lapsed, of_task, of_vm
from holdfast_coordinator.points import Points, roots_of
from holdfast_coordinator.records import Stored, load, still
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_coordinator.usage import UsageChange, changed
from holdfast_coordinator.vms import Vms, check_lives
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.names import BACKUP_PREFIX, OBJECT_PREFIX, SNAPSHOT_PREFIX, check_id, check_name, make_id
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import Absent, Condition, Delete, KeyValue, MetadataStore, Operation, Put
from holdfast_proto.v1.records_pb2 import PointRecord, SessionRecord, VmRecord
from holdfast_proto.v1.state_pb2 import BeginObjectRequest, BeginPointRequest
from holdfast_proto.v1.tenants_pb2 import Quota

NONCE_BYTES = 16


@dataclass(frozen=True, slots=True)
class PointSession:
    """An open session for a point, with what it builds on."""

    record: SessionRecord
    vm: VmRecord
    parent: PointRecord | None
    base: PointRecord | None


@dataclass(slots=True)
class _Plan:
    """What a Begin read, and the conditions under which that stays true."""

    vm: VmRecord
    parent: PointRecord | None = None
    base: PointRecord | None = None
    conditions: list[Condition] = field(default_factory=list)
    fencing: list[Operation] = field(default_factory=list)
    takeover_of: str = ""
    definition: bytes = b""


class Sessions:
    """Sessions of one tenant."""

    def __init__(
        self,
        store: MetadataStore,
        space: TenantKeyspace,
        ledger: Ledger,
        *,
        vms: Vms,
        points: Points,
        key_epoch: int,
        clock: Clock,
        ttl_s: float,
        quota: Quota,
    ) -> None:
        """Bind to the store.

        Args:
            store, space, ledger, vms, points, clock: what it works with.
            key_epoch: what new sessions seal with.
            ttl_s: the term of a lease, seconds.
            quota: what the tenant may have; no session begins once that is used up.
        """
        self._store = store
        self._space = space
        self._ledger = ledger
        self._vms = vms
        self._points = points
        self._key_epoch = key_epoch
        self._clock = clock
        self._quota = quota
        self.ttl_s = ttl_s

    async def begin_point(
        self, request: BeginPointRequest, entry: Entry, *, may_list: Callable[[str], bool]
    ) -> PointSession:
        """Open a session for a point, or find the one that the same request of the same principal opened.

        A snapshot without a base takes the VM's template as its base while that point lives and is of a VM whose points
        the caller may list, which `may_list` tells.

        Raises:
            HoldfastError: NOT_FOUND, MISMATCH, NO_PARENT for what it names; BUSY with `seconds_left` while another
                session holds the VM; ALREADY_EXISTS if the nonce was used for something else; INVALID_ARGUMENT;
                QUOTA_EXCEEDED; CONFLICT under contention, or if the VM is being discarded.
        """
        session_id = _session_id(BACKUP_PREFIX if request.incremental else SNAPSHOT_PREFIX, request.nonce)
        check_name(request.vm_id, "VM name")
        if request.incremental and not request.snapshot_id:
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "a backup names the snapshot that its lineage starts from")
        if not request.incremental and (request.snapshot_id or request.parent_id):
            raise HoldfastError(ErrorCode.INVALID_ARGUMENT, "a snapshot has no parent; make a backup instead")
        describe_step(entry, session_id, "begin", of_vm(request.vm_id))
        for _ in range(ATTEMPTS_MAX):
            resumed = await self._resume(session_id, request.vm_id, entry)
            if resumed is not None:
                entry.repeated()
                return resumed
            plan = await self._plan(request, session_id, may_list)
            if plan is None:
                continue
            await self._check_room(objects=0)
            record = await self._new_record(session_id, entry)
            record.vm_id = request.vm_id
            record.parent_id = plan.parent.point_id if plan.parent else ""
            record.base_id = plan.base.point_id if plan.base else ""
            record.pinned_roots = b"".join(
                root for point in (plan.parent, plan.base) if point for root in roots_of(point.volumes)
            )
            record.labels.extend(plan.vm.labels)
            held: list[Operation] = [
                Put(self._space.vm_session(request.vm_id), session_id.encode(), record.lease_id),
                *plan.fencing,
            ]
            if plan.definition:
                record.definition_name = plan.vm.definition_name
                held.append(Put(self._space.point_definition(session_id), plan.definition, record.lease_id))
            entry.details.update({"parent": record.parent_id} if record.parent_id else {})
            entry.details.update({"takeover_of": plan.takeover_of} if plan.takeover_of else {})
            if await self._open(entry, record, plan.conditions, held):
                return PointSession(record, plan.vm, plan.parent, plan.base)
        raise contention(f"the session for {request.vm_id}")

    async def begin_object(self, request: BeginObjectRequest, entry: Entry) -> SessionRecord:
        """Open a session for an object, or find the one that the same request of the same principal opened.

        Raises:
            HoldfastError: ALREADY_EXISTS if the nonce was used for something else; INVALID_ARGUMENT;
                QUOTA_EXCEEDED; CONFLICT.
        """
        session_id = _session_id(OBJECT_PREFIX, request.nonce)
        check_name(request.task_id, "task name")
        describe_step(entry, session_id, "begin", of_task(request.task_id))
        for _ in range(ATTEMPTS_MAX):
            found = await self.find(session_id)
            if found is not None and await self._renewed(found):
                if found.message.task_id != request.task_id or not _began(found.message, entry):
                    raise _nonce_used(session_id)
                entry.repeated()
                return found.message
            if await self._store.get(self._space.object_id(session_id)) is not None:
                raise _nonce_used(session_id)
            await self._check_room(objects=1)
            record = await self._new_record(session_id, entry)
            record.task_id = request.task_id
            if await self._open(entry, record, [Absent(self._space.object_id(session_id))], []):
                return record
        raise contention(f"the session for an object of {request.task_id}")

    async def find(self, session_id: str) -> Stored[SessionRecord] | None:
        """Return an open session, None if there is none of that id.

        Raises:
            HoldfastError: INVALID_ARGUMENT for a malformed id.
        """
        check_id(session_id, "session id")
        return await load(self._store, self._space.session(session_id), SessionRecord)

    async def get(self, session_id: str) -> Stored[SessionRecord]:
        """Return an open session. Raises SESSION_LAPSED if there is none of that id."""
        found = await self.find(session_id)
        if found is None:
            raise lapsed(session_id)
        return found

    async def keep_alive(self, session_id: str, caller: Caller) -> tuple[SessionRecord, float]:
        """Give a session a new full term; return it with the seconds it has.

        Raises:
            HoldfastError: SESSION_LAPSED if it has ended, was taken over, never was, or is another principal's; DENIED
                if the caller may not any more.
        """
        found = await self.get(session_id)
        check_owner(caller, found.message, "keep-alive")
        try:
            return found.message, await self._store.keep_lease(found.message.lease_id)
        except HoldfastError as error:
            if error.code is ErrorCode.NOT_FOUND:
                raise lapsed(session_id) from error
            raise

    async def abort(self, session_id: str, caller: Caller) -> None:
        """End a session without a result; nothing happens if it has ended already, whichever way.

        Raises:
            HoldfastError: SESSION_LAPSED if it is another principal's; DENIED if the caller may not any more; CONFLICT.
        """
        for _ in range(ATTEMPTS_MAX):
            found = await self.find(session_id)
            if found is None:
                caller.filtered()
                describe_step(caller.entry, session_id, "abort")
                caller.entry.repeated()
                return
            check_owner(caller, found.message, "abort")
            ending = self.closing(found.message)
            if found.message.definition_name:
                ending.append(Delete(self._space.point_definition(session_id)))
            outcome = await self._ledger.apply(caller.entry, [found.the_same], ending)
            if outcome is Outcome.APPLIED:
                return
        raise contention(f"the end of the session {session_id}")

    def closing(self, record: SessionRecord) -> list[Operation]:
        """Return the operations that remove a session; only together with its `the_same` condition."""
        operations: list[Operation] = [Delete(self._space.session(record.session_id))]
        if record.vm_id:
            operations.append(Delete(self._space.vm_session(record.vm_id)))
        return operations

    async def _resume(self, session_id: str, vm_id: str, entry: Entry) -> PointSession | None:
        """Return the session that this id has already, None if there is none."""
        found = await self.find(session_id)
        if found is None:
            if await self._store.get(self._space.point_id(session_id)) is not None:
                raise _nonce_used(session_id)
            return None
        record = found.message
        if record.vm_id != vm_id or not _began(record, entry):
            raise _nonce_used(session_id)
        if not await self._renewed(found):
            return None
        vm = (await self._vms.get(vm_id)).message
        parent = (await self._points.get(record.parent_id)).message if record.parent_id else None
        # The base's VM may have been discarded meanwhile: then there is nothing more to take from it.
        base = await self._points.find(record.base_id) if record.base_id else None
        return PointSession(record, vm, parent, base.message if base else None)

    async def _plan(self, request: BeginPointRequest, session_id: str, may_list: Callable[[str], bool]) -> _Plan | None:
        """Read all that a new session depends on; None if it changed meanwhile."""
        vm = await self._vms.get(request.vm_id)
        check_lives(vm.message)
        # Read before the points: any point that becomes visible later changes it, and so the newest parent stays so.
        number_key = self._space.point_number(request.vm_id)
        number = await self._store.get(number_key)
        plan = _Plan(vm.message, conditions=[vm.unchanged, still(number_key, number)])
        plan.conditions.append(Absent(self._space.point_id(session_id)))
        if request.incremental:
            parent = await self._parent(request)
            plan.parent = parent.message
            plan.conditions.append(parent.unchanged)
        base = await self._base(request, vm.message, may_list)
        if base is not None:
            plan.base = base.message
            if plan.parent is None or base.message.point_id != plan.parent.point_id:
                plan.conditions.append(base.unchanged)
        if vm.message.definition_name:
            # Whoever replaces it writes the registration too, and that is compared.
            definition = await self._store.get(self._space.vm_definition(request.vm_id))
            plan.definition = definition.value if definition else b""
        return plan if await self._plan_holder(request, session_id, plan) else None

    async def _base(
        self, request: BeginPointRequest, vm: VmRecord, may_list: Callable[[str], bool]
    ) -> Stored[PointRecord] | None:
        if request.base_id:
            base = await self._points.get(request.base_id, what="base point")
            if base.message.forgotten:
                raise HoldfastError(ErrorCode.NOT_FOUND, f"the base point {request.base_id} was forgotten")
            return base
        if not vm.template_id or request.incremental:
            return None
        template = await self._points.find(vm.template_id)
        if template is None or template.message.forgotten or not may_list(template.message.vm_id):
            return None
        return template

    async def _parent(self, request: BeginPointRequest) -> Stored[PointRecord]:
        for point_id, what in ((request.snapshot_id, "snapshot"), (request.parent_id, "parent")):
            if not point_id:
                continue
            named = await self._points.get(point_id, what=what)
            if named.message.vm_id != request.vm_id:
                raise HoldfastError(
                    ErrorCode.MISMATCH,
                    f"the {what} {point_id} is of the VM {named.message.vm_id}, not of {request.vm_id}",
                )
        points: Sequence[Stored[PointRecord]] = await self._points.of_vm(request.vm_id)
        chosen = choose_parent(request.snapshot_id, request.parent_id, [point.message for point in points])
        return next(point for point in points if point.message.point_id == chosen.point_id)

    async def _plan_holder(self, request: BeginPointRequest, session_id: str, plan: _Plan) -> bool:
        """Add what it takes to hold the VM; False if what was read before is out of date: decide anew.

        Raises:
            HoldfastError: BUSY while another session holds it and the request does not take over.
        """
        holder = await self._store.get(self._space.vm_session(request.vm_id))
        plan.conditions.append(still(self._space.vm_session(request.vm_id), holder))
        if holder is None:
            return True
        holder_id = holder.value.decode()
        if holder_id == session_id:
            return False  # the same Begin, served by another coordinator at this moment, was quicker
        if request.takeover:
            plan.fencing.append(Delete(self._space.session(holder_id)))
            plan.takeover_of = holder_id
            return True
        await self._check_ended(request.vm_id, holder)
        return False

    async def check_unheld(self, vm_id: str) -> Condition:
        """Return the condition that no session holds the VM.

        Raises:
            HoldfastError: BUSY with `seconds_left` while one does.
        """
        key = self._space.vm_session(vm_id)
        holder = await self._store.get(key)
        if holder is not None:
            await self._check_ended(vm_id, holder)
        return Absent(key)

    async def _check_ended(self, vm_id: str, holder: KeyValue) -> None:
        """Return if the lease of who held the VM has ended just now. Raises BUSY."""
        try:
            left_s = await self._store.lease_left(holder.lease_id)
        except HoldfastError as error:
            if error.code is ErrorCode.NOT_FOUND:
                return
            raise
        holder_id = holder.value.decode()
        raise HoldfastError(
            ErrorCode.BUSY,
            f"the VM {vm_id} is held by the session {holder_id} for another {math.ceil(left_s)} s unless that "
            "is kept alive; wait, or take over",
            facts={"seconds_left": str(math.ceil(left_s)), "session_id": holder_id},
        )

    async def _renewed(self, found: Stored[SessionRecord]) -> bool:
        """Give the session a full term again; False if its lease ended just now."""
        try:
            await self._store.keep_lease(found.message.lease_id)
        except HoldfastError as error:
            if error.code is ErrorCode.NOT_FOUND:
                return False
            raise
        return True

    async def _check_room(self, *, objects: int) -> None:
        """Check that the commit could add so many objects and a byte: better now than once all data has been sent.

        Raises:
            HoldfastError: QUOTA_EXCEEDED.
        """
        if self._quota.bytes or self._quota.objects:
            usage = await self._ledger.usage(self._space.tenant)
            changed(usage, UsageChange(tenant=self._space.tenant, quota=self._quota, bytes=1, objects=objects))

    async def _new_record(self, session_id: str, entry: Entry) -> SessionRecord:
        return SessionRecord(
            session_id=session_id,
            principal=entry.principal,
            key_epoch=self._key_epoch,
            started_unix_ms=self._clock.now_unix_ms(),
            lease_id=await self._store.grant_lease(self.ttl_s),
        )

    async def _open(
        self, entry: Entry, record: SessionRecord, conditions: Sequence[Condition], operations: Sequence[Operation]
    ) -> bool:
        """Make the session visible with the collection epoch of that very moment; False: read again and decide."""
        record.collection_epoch, still_present = await present_epoch(self._store)
        key = self._space.session(record.session_id)
        outcome = await self._ledger.apply(
            entry,
            [Absent(key), still_present, *conditions],
            [Put(key, record.SerializeToString(), record.lease_id), *operations],
        )
        return outcome is Outcome.APPLIED


def _began(record: SessionRecord, entry: Entry) -> bool:
    """Whether this principal began the session; one of before there were principals is anybody's."""
    return not record.principal or record.principal == entry.principal


def _nonce_used(session_id: str) -> HoldfastError:
    return HoldfastError(
        ErrorCode.ALREADY_EXISTS, f"the nonce made the id {session_id} before, for something else; draw another"
    )


def _session_id(prefix: str, nonce: bytes) -> str:
    if len(nonce) != NONCE_BYTES:
        raise HoldfastError(
            ErrorCode.INVALID_ARGUMENT, f"the nonce has {len(nonce)} bytes; a session takes {NONCE_BYTES} random ones"
        )
    return make_id(prefix, nonce)
