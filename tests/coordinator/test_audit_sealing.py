"""Old audit records move into the cluster: read, exported and proven as before, and never lost on the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.ledger import Ledger
from holdfast_coordinator.audit.metrics import AuditMetrics
from holdfast_coordinator.audit.reader import AuditReader
from holdfast_coordinator.audit.sealing import INTERVAL_S, Sealing
from holdfast_coordinator.audit.segments import SegmentBlocks
from holdfast_coordinator.collection.epochs import present_epoch, set_epoch
from holdfast_coordinator.keys.chain import KeyChain
from holdfast_coordinator.records import load, parse
from holdfast_coordinator.view import ClusterView
from holdfast_core.model.audit.export import export_lines, keys_of
from holdfast_core.model.audit.merkle import (
    check_consistency,
    consistency_ranges,
    inclusion_ranges,
    leaf_hash,
    root_from_inclusion,
)
from holdfast_core.model.audit.verify import verify_export
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing
from holdfast_core.model.limits import AUDIT_SEGMENT_RECORDS, AUDIT_UNSEALED_RECORDS_MIN
from holdfast_core.model.names import split_ids
from holdfast_core.runtime.blocks.pool import NodePool
from holdfast_core.runtime.capability import CAPABILITY_METADATA_KEY
from holdfast_core.runtime.clock import Clock, ManualClock, SystemClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Condition, MetadataStore, Operation, Put, TxnResult
from holdfast_proto.v1.audit_pb2 import AuditBatch, AuditSegment, ExportAuditRecordsResponse
from holdfast_proto.v1.blocks_pb2 import ScanBlocksRequest
from holdfast_proto.v1.blocks_pb2_grpc import BlockServiceStub
from holdfast_proto.v1.collection_pb2 import GetCollectionRequest, StartCollectionRequest
from holdfast_proto.v1.records_pb2 import ClusterRecord
from holdfast_storagenode.memory import MemoryStore
from tests.coordinator.content import Cluster, cluster
from tests.coordinator.faults import Crash, FaultyStore
from tests.coordinator.ledgers import make_entry
from tests.coordinator.rig import eventually, master_keys, refused

DUE = AUDIT_SEGMENT_RECORDS + AUDIT_UNSEALED_RECORDS_MIN


class CutPool(NodePool):
    """Connections to nodes, some of which are cut."""

    cut: frozenset[str] = frozenset()

    def channel(self, node_id: str) -> Any:
        if node_id in self.cut:
            raise HoldfastError(ErrorCode.UNREACHABLE, f"the line to {node_id} is cut")
        return super().channel(node_id)


@dataclass
class Parts:
    """One coordinator's share of the audit log, over a cluster of real nodes."""

    nodes: Cluster
    store: MetadataStore
    chain: KeyChain
    pool: CutPool
    view: ClusterView
    ledger: Ledger

    async def ring(self) -> KeyRing:
        return KeyRing(await self.chain.secrets(0))

    @property
    def blocks(self) -> SegmentBlocks:
        return SegmentBlocks(self.view, self.pool, self.chain, self.ring, SystemClock())

    def reader(self) -> AuditReader:
        """Return a reader that has kept nothing."""
        return AuditReader(self.store, self.blocks)

    def sealing(self, store: MetadataStore | None = None, clock: Clock | None = None) -> Sealing:
        """Return what a coordinator seals with."""
        store = store or self.store
        reader = AuditReader(store, self.blocks)
        metrics = AuditMetrics(CollectorRegistry())
        return Sealing(store, reader, self.blocks, clock=clock or SystemClock(), metrics=metrics)

    async def fill(self, records: int) -> None:
        """Append until the log has so many records."""
        have = (await self.reader().head()).size
        await asyncio.gather(*(self.ledger.record(make_entry(str(number))) for number in range(have, records)))

    async def batch_keys(self) -> list[str]:
        """Return the keys of the batches that the metadata store still holds."""
        return [item.key for item in (await self.store.snapshot([keyspace.AUDIT_BATCHES_PREFIX])).items]

    async def segments(self) -> list[AuditSegment]:
        """Return what was sealed."""
        items = (await self.store.snapshot([keyspace.AUDIT_SEGMENTS_PREFIX])).items
        return [parse(item, AuditSegment).message for item in items]


@pytest.fixture
async def parts(store: SqliteStore) -> AsyncIterator[Parts]:
    async with cluster(store) as nodes:
        record = await load(store, keyspace.CLUSTER, ClusterRecord)
        assert record is not None
        chain = KeyChain(store, master_keys(), record.message.cluster_id, SystemClock())
        view = ClusterView(store)
        await asyncio.gather(chain.fresh(), view.fresh())
        ledger = Ledger(
            store,
            signer=chain.head_signer,
            clock=SystemClock(),
            random_bytes=bytes,
            metrics=AuditMetrics(CollectorRegistry()),
        )
        async with CutPool() as pool:
            assert isinstance(pool, CutPool)
            yield Parts(nodes, store, chain, pool, view, ledger)


@dataclass(frozen=True)
class Story:
    """What a reader of a log of some size is told, all of it checked."""

    export: Sequence[bytes]
    proofs: Sequence[Sequence[bytes]]


