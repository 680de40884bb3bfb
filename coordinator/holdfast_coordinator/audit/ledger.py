"""The ledger: every transaction that must be in the audit log goes through here, together with its record (ADR 0078).

Invariants:
    * A record and what it is about are written by one transaction, so neither is ever without the other.
    * That transaction compares and writes the head of the log, so all coordinators' appends have one strict order.
    * Whether a transaction whose answer was lost has been applied is always found out: the log holds its lines, or it
      can never be applied any more because the head has moved on.

Calls that wait share a transaction (`planning`), so the log costs no write of its own for each. What they add to
tenants' usage is added up here too: nobody else writes `usage` keys, and a copy is good for as long as the head is.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.head import Head, Turn, load_head_and_turn
from holdfast_coordinator.audit.metrics import AuditMetrics
from holdfast_coordinator.audit.planning import Batch, Plan, Proposal, Result, make_plan
from holdfast_coordinator.records import load
from holdfast_coordinator.transactions import Outcome, contention
from holdfast_coordinator.usage import UsageChange
from holdfast_core.model.audit.heads import HeadSigner
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.clock import Clock
from holdfast_core.runtime.metadata.store import (
    OUTCOME_FACT,
    OUTCOME_UNKNOWN,
    Condition,
    MetadataStore,
    ModRevisionIs,
    Operation,
    Put,
)
from holdfast_proto.v1.audit_pb2 import AuditBatch
from holdfast_proto.v1.tenants_pb2 import Usage

# How often an append is tried. Each failed try means that another coordinator has appended, or that an answer was lost.
CYCLES_MAX: Final = 64
# Appends lost in a row before the turn is claimed. Who appends without a pause has the newest head at hand while all
# others must read it first, and some are nearer to the store: without turns one of them would win forever.
_LOSSES_MAX: Final = 3
# Looks at another's claim, each a read of the store and a pause, before it is taken over: its maker is dead, or as good
# as. Together they take a second and more, in which one far from the store gets through, however fast it is read here.
_LOOKS_MAX: Final = 500
_LOOK_PAUSE_S: Final = 0.002
# Lost appends that are remembered. They are forgotten by the next append, so there are several only while the store
# comes and goes; without its memory one call could have a second record that says how it ended for its caller.
_LOST_MAX: Final = 8
# The store refuses these before it does anything, for what one caller's part of the transaction says.
_ONES_OWN_FAULT: Final = frozenset({ErrorCode.INVALID_ARGUMENT, ErrorCode.LIMIT_EXCEEDED})

CountUsage = Callable[[int], Awaitable[Usage]]
"""Adds up from its records what a tenant has, for one whose usage was never written."""


async def _nothing(tenant: int) -> Usage:
    return Usage()


class Ledger:
    """Appends to the audit log of one cluster. Belongs to one event loop; calls may overlap."""

    def __init__(
        self,
        store: MetadataStore,
        *,
        signer: Callable[[], HeadSigner],
        clock: Clock,
        random_bytes: Callable[[int], bytes],
        metrics: AuditMetrics,
        count_usage: CountUsage = _nothing,
    ) -> None:
        """Bind to a store.

        Args:
            store: the metadata store.
            signer: returns what signs the next head.
            clock: for the records' times.
            random_bytes: for the ledger's name among others.
            metrics: where appends are counted.
            count_usage: adds up what a tenant has where the store does not say; nothing by default.
        """
        self._store = store
        self._signer = signer
        self._clock = clock
        self._metrics = metrics
        self._count_usage = count_usage
        self._open: tuple[Batch, asyncio.Task[list[Result]]] | None = None
        self._tasks: set[asyncio.Task[list[Result]]] = set()
        # Fair: batches are written in the order in which they were opened.
        self._writing = asyncio.Lock()
        self._name = random_bytes(8)
        self._head: Head | None = None
        self._turn = Turn()
        self._usage: dict[int, Usage] = {}
        self._lost: list[Plan] = []

    async def apply(
        self,
        entry: Entry,
        conditions: Sequence[Condition],
        operations: Sequence[Operation],
        usage: UsageChange | None = None,
    ) -> Outcome:
        """Apply the operations if the conditions hold, and record the entry in the same transaction.

        Returns:
            APPLIED: done and recorded. REFUSED: nothing happened and nothing is recorded; read again and decide.

        Raises:
            HoldfastError: UNREACHABLE while the store is away, after which the transaction may have been applied;
                QUOTA_EXCEEDED; CONFLICT under contention; what the store says of the operations.
        """
        result = await self._join(Proposal(entry, conditions, operations, usage))
        if isinstance(result, HoldfastError):
            # Several callers may get the same one: each raises its own.
            raise HoldfastError(result.code, result.message, facts=result.facts) from result
        return result

    async def record(self, entry: Entry) -> None:
        """Record an entry that goes with no operation; nothing happens if it is recorded already.

        Raises:
            HoldfastError: UNREACHABLE or CONFLICT as `apply`; then nothing may be answered.
        """
        if not entry.written:
            await self.apply(entry, (), ())

    async def usage(self, tenant: int) -> Usage:
        """Return what a tenant has now.

        Raises:
            HoldfastError: UNREACHABLE as the store.
        """
        stored = await load(self._store, keyspace.TenantKeyspace(tenant).usage, Usage)
        return await self._count_usage(tenant) if stored is None else stored.message

    async def close(self) -> None:
        """Wait for what is being written."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _join(self, proposal: Proposal) -> Result:
        if self._open is None or not self._open[0].add(proposal):
            batch = Batch()
            batch.add(proposal)
            # The ledger's own task: a member that is cancelled (its client went away) does not take the others'
            # transaction with it. It does not inherit what its first member knows of its call either.
            task = asyncio.get_running_loop().create_task(
                self._flush(batch), name="ledger-batch", context=contextvars.Context()
            )
            self._open = (batch, task)
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        batch, task = self._open
        place = len(batch.proposals) - 1
        return (await asyncio.shield(task))[place]

    def _ended(self, task: asyncio.Task[list[Result]]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at here too, because all members may have gone away

    async def _flush(self, batch: Batch) -> list[Result]:
        began_s = self._clock.monotonic_s()
        async with self._writing:
            if self._open is not None and self._open[0] is batch:
                self._open = None  # from here on newcomers open the next batch
            results = await self._settle(batch.proposals)
        self._metrics.waited(self._clock.monotonic_s() - began_s)
        return results

    async def _settle(self, proposals: Sequence[Proposal]) -> list[Result]:
        """Return what became of each proposal; what stops one stops those behind it."""
        results: list[Result] = []
        while len(results) < len(proposals):
            rest = proposals[len(results) :]
            try:
                results += await self._write(rest)
            except HoldfastError as error:
                results += [error] * len(rest)
        return results

    async def _write(self, proposals: Sequence[Proposal]) -> list[Result]:
        """Write one transaction for as many of the proposals as it takes, and return what became of those.

        Where it is refused for what some of them say, each half is tried by itself, down to the ones that said it.
        """
        plan: Plan | None = None
        in_doubt = False
        losses = 0
        try:
            for _ in range(CYCLES_MAX):
                if plan is None:
                    await self._take_turn(losses)
                    plan = await self._plan(proposals)
                    if not plan.lines:
                        return plan.results
                outcome, revision = await self._try(plan.conditions, plan.operations)
                if outcome is Outcome.APPLIED:
                    self._advance(plan, revision)
                    return plan.results
                in_doubt = in_doubt or outcome is Outcome.UNKNOWN
                head = await self._look_again()
                holds = await self._holds(head, plan)
                if holds is None:
                    raise _lost_for_good()
                if holds:
                    self._note(plan)
                    return plan.results
                if (head.revision, self._turn.revision) != (plan.after.revision, plan.turn.revision):
                    # Others were quicker. A first try that is still under way is dead: a claim only ends with a head.
                    plan, in_doubt, losses = None, False, losses + 1
                    self._metrics.conflict()
                elif outcome is Outcome.REFUSED and in_doubt:
                    # A first try may still be under way, and what refused this one may have passed by the time it
                    # arrives. With another head it never can.
                    await self._move(head)
                elif outcome is Outcome.REFUSED:
                    return await self._divide(proposals[: len(plan.results)])
            raise contention("the audit log")
        except HoldfastError as error:
            if plan is not None and in_doubt:
                self._lost = [*self._lost, plan][-_LOST_MAX:]
            elif plan is not None and error.code in _ONES_OWN_FAULT and len(plan.results) > 1:
                return await self._divide(proposals[: len(plan.results)])
            raise

    async def _divide(self, proposals: Sequence[Proposal]) -> list[Result]:
        if len(proposals) == 1:
            return [Outcome.REFUSED]
        half = len(proposals) // 2
        return await self._settle(proposals[:half]) + await self._settle(proposals[half:])

    async def _take_turn(self, losses: int) -> None:
        """Return when nobody else claims the turn; claim it after too many losses."""
        for look in range(_LOOKS_MAX + 1):
            if self._head is None:
                await self._look_again()
            claim = self._turn
            if claim.name == self._name or not (claim.revision or losses >= _LOSSES_MAX):
                return
            if not claim.revision or look == _LOOKS_MAX:
                await self._try(
                    [ModRevisionIs(keyspace.AUDIT_TURN, claim.revision)], [Put(keyspace.AUDIT_TURN, self._name)]
                )
            else:
                await self._clock.sleep(_LOOK_PAUSE_S)
            self._head = None

    async def _plan(self, proposals: Sequence[Proposal]) -> Plan:
        is_copy = self._head is not None
        head = self._head or await self._look_again()
        for proposal in proposals:
            if proposal.usage is not None and proposal.usage.tenant not in self._usage:
                self._usage[proposal.usage.tenant] = await self.usage(proposal.usage.tenant)
        plan = make_plan(head, self._turn, proposals, self._usage, self._signer, self._clock.now_unix_ms())
        if plan.refused and is_copy:
            # Another coordinator may have given something back since the copy was made.
            self._head = None
            return await self._plan(proposals)
        return plan

    async def _try(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> tuple[Outcome, int]:
        """Try a transaction once; returns the store's revision after it too."""
        try:
            result = await self._store.txn(conditions, operations)
        except HoldfastError as error:
            if error.facts.get(OUTCOME_FACT) == OUTCOME_UNKNOWN:
                return Outcome.UNKNOWN, 0
            if error.code is ErrorCode.NOT_FOUND:
                return Outcome.REFUSED, 0  # a lease that is named is gone
            raise
        return Outcome.APPLIED if result.succeeded else Outcome.REFUSED, result.revision

    async def _look_again(self) -> Head:
        """Read the head, and find out what became of appends that were lost."""
        self._head = None
        self._usage.clear()
        head, self._turn = await load_head_and_turn(self._store)
        undecided = []
        for plan in self._lost:
            if await self._holds(head, plan):
                self._note(plan)
            elif head.revision == plan.after.revision:
                undecided.append(plan)
        self._lost = undecided
        self._head = head
        return head

    async def _holds(self, head: Head, plan: Plan) -> bool | None:
        """Return whether the log with this head holds the plan's lines; None if that cannot be told any more.

        Every line has an id of its own, so no other coordinator's batch is ever the same.
        """
        after = plan.head.signed
        if head.revision == plan.after.revision or head.size < after.size:
            return False
        if head.size == after.size:
            return head.signed.root == after.root
        stored = await load(self._store, keyspace.audit_batch(plan.after.size), AuditBatch)
        return None if stored is None else list(stored.message.lines) == plan.lines

    async def _move(self, head: Head) -> None:
        """Write the head once more as it is, so that whatever compares its revision fails; seen by who looks again."""
        value = head.message.SerializeToString()
        await self._try([ModRevisionIs(keyspace.AUDIT_HEAD, head.revision)], [Put(keyspace.AUDIT_HEAD, value)])

    def _advance(self, plan: Plan, revision: int) -> None:
        """Go on from a plan that has just been applied."""
        self._head, self._turn = Head(revision, plan.head, plan.frontier), Turn()
        self._usage.update(plan.usage)
        self._lost.clear()  # the head has moved
        self._note(plan)

    def _note(self, plan: Plan) -> None:
        for entry in plan.entries:
            entry.written = True
        self._metrics.appended([entry.outcome for entry in plan.entries])


def _lost_for_good() -> HoldfastError:
    return HoldfastError(
        ErrorCode.UNREACHABLE,
        "the metadata store was away for so long that it cannot be told whether this was done; ask what there is",
        facts={OUTCOME_FACT: OUTCOME_UNKNOWN},
    )
