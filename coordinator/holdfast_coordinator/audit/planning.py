"""What one transaction of the ledger is made of. Pure: nothing here awaits.

Proposals that wait together share a transaction, and their order in it is the order in which they count as done. So a
proposal whose conditions look at a key that an earlier one writes does not join it: inside one transaction it would
still see what was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.head import Head, Turn
from holdfast_coordinator.transactions import Outcome
from holdfast_coordinator.usage import UsageChange, changed
from holdfast_core.model.audit.heads import HeadSigner
from holdfast_core.model.audit.merkle import Frontier, leaf_hash
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.limits import (
    AUDIT_BATCH_BYTES_MAX,
    AUDIT_BATCH_OPERATIONS_MAX,
    AUDIT_BATCH_RECORDS_MAX,
    AUDIT_SEGMENT_RECORDS,
    METADATA_TXN_OPERATIONS_MAX,
)
from holdfast_core.runtime.metadata.store import Condition, Delete, ModRevisionIs, Operation, Put
from holdfast_proto.v1.audit_pb2 import AuditBatch, AuditHead
from holdfast_proto.v1.tenants_pb2 import Usage

Result: TypeAlias = Outcome | HoldfastError

# Beside the callers' operations: the batch of records, the head, the end of a claim.
_OWN_OPERATIONS: Final = 3
_TENANTS_MAX: Final = METADATA_TXN_OPERATIONS_MAX - AUDIT_BATCH_OPERATIONS_MAX - _OWN_OPERATIONS
# Digits of a sequence number and of a time that a line does not have yet when it is measured.
_NUMBERS_BYTES: Final = 32


@dataclass(frozen=True, slots=True)
class Proposal:
    """One call's record, and what is to happen with it."""

    entry: Entry
    conditions: Sequence[Condition] = ()
    operations: Sequence[Operation] = ()
    usage: UsageChange | None = None

    @property
    def is_done(self) -> bool:
        """Whether the log turned out to have this record already, and nothing else was to be done."""
        return self.entry.written and not self.operations

    def measure(self) -> int:
        """Return about how many bytes it adds to a transaction."""
        total = len(self.entry.record(0, 0).to_line()) + _NUMBERS_BYTES
        total += sum(len(condition.key.encode()) for condition in self.conditions)
        for operation in self.operations:
            total += len(operation.key.encode()) + (len(operation.value) if isinstance(operation, Put) else 0)
        return total


@dataclass(slots=True)
class Batch:
    """Proposals that will share a transaction, and what they add up to."""

    proposals: list[Proposal] = field(default_factory=list)
    _keys: set[str] = field(default_factory=set)
    _tenants: set[int] = field(default_factory=set)
    _conditions: int = 0
    _bytes: int = 0

    def add(self, proposal: Proposal) -> bool:
        """Take the proposal and return True, or leave it and return False. An empty batch takes anything."""
        size = proposal.measure()
        if self.proposals and not self._takes(proposal, size):
            return False
        self.proposals.append(proposal)
        self._keys.update(operation.key for operation in proposal.operations)
        self._conditions += len(proposal.conditions)
        self._bytes += size
        if proposal.usage is not None:
            self._tenants.add(proposal.usage.tenant)
        return True

    def _takes(self, proposal: Proposal, size: int) -> bool:
        tenant = proposal.usage.tenant if proposal.usage is not None else None
        return (
            len(self.proposals) < AUDIT_BATCH_RECORDS_MAX
            and len(self._keys) + len(proposal.operations) <= AUDIT_BATCH_OPERATIONS_MAX
            and self._conditions + len(proposal.conditions) <= AUDIT_BATCH_OPERATIONS_MAX
            and self._bytes + size <= AUDIT_BATCH_BYTES_MAX
            and (tenant is None or tenant in self._tenants or len(self._tenants) < _TENANTS_MAX)
            and self._keys.isdisjoint(operation.key for operation in proposal.operations)
            and self._keys.isdisjoint(condition.key for condition in proposal.conditions)
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """One transaction, ready to be tried.

    Attributes:
        after: the head that it follows.
        turn: the claim, or the absence of one, that it needs; a claim is its own ledger's, and ends with it.
        results: what it means for the first proposals, in order, once it is applied.
        entries: those that it records, in order.
        lines: their lines.
        head: the head after it.
        frontier: the tree after it.
        usage: what its tenants have after it.
        refused: whether a quota kept one of the proposals out.
        conditions: of the whole transaction.
        operations: of the whole transaction.
    """

    after: Head
    turn: Turn
    results: list[Result]
    entries: list[Entry]
    lines: list[bytes]
    head: AuditHead
    frontier: Frontier
    usage: Mapping[int, Usage]
    refused: bool
    conditions: Sequence[Condition]
    operations: Sequence[Operation]


def make_plan(
    after: Head,
    turn: Turn,
    proposals: Sequence[Proposal],
    usage: Mapping[int, Usage],
    signer: Callable[[], HeadSigner],
    now_unix_ms: int,
) -> Plan:
    """Plan as many of the proposals, from the first on, as go before the next bound of a segment.

    Proposals that a quota refuses, and those that are done, take no place in the log. `usage` has what every tenant
    that a proposal charges has now.
    """
    room = AUDIT_SEGMENT_RECORDS - after.size % AUDIT_SEGMENT_RECORDS
    time_unix_ms = max(now_unix_ms, after.signed.time_unix_ms)
    results: list[Result] = []
    taken: list[Proposal] = []
    charged: dict[int, Usage] = {}
    for proposal in proposals:
        if len(taken) == room:
            break
        if proposal.is_done:
            results.append(Outcome.APPLIED)
            continue
        if proposal.usage is not None:
            tenant = proposal.usage.tenant
            try:
                charged[tenant] = changed(charged.get(tenant, usage[tenant]), proposal.usage)
            except HoldfastError as error:
                if error.code is not ErrorCode.QUOTA_EXCEEDED:
                    raise
                results.append(error)
                continue
        taken.append(proposal)
        results.append(Outcome.APPLIED)
    entries = [proposal.entry for proposal in taken]
    lines = [entry.record(after.size + at, time_unix_ms).to_line() for at, entry in enumerate(entries)]
    frontier = after.frontier.extended(map(leaf_hash, lines))
    signed = signer().sign(size=frontier.size, root=frontier.root, time_unix_ms=time_unix_ms)
    head = AuditHead(signed=signed, frontier=frontier.hashes)
    batch = AuditBatch(first=after.size, lines=lines, head=signed)
    conditions = [
        ModRevisionIs(keyspace.AUDIT_HEAD, after.revision),
        ModRevisionIs(keyspace.AUDIT_TURN, turn.revision),
    ]
    operations: list[Operation] = [
        Put(keyspace.audit_batch(after.size), batch.SerializeToString()),
        Put(keyspace.AUDIT_HEAD, head.SerializeToString()),
    ]
    operations += [
        Put(keyspace.TenantKeyspace(tenant).usage, after_it.SerializeToString()) for tenant, after_it in charged.items()
    ]
    if turn.revision:
        operations.append(Delete(keyspace.AUDIT_TURN))
    return Plan(
        after=after,
        turn=turn,
        results=results,
        entries=entries,
        lines=lines,
        head=head,
        frontier=frontier,
        usage=charged,
        refused=any(isinstance(result, HoldfastError) for result in results),
        conditions=[*conditions, *(condition for proposal in taken for condition in proposal.conditions)],
        operations=[*operations, *(operation for proposal in taken for operation in proposal.operations)],
    )
