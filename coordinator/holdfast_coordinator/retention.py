"""Rules that say which points of a VM are kept: set, and applied by a call or from time to time (ADR 0131).

What goes is forgotten one point at a time, oldest first, each in a transaction of its own with its line in the audit
log. Each compares the registration and the newest point, so that nothing goes once the rules, a lock or the newest
point are others than the plan was made with; then the plan is made anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.cautious_clock import CautiousClock
from holdfast_coordinator.keyspace import TenantKeyspace
from holdfast_coordinator.locks import LOCKED_FACT, Locks
from holdfast_coordinator.points import Points
from holdfast_coordinator.records import Stored, each, parse
from holdfast_coordinator.transactions import ATTEMPTS_MAX, Outcome, contention
from holdfast_coordinator.vms import Vms, check_lives
from holdfast_core.model.audit.record import REPEATED
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.retention import PlannedPoint, RetentionPlan, check_rules, plan_retention, told_rules
from holdfast_core.runtime.metadata.store import MetadataStore, Put
from holdfast_proto.v1.records_pb2 import RetentionRules, SessionRecord, VmRecord
from holdfast_proto.v1.state_pb2 import RetainedPoint

FORGOTTEN_PER_CALL_MAX: Final = 10_000

Pins = Mapping[str, Sequence[str]]
"""Reasons to keep points beside the rules, by point id."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What applying rules came to: the living points, newest first, and which of them are forgotten now."""

    points: Sequence[PlannedPoint]
    forgotten: frozenset[str]

    def told(self) -> list[RetainedPoint]:
        """Return it as it travels."""
        return [
            RetainedPoint(
                point_id=point.point_id,
                created_unix_ms=point.created_unix_ms,
                reasons=point.reasons,
                forgotten=point.point_id in self.forgotten,
            )
            for point in self.points
        ]


@dataclass(slots=True)
class _Run:
    """One call that applies rules, over all the plans that it takes.

    Attributes:
        most: how many points it may forget.
        met: what the newest plan that knew a point said of it.
        forgotten: what it has forgotten.
    """

    entry: Entry
    most: int
    met: dict[str, PlannedPoint] = field(default_factory=dict)
    forgotten: list[str] = field(default_factory=list)

    def line(self, point_id: str, rules: str) -> Entry:
        """Return the entry of one forgotten point: a line of its own beside the call's."""
        number = len(self.forgotten) + 1
        return replace(
            self.entry,
            entry_id=f"{int(self.entry.entry_id, 16) ^ number:016x}",
            details={"point": point_id, "rules": rules},
        )


