"""How layouts followed one another: one record a change, written by the transaction that makes the layout.

The last 100 are kept; which one falls out is known from the epoch alone, so that nothing has to be read for it.
"""

from __future__ import annotations

from typing import Final

from holdfast_coordinator import keyspace
from holdfast_coordinator.records import parse
from holdfast_core.model.layout import Layout, LayoutPlan
from holdfast_core.runtime.metadata.store import Delete, MetadataStore, Operation, Put
from holdfast_proto.v1.cluster_pb2 import LayoutChange

HISTORY_MAX: Final = 100


def layout_change(previous: Layout | None, plan: LayoutPlan, *, reason: str, now_unix_ms: int) -> LayoutChange:
    """Return the account of a change; the first layout is settled at once. Pure."""
    before = {node.node_id for node in previous.nodes} if previous else set()
    after = {node.node_id for node in plan.layout.nodes}
    return LayoutChange(
        epoch=plan.layout.epoch,
        made_unix_ms=now_unix_ms,
        settled_unix_ms=0 if previous else now_unix_ms,
        reason=reason,
        slots_moved=plan.slots_moved,
        slots_total=plan.slots_total,
        joined=sorted(after - before),
        left=sorted(before - after),
    )


def record_change(change: LayoutChange) -> list[Operation]:
    """Return what writes a change down, and drops the one that is too old. Pure."""
    operations: list[Operation] = [Put(keyspace.layout_history(change.epoch), change.SerializeToString())]
    if change.epoch > HISTORY_MAX:
        operations.append(Delete(keyspace.layout_history(change.epoch - HISTORY_MAX)))
    return operations


def settle(changes: list[LayoutChange], epoch: int, *, now_unix_ms: int) -> list[Operation]:
    """Return what says of a layout, and of those that it overtook, that they are settled. Pure."""
    operations: list[Operation] = []
    for change in changes:
        if change.epoch <= epoch and not change.settled_unix_ms:
            settled = LayoutChange()
            settled.CopyFrom(change)
            settled.settled_unix_ms = now_unix_ms
            operations.append(Put(keyspace.layout_history(change.epoch), settled.SerializeToString()))
    return operations


async def read_history(store: MetadataStore) -> list[LayoutChange]:
    """Return the changes that are kept, newest first.

    Raises:
        HoldfastError: UNREACHABLE; INTERNAL if something else wrote there.
    """
    items = (await store.snapshot([keyspace.LAYOUT_HISTORY_PREFIX])).items
    return [parse(item, LayoutChange).message for item in reversed(items)]
