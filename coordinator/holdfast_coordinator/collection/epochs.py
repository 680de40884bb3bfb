"""The collection epoch: how it is read, and from which number it counts.

Epoch 0 is no epoch: a capability without one stamps nothing that is only found. So the first is 1, and a cluster whose
store does not say any is at 1; a session record that says 0 was made before there were epochs, and protects everything.
"""

from __future__ import annotations

from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.records import parse_number, still
from holdfast_core.runtime.metadata.store import Condition, KeyValue, MetadataStore, Operation, Put

EPOCH_FIRST: Final = 1


def epoch_of(item: KeyValue | None) -> int:
    """Return the collection epoch that the key's value says, the first where there is none.

    Raises:
        HoldfastError: INTERNAL if it holds no number.
    """
    return max(EPOCH_FIRST, parse_number(item))


async def present_epoch(store: MetadataStore) -> tuple[int, Condition]:
    """Return the present collection epoch and the condition that it is still that one."""
    item = await store.get(keyspace.COLLECTION_EPOCH)
    return epoch_of(item), still(keyspace.COLLECTION_EPOCH, item)


def set_epoch(epoch: int) -> Operation:
    """Return the operation that makes `epoch` the present one; only together with the condition of `present_epoch`."""
    return Put(keyspace.COLLECTION_EPOCH, str(epoch).encode())
