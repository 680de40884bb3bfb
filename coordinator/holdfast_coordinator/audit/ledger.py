"""The ledger: every transaction that must be in the audit log goes through here, together with its record."""

from __future__ import annotations

from collections.abc import Sequence

from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.transactions import Outcome, attempt
from holdfast_coordinator.usage import UsageChange
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.metadata.store import Condition, MetadataStore, Operation


class Ledger:
    """Applies operations; keeps no log yet."""

    def __init__(self, store: MetadataStore) -> None:
        self._store = store

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
            HoldfastError: UNREACHABLE while the store is away; QUOTA_EXCEEDED; CONFLICT under contention.
        """
        outcome = await attempt(self._store, conditions, operations)
        if outcome is Outcome.UNKNOWN:
            raise HoldfastError(ErrorCode.UNREACHABLE, "the metadata store was lost before it answered; try again")
        entry.written = outcome is Outcome.APPLIED
        return outcome

    async def record(self, entry: Entry) -> None:
        """Record an entry that goes with no operation; nothing happens if it is recorded already.

        Raises:
            HoldfastError: as `apply`.
        """
        entry.written = True

    async def close(self) -> None:
        """Wait for what is being written."""
