"""Commits: making what a session wrote visible, at most once and only when it is durable. DESIGN section 10.

One transaction makes the record visible and removes the session. It holds only while the session is the very one that
began, the layouts are those under which durability was checked, and no damage was recorded since. Whatever happens to
the coordinator in between, the session's id tells afterwards: if there is a record of that id, it is the answer.
"""

from __future__ import annotations

from typing import TypeVar

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.barrier import Barrier, Findings
from holdfast_coordinator.commit_rules import (
    check_belongs,
    check_object_request,
    check_point_request,
    comparable,
    new_object,
    new_point,
)
from holdfast_coordinator.durability import Check, Checked, Durability
from holdfast_coordinator.keyspace import TenantKeyspace, object_place, point_place
from holdfast_coordinator.metrics import CoordinatorMetrics
from holdfast_coordinator.objects import Objects
from holdfast_coordinator.ownership import Caller, check_made, check_owner, lapsed, of_task, of_vm
from holdfast_coordinator.points import Points
from holdfast_coordinator.records import Stored, parse_number, still
from holdfast_coordinator.sessions import Sessions
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_coordinator.usage import UsageChange
from holdfast_core.model.keys import KeyRing
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import (
    Absent,
    Condition,
    Exists,
    MetadataStore,
    Operation,
    Put,
)
from holdfast_proto.v1.records_pb2 import ObjectRecord, PointRecord, SessionRecord
from holdfast_proto.v1.state_pb2 import CommitObjectRequest, CommitPointRequest
from holdfast_proto.v1.tenants_pb2 import Quota

R = TypeVar("R", PointRecord, ObjectRecord)