async def _told(reader: AuditReader, cluster_id: str, size: int) -> Story:
    """Export the first `size` records, verify them offline, and prove some of them and some earlier sizes."""
    keys = await reader.keys()
    batches = [batch async for batch in reader.batches(0, size)]
    message = ExportAuditRecordsResponse(cluster_id=cluster_id, keys=keys, batches=batches)
    export = list(export_lines([message]))
    verified = verify_export(export, trusted=keys_of(keys).values())
    assert (verified.records, verified.head.size) == (size, size)
    lines = [line for batch in batches for line in batch.lines]
    head = await reader.head_at(size)
    assert head is not None
    proofs = []
    for sequence in (0, 1, AUDIT_SEGMENT_RECORDS - 1, AUDIT_SEGMENT_RECORDS, size - 1):
        path = await reader.path(inclusion_ranges(sequence, size))
        assert root_from_inclusion(sequence, size, leaf_hash(lines[sequence]), path) == head.root
        proofs.append(path)
    for earlier in (batches[0].head.size, batches[len(batches) // 3].head.size, 2 * AUDIT_SEGMENT_RECORDS):
        before = await reader.head_at(earlier)
        assert before is not None
        path = await reader.path(consistency_ranges(earlier, size))
        check_consistency(earlier, size, before.root, head.root, path)
        proofs.append(path)
    return Story(export, proofs)


class DiesBeforeDeleting(FaultyStore):
    """The coordinator dies when its segment is recorded and the batches are about to be deleted."""

    async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        if not any(isinstance(operation, Put) for operation in operations):
            raise Crash
        return await super().txn(conditions, operations)


@pytest.mark.slow
async def test_sealed_records_are_read_exported_and_proven_as_before(parts: Parts) -> None:
    await parts.fill(DUE - 1)
    assert await parts.sealing().seal_due() == 0
    await parts.fill(DUE + 100)
    size = DUE + 100
    before = await _told(parts.reader(), parts.chain.cluster_id, size)
    stored = await parts.batch_keys()

    with pytest.raises(Crash):
        await parts.sealing(DiesBeforeDeleting(parts.store)).seal_due()
    assert [segment.first for segment in await parts.segments()] == [0]
    assert await parts.batch_keys() == stored
    assert await _told(parts.reader(), parts.chain.cluster_id, size) == before

    # Another coordinator finishes what the dead one began, while a third does the same.
    done = await asyncio.gather(parts.sealing().seal_due(), parts.sealing().seal_due())
    assert list(done) == [AUDIT_SEGMENT_RECORDS] * 2
    left = await parts.batch_keys()
    assert left == [key for key in stored if key >= keyspace.audit_batch(AUDIT_SEGMENT_RECORDS)]
    assert await _told(parts.reader(), parts.chain.cluster_id, size) == before

    await parts.fill(DUE + AUDIT_SEGMENT_RECORDS)
    reader = parts.reader()  # has the first segment open when the second is made
    await reader.area(0, DUE)
    assert await parts.sealing().seal_due() == 2 * AUDIT_SEGMENT_RECORDS
    segments = await parts.segments()
    assert [(segment.first, segment.count) for segment in segments] == [
        (0, AUDIT_SEGMENT_RECORDS),
        (AUDIT_SEGMENT_RECORDS, AUDIT_SEGMENT_RECORDS),
    ]
    assert await _told(reader, parts.chain.cluster_id, size) == before


@pytest.mark.slow
async def test_with_too_few_nodes_records_stay_until_there_are_enough(parts: Parts) -> None:
    await parts.fill(DUE)
    stored = await parts.batch_keys()
    parts.pool.cut = frozenset({"node-1", "node-2"})
    await refused(ErrorCode.NO_QUORUM, parts.sealing().seal_due())
    assert await parts.segments() == []
    assert await parts.batch_keys() == stored

    ticks = ManualClock()

    async def waits() -> bool:
        return ticks.sleeper_count > 0

    running = asyncio.create_task(parts.sealing(clock=ticks).run())
    try:
        for cut in (("node-1", "node-2"), ("node-2",)):
            await eventually(waits, "the sealing waits")
            assert await parts.segments() == []
            parts.pool.cut = frozenset(cut)
            ticks.advance(INTERVAL_S)
            await asyncio.sleep(0)
        await eventually(waits, "the sealing waits")
    finally:
        running.cancel()
    assert len(await parts.segments()) == 1
    assert len(await parts.batch_keys()) < len(stored)


def _memory_of(parts: Parts, node_id: str) -> MemoryStore:
    home: Any = parts.nodes.nodes[node_id]._memory
    assert isinstance(home._store, MemoryStore)
    return home._store


@pytest.mark.slow
async def test_a_rotten_copy_is_read_around_and_a_rotten_segment_is_named(parts: Parts) -> None:
    await parts.fill(DUE)
    before = await _told(parts.reader(), parts.chain.cluster_id, DUE)
    await parts.sealing().seal_due()
    (segment,) = await parts.segments()
    for number, node_id in enumerate(sorted(parts.nodes.nodes)):
        assert await _told(parts.reader(), parts.chain.cluster_id, DUE) == before
        memory = _memory_of(parts, node_id)
        rotten = 0
        for tenant, block_id, data in memory.contents():
            if block_id in segment.block_ids:
                memory.overwrite(tenant, block_id, data[:-1] + bytes([data[-1] ^ 1]))
                rotten += 1
        assert rotten == len(segment.block_ids), number
    error = await refused(ErrorCode.CORRUPT, parts.reader().area(0, DUE))
    assert set(error.block_ids) == set(segment.block_ids)
    assert await parts.reader().area(AUDIT_SEGMENT_RECORDS, DUE)


async def test_what_nodes_keep_of_the_log_is_sealed(parts: Parts) -> None:
    await parts.fill(DUE)
    await parts.sealing().seal_due()
    kept = b"".join(data for node_id in parts.nodes.nodes for _, _, data in _memory_of(parts, node_id).contents())
    assert kept
    assert b"agent-7" not in kept
    assert _memory_of(parts, "node-1").tenants() == [0]


async def test_records_that_are_not_what_was_signed_are_not_sealed(parts: Parts) -> None:
    await parts.fill(DUE)
    key = (await parts.batch_keys())[8]
    item = await parts.store.get(key)
    assert item is not None
    batch = parse(item, AuditBatch).message
    assert b"agent-7" in batch.lines[0]
    batch.lines[0] = batch.lines[0].replace(b"agent-7", b"agent-8")
    await parts.store.txn([], [Put(key, batch.SerializeToString())])
    error = await refused(ErrorCode.CORRUPT, parts.sealing().seal_due())
    assert error.facts["sequence"] == str(batch.first)
    assert await parts.segments() == []
    assert key in await parts.batch_keys()


async def test_a_record_that_the_store_has_lost_is_said_to_be_lost(parts: Parts) -> None:
    await parts.fill(600)
    keys = await parts.batch_keys()
    stored = await parts.store.get(keys[-2])
    assert stored is not None
    lost = parse(stored, AuditBatch).message
    await parts.store.txn([], [Put(keys[-2], AuditBatch(first=lost.first).SerializeToString())])
    await refused(ErrorCode.CORRUPT, parts.reader().area(0, 600))


class CollectedMeanwhile(FaultyStore):
    """A collection begins at the last moment before the first segment is recorded."""

    def __init__(self, store: MetadataStore) -> None:
        super().__init__(store)
        self.began = 0

    async def txn(self, conditions: Sequence[Condition], operations: Sequence[Operation]) -> TxnResult:
        if not self.began and any(operation.key.startswith(keyspace.AUDIT_SEGMENTS_PREFIX) for operation in operations):
            epoch, same = await present_epoch(self)
            self.began = epoch + 1
            assert (await super().txn([same], [set_epoch(self.began)])).succeeded
        return await super().txn(conditions, operations)


@pytest.mark.slow
async def test_a_segment_whose_blocks_a_collection_may_have_missed_is_written_again(parts: Parts) -> None:
    await parts.fill(DUE)
    store = CollectedMeanwhile(parts.store)
    assert await parts.sealing(store).seal_due() == AUDIT_SEGMENT_RECORDS
    (segment,) = await parts.segments()
    stamps = await _stamps(parts)
    assert {stamps[block_id] for block_id in segment.block_ids} == {store.began}


@pytest.mark.slow
async def test_a_collection_keeps_the_segments_of_the_log(parts: Parts) -> None:
    await parts.fill(DUE)
    client = parts.nodes.client
    await client.register_vm("vm-2")  # the coordinator sees how far the log is
    await parts.sealing().seal_due()
    (segment,) = await parts.segments()
    begun = await client.collection("StartCollection", StartCollectionRequest())

    async def ended() -> bool:
        state = await client.collection("GetCollection", GetCollectionRequest())
        return not state.HasField("running") and state.last.epoch == begun.epoch

    await eventually(ended, "the collection ends")
    report = (await client.collection("GetCollection", GetCollectionRequest())).last
    assert (report.marked_blocks, report.deleted_copies) == (len(segment.block_ids), 0)
    assert (await parts.blocks.read(segment)).batches


async def _stamps(parts: Parts) -> dict[bytes, int]:
    """Return the lowest stamp that any node has for each block of the cluster's own tenant."""
    stamps: dict[bytes, int] = {}
    token = parts.chain.capability_signer().mint(
        tenant=0,
        verbs=frozenset({"scan"}),
        kinds=frozenset({0, 1, 2}),
        ttl_s=60,
        now_unix_ms=SystemClock().now_unix_ms(),
    )
    parts.pool.update(parts.view.state.nodes)
    for node_id in parts.nodes.nodes:
        call = BlockServiceStub(parts.pool.channel(node_id)).ScanBlocks(
            ScanBlocksRequest(), metadata=((CAPABILITY_METADATA_KEY, token),)
        )
        async for page in call:
            for block_id, stamp in zip(split_ids(page.block_ids), page.stamps, strict=True):
                stamps[block_id] = min(stamp, stamps.get(block_id, stamp))
    return stamps
