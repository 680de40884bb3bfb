"""A ledger over a store without a coordinator around it, and the log that it leaves, read and checked."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.audit.metrics import AuditMetrics
from holdfast_coordinator.records import each, parse
from holdfast_core.model.audit.heads import HeadSigner, HeadVerifier
from holdfast_core.model.audit.merkle import Frontier, leaf_hash
from holdfast_core.model.audit.record import AuditRecord
from holdfast_core.model.limits import AUDIT_SEGMENT_RECORDS
from holdfast_core.runtime.clock import Clock, ManualClock
from holdfast_core.runtime.metadata.store import MetadataStore
from holdfast_proto.v1.audit_pb2 import AuditBatch, AuditHead

CLUSTER_ID: Final = "ab" * 16
SIGNER: Final = HeadSigner("key-1", bytes(range(32)), CLUSTER_ID)


def make_ledger(
    store: MetadataStore, *, clock: Clock | None = None, seed: int = 1, registry: CollectorRegistry | None = None
) -> Ledger:
    """Return a ledger whose heads `SIGNER` signs."""
    return Ledger(
        store,
        signer=lambda: SIGNER,
        clock=clock or ManualClock(),
        random_bytes=random.Random(seed).randbytes,
        metrics=AuditMetrics(registry or CollectorRegistry()),
    )


def make_entry(name: str, *, action: str = "vm.register", **details: str) -> Entry:
    """Return what a call about `name` would record; its id is made of the name."""
    entry_id = name.encode().hex().rjust(16, "0")
    return Entry(
        principal="agent-7",
        tenant="default",
        action=action,
        resource=f"vm/{name}",
        request_id="req-1",
        entry_id=entry_id,
        details=details,
    )


@dataclass(frozen=True, slots=True)
class Log:
    """The log as it is in the store, found to be whole."""

    records: list[AuditRecord]
    batches: list[AuditBatch]

    def of(self, entry: Entry) -> list[AuditRecord]:
        """Return the records of one call."""
        return [record for record in self.records if record.entry_id == entry.entry_id]

    def made(self, name: str) -> int:
        """Return how many records say that they made `name`."""
        return sum(record.outcome == "OK" and record.resource == f"vm/{name}" for record in self.records)


async def read_log(store: MetadataStore) -> Log:
    """Read every batch, and check order, numbers, times, roots and signatures of all of it."""
    batches = [parse(item, AuditBatch).message async for item in each(store, keyspace.AUDIT_BATCHES_PREFIX)]
    verifier = HeadVerifier(CLUSTER_ID, {SIGNER.key_id: SIGNER.public_key})
    frontier = Frontier()
    records: list[AuditRecord] = []
    for batch in batches:
        assert batch.first == frontier.size
        frontier = frontier.extended(map(leaf_hash, batch.lines))
        assert (batch.head.size, batch.head.root) == (frontier.size, frontier.root)
        assert batch.first // AUDIT_SEGMENT_RECORDS == (frontier.size - 1) // AUDIT_SEGMENT_RECORDS
        verifier.check(batch.head)
        records += [AuditRecord.from_line(line) for line in batch.lines]
        assert records[-1].time_unix_ms == batch.head.time_unix_ms
    assert [record.sequence for record in records] == list(range(len(records)))
    times = [record.time_unix_ms for record in records]
    assert times == sorted(times)
    stored = await store.get(keyspace.AUDIT_HEAD)
    if batches:
        assert stored is not None
        head = parse(stored, AuditHead).message
        assert head.signed == batches[-1].head
        assert tuple(head.frontier) == frontier.hashes
    return Log(records, batches)