class Commits:
    """Commits sessions of one tenant."""

    def __init__(
        self,
        store: MetadataStore,
        space: TenantKeyspace,
        ledger: Ledger,
        *,
        sessions: Sessions,
        points: Points,
        objects: Objects,
        durability: Durability,
        ring: KeyRing,
        clock: Clock,
        metrics: CoordinatorMetrics,
        quota: Quota,
    ) -> None:
        """Bind to the store; `quota` is what the tenant may have."""
        self._store = store
        self._space = space
        self._ledger = ledger
        self._quota = quota
        self._sessions = sessions
        self._points = points
        self._objects = objects
        self._durability = durability
        self._ring = ring
        self._clock = clock
        self._metrics = metrics

    async def commit_point(self, request: CommitPointRequest, caller: Caller) -> PointRecord:
        """Make a session's point visible; if it is already, return it.

        Raises:
            HoldfastError: NOT_DURABLE with the missing ids; SESSION_LAPSED; MISMATCH for another parent; DENIED if the
                caller may not any more what began the session; QUOTA_EXCEEDED; INVALID_ARGUMENT, LIMIT_EXCEEDED,
                CORRUPT for what no honest client sends; UNREACHABLE if too few nodes or the metadata store do not
                answer; CONFLICT under contention.
        """
        check_point_request(request)
        checked: Checked | None = None
        for _ in range(ATTEMPTS_MAX):
            session = await self._sessions.find(request.session_id)
            if session is None:
                made = await self._points.find(request.session_id)
                if made is None:
                    raise lapsed(request.session_id)
                check_made(caller, request.session_id, "commit", of_vm(made.message.vm_id))
                return made.message
            check_owner(caller, session.message, "commit")
            check_belongs(session.message, request)
            point = new_point(session.message, request, self._ring)
            checked = await self._durability.still(
                checked,
                await self._point_check(session.message, point),
                collection_epoch=session.message.collection_epoch,
            )
            if checked is None:
                continue
            point.stats.under_replicated_blocks = checked.findings.under_replicated
            if await self._publish_point(caller.entry, session, point, checked) is Outcome.APPLIED:
                self._metrics.committed("point")
                self._metrics.volumes_read(volume.reading for volume in point.volumes)
                return point
        raise contention(f"the commit of {request.session_id}")

    async def commit_object(self, request: CommitObjectRequest, caller: Caller) -> ObjectRecord:
        """Make a session's object visible; if it is already, return it. Raises as `commit_point`."""
        check_object_request(request)
        checked: Checked | None = None
        for _ in range(ATTEMPTS_MAX):
            session = await self._sessions.find(request.session_id)
            if session is None:
                made = await self._objects.find(request.session_id)
                if made is None:
                    raise lapsed(request.session_id)
                check_made(caller, request.session_id, "commit", of_task(made.message.task_id))
                return made.message
            check_owner(caller, session.message, "commit")
            stored = new_object(session.message, request, self._ring)

            async def check(barrier: Barrier, damaged: frozenset[bytes], stored: ObjectRecord = stored) -> Findings:
                return await barrier.check_object(stored, damaged)

            checked = await self._durability.still(checked, check, collection_epoch=session.message.collection_epoch)
            if checked is None:
                continue
            stored.stats.under_replicated_blocks = checked.findings.under_replicated
            if await self._publish_object(caller.entry, session, stored, checked) is Outcome.APPLIED:
                self._metrics.committed("object")
                return stored
        raise contention(f"the commit of {request.session_id}")

    async def _point_check(self, session: SessionRecord, point: PointRecord) -> Check:
        """Return the check of a point against what its session builds on.

        A parent or base that was forgotten meanwhile vouches no more by its record, nor does a base whose VM was
        discarded, so all is asked for.
        """
        parent = (await self._points.get(session.parent_id)).message if session.parent_id else None
        base = await self._points.find(session.base_id) if session.base_id else None
        older = comparable(point.volumes, parent, base.message if base else None)

        async def check(barrier: Barrier, damaged: frozenset[bytes]) -> Findings:
            return await barrier.check_volumes(point.volumes, older, damaged)

        return check

    async def _publish_point(
        self, entry: Entry, session: Stored[SessionRecord], point: PointRecord, checked: Checked
    ) -> Outcome:
        number_key = self._space.point_number(point.vm_id)
        number = await self._store.get(number_key)
        point.number = parse_number(number) + 1
        point.created_unix_ms = self._clock.now_unix_ms()
        point.charged_bytes = checked.findings.new_bytes
        place = point_place(point.vm_id, point.number)
        conditions: list[Condition] = [
            session.the_same,
            *checked.conditions,
            still(number_key, number),
            Absent(self._space.point_id(point.point_id)),
            Absent(self._space.point(place)),
        ]
        if point.parent_id:
            conditions.append(Exists(self._space.point_id(point.parent_id)))
        operations: list[Operation] = [
            Put(self._space.point(place), point.SerializeToString()),
            Put(self._space.point_id(point.point_id), place.encode()),
            Put(number_key, str(point.number).encode()),
            *self._sessions.closing(session.message),
        ]
        if point.definition_name:
            definition = await self._store.get(self._space.point_definition(point.point_id))
            if definition is not None:
                # Off the lease. Should it have ended by now, so has the session, and nothing of this is applied.
                operations.append(Put(definition.key, definition.value))
        usage = UsageChange(tenant=self._space.tenant, quota=self._quota, bytes=point.charged_bytes)
        return await self._ledger.apply(entry, conditions, operations, usage if point.charged_bytes else None)

    async def _publish_object(
        self, entry: Entry, session: Stored[SessionRecord], stored: ObjectRecord, checked: Checked
    ) -> Outcome:
        stored.created_unix_ms = self._clock.now_unix_ms()
        place = object_place(stored.task_id, stored.created_unix_ms, stored.storage_id)
        return await self._ledger.apply(
            entry,
            [session.the_same, *checked.conditions, Absent(self._space.object_id(stored.storage_id))],
            [
                Put(self._space.object(place), stored.SerializeToString()),
                Put(self._space.object_id(stored.storage_id), place.encode()),
                *self._sessions.closing(session.message),
            ],
            UsageChange(tenant=self._space.tenant, quota=self._quota, objects=1, bytes=stored.size_bytes),
        )
