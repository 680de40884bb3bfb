"""One attempt at a transaction, with the third outcome that a distributed store has: nobody knows.

Whoever gets REFUSED or UNKNOWN reads again and decides from what is there now; a compare-and-swap is never repeated
blindly. All transactions of this package are written so that the reading tells: what they make has an id that was
fixed before.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Final

from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.runtime.metadata.store import (
    OUTCOME_FACT,
    OUTCOME_UNKNOWN,
    Condition,
    MetadataStore,
    Operation,
)

# How often a read-decide-write cycle is begun before the caller is told to try again. Each failed cycle means that
# somebody else succeeded meanwhile, so this many in a row is real contention.
ATTEMPTS_MAX: Final = 8


class Outcome(enum.Enum):
    """How a transaction ended."""

    APPLIED = "the conditions held"
    REFUSED = "a condition did not hold, or a lease that was named is gone"
    UNKNOWN = "the store was lost before it answered"


async def attempt(store: MetadataStore, conditions: Sequence[Condition], operations: Sequence[Operation]) -> Outcome:
    """Try one transaction.

    Raises:
        HoldfastError: what the store raises, but for an unknown outcome and a lease that has ended.
    """
    try:
        result = await store.txn(conditions, operations)
    except HoldfastError as error:
        if error.facts.get(OUTCOME_FACT) == OUTCOME_UNKNOWN:
            return Outcome.UNKNOWN
        if error.code is ErrorCode.NOT_FOUND:
            return Outcome.REFUSED
        raise
    return Outcome.APPLIED if result.succeeded else Outcome.REFUSED


def contention(what: str) -> HoldfastError:
    """Return the error after `ATTEMPTS_MAX` cycles; `what` is what was being done."""
    return HoldfastError(ErrorCode.CONFLICT, f"{what} kept meeting changes by others; try again")