class Retention:
    """Retention of one tenant's points."""

    def __init__(
        self,
        store: MetadataStore,
        space: TenantKeyspace,
        ledger: Ledger,
        *,
        vms: Vms,
        points: Points,
        locks: Locks,
        clock: CautiousClock,
    ) -> None:
        """Bind to the store; locks end by `clock`."""
        self._store = store
        self._space = space
        self._ledger = ledger
        self._vms = vms
        self._points = points
        self._locks = locks
        self._clock = clock

    async def set_rules(self, vm_id: str, rules: RetentionRules | None, entry: Entry) -> None:
        """Keep the points of a VM by these rules from now on; None keeps everything. Nothing is forgotten by this.

        Raises:
            HoldfastError: as `check_rules`; NOT_FOUND; CONFLICT if the VM is being discarded, or under contention.
        """
        if rules is not None:
            check_rules(rules)
        entry.details["rules"] = told_rules(rules)
        for _ in range(ATTEMPTS_MAX):
            vm = await self._vms.get(vm_id)
            check_lives(vm.message)
            if rules_of(vm.message) == rules:
                entry.repeated()
                return
            vm.message.ClearField("retention")
            if rules is not None:
                vm.message.retention.CopyFrom(rules)
            written = Put(vm.key, vm.message.SerializeToString())
            if await self._ledger.apply(entry, [vm.unchanged], [written]) is Outcome.APPLIED:
                return
        raise contention(f"the rules of the VM {vm_id}")

    async def apply(
        self,
        vm_id: str,
        rules: RetentionRules | None,
        entry: Entry,
        *,
        dry_run: bool = False,
        most: int = FORGOTTEN_PER_CALL_MAX,
        templates: Pins | None = None,
    ) -> Applied:
        """Forget what the rules do not keep, at most `most` points; with `dry_run` only say what that would be.

        Without `rules` those of the VM count; a VM without any keeps everything. `templates` are what `templates`
        returned a moment ago, for who has several VMs to look at.

        Raises:
            HoldfastError: as `check_rules`; NOT_FOUND; CONFLICT if the VM is being discarded, or under contention.
        """
        if rules is not None:
            check_rules(rules)
        run = _Run(entry, most)
        for _ in range(ATTEMPTS_MAX):
            vm = await self._vms.get(vm_id)
            check_lives(vm.message)
            own = rules if rules is not None else rules_of(vm.message)
            plan = await self._plan(vm_id, own, templates if templates is not None else await self.templates())
            run.met.update((point.point_id, point) for point in plan.points)
            entry.details.update({"rules": told_rules(own), **({"dry_run": "yes"} if dry_run else {})})
            if dry_run or await self._forget(vm, plan, told_rules(own), run):
                entry.details["forgotten"] = str(len(run.forgotten))
                newest_first = sorted(run.met.values(), key=lambda point: point.number, reverse=True)
                return Applied(newest_first, frozenset(run.forgotten))
        raise contention(f"applying the rules of the VM {vm_id}")

    async def templates(self) -> Pins:
        """Return which points are templates, and of which VMs."""
        found: dict[str, list[str]] = {}
        async for item in each(self._store, self._space.vms_prefix):
            vm = parse(item, VmRecord).message
            if vm.template_id:
                found.setdefault(vm.template_id, []).append(f"template of {vm.vm_id}")
        return found

    async def ruled(self) -> list[str]:
        """Return the names of the VMs that have rules and are not being discarded."""
        vms = [parse(item, VmRecord).message async for item in each(self._store, self._space.vms_prefix)]
        return [vm.vm_id for vm in vms if vm.HasField("retention") and not vm.discarding_unix_ms]

    async def _plan(self, vm_id: str, rules: RetentionRules | None, templates: Pins) -> RetentionPlan:
        points = [stored.message for stored in await self._points.of_vm(vm_id)]
        living = [point.point_id for point in points if not point.forgotten]
        locks = await self._locks.all_of(living)
        pinned = {point_id: [*templates[point_id]] for point_id in living if point_id in templates}
        async for item in each(self._store, self._space.sessions_prefix):
            session = parse(item, SessionRecord).message
            for point_id, what in ((session.parent_id, "parent"), (session.base_id, "base")):
                if point_id:
                    pinned.setdefault(point_id, []).append(f"{what} of an open session")
        ends = {point_id: lock.message.until_unix_ms for point_id, lock in locks.items()}
        return plan_retention(points, rules, ends, pinned, self._clock.now_unix_ms())

    async def _forget(self, vm: Stored[VmRecord], plan: RetentionPlan, rules: str, run: _Run) -> bool:
        """Forget what is to go; False: something changed since the plan was made."""
        for point_id in plan.going:
            if len(run.forgotten) >= run.most:
                return True
            # Forgetting a point writes the one that takes over its charge, which may be the newest.
            newest = await self._points.find(plan.points[0].point_id)
            if newest is None or newest.message.forgotten:
                return False
            line = run.line(point_id, rules)
            try:
                if not await self._points.try_forget(point_id, line, [vm.unchanged, newest.unchanged]):
                    return False
            except HoldfastError as error:
                if error.code is not ErrorCode.NOT_FOUND and LOCKED_FACT not in error.facts:
                    raise
                return False
            if line.outcome != REPEATED:
                run.forgotten.append(point_id)
        return True


def rules_of(vm: VmRecord) -> RetentionRules | None:
    """Return a VM's rules, None if it has none."""
    return vm.retention if vm.HasField("retention") else None
