"""Who runs the cluster: writes to the metadata store, holds the structure key, keeps the audit log; or has the role."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from holdfast.testing import MemoryCluster
from holdfast_coordinator import keyspace
from holdfast_coordinator.records import parse
from holdfast_core.model.audit.export import export_lines, keys_of
from holdfast_core.model.audit.verify import verify_export
from holdfast_core.model.block import Codec, Kind, SealedBlock, verify
from holdfast_core.model.errors import ErrorCode, HoldfastError
from holdfast_core.model.keys import KeyRing
from holdfast_core.model.tree import VolumeLeaf, decode_node, encode_node
from holdfast_core.runtime.clock import ManualClock
from holdfast_core.runtime.metadata.sqlite import SqliteStore
from holdfast_core.runtime.metadata.store import Delete, Put
from holdfast_proto.v1 import state_pb2
from holdfast_proto.v1.audit_pb2 import AuditBatch
from holdfast_proto.v1.records_pb2 import PointRecord
from tests.client.keyed import coordinator_of, metadata_of
from tests.client.rig import BLOCK, TENANT, Vm, error_of, noise, store_of
from tests.coordinator.rig import Client, coordinator, refused
from tests.coordinator.test_audit_service import Auditor

RECORDS = 12


def swapped(leaf: VolumeLeaf) -> VolumeLeaf:
    """Two blocks in each other's place; the fingerprints stay, so that each block opens to what its slot denies."""
    first, second, *rest = leaf.block_ids
    return replace(leaf, block_ids=(second, first, *rest))


def swapped_whole(leaf: VolumeLeaf) -> VolumeLeaf:
    """As before with the fingerprints, so that every block is what the index says."""
    first, second, *rest = leaf.fingerprints
    return replace(swapped(leaf), fingerprints=(second, first, *rest))


@pytest.mark.parametrize("change", [swapped, swapped_whole])
def test_an_index_made_anew_with_the_structure_key_is_found_out_by_the_records_mac(
    tmp_path: Path, change: Callable[[VolumeLeaf], VolumeLeaf]
) -> None:
    """The structure key lets a coordinator make index nodes; that a point has this root takes the data key."""
    with MemoryCluster() as cluster:
        vm = Vm(cluster.state_manager(), "vm-1", tmp_path)
        vm.volume(9 * BLOCK, [(0, noise(9 * BLOCK))])
        vm.register()
        snapshot = vm.snapshot()
        vm.assert_restores(snapshot)
        parts = coordinator_of(cluster)._parts
        assert parts is not None
        ring = KeyRing(cluster.run(parts.chain.secrets(TENANT)).without_data())

        async def rewrite() -> None:
            store = metadata_of(cluster)
            (item,) = (await store.snapshot([keyspace.TenantKeyspace(TENANT).points_of("vm-1")])).items
            point = parse(item, PointRecord).message
            node = decode_node(ring.opener().open(block_of(cluster, point.volumes[0].root)))
            assert isinstance(node, VolumeLeaf)
            sealer = ring.sealer(Kind.INDEX, ring.structure_epoch_newest)
            forged = sealer.seal(encode_node(change(node)), codec=Codec.STORED)
            for number in range(3):
                store_of(cluster, number).put(TENANT, [forged])
            point.volumes[0].root = forged.id
            await store.txn([], [Put(item.key, point.SerializeToString())])

        cluster.run(rewrite())
        for call in (
            lambda: vm.restored(snapshot),
            lambda: vm.manager.verify(snapshot),
            lambda: vm.manager.incremental_backup("vm-1", snapshot),
        ):
            assert error_of(call).code is ErrorCode.CORRUPT


def block_of(cluster: MemoryCluster, block_id: bytes) -> SealedBlock:
    """A block as the nodes keep it."""
    (found,) = store_of(cluster, 0).get(TENANT, [block_id], bytes_max=1 << 30)
    return verify(block_id, bytes(found.data))  # type: ignore[union-attr]


@pytest.fixture
async def store() -> AsyncIterator[SqliteStore]:
    opened = await SqliteStore.open(":memory:", ManualClock())
    yield opened
    await opened.close()


@pytest.fixture
async def client(store: SqliteStore) -> AsyncIterator[Client]:
    """A coordinator with a log of some records."""
    async with coordinator(store, clock=ManualClock()) as running:
        await running.form_layout()
        for number in range(RECORDS):
            await running.register_vm(f"vm-{number}")
        yield running


@pytest.fixture
async def auditor(client: Client) -> AsyncIterator[Auditor]:
    opened = Auditor(client.address)
    yield opened
    await opened.close()


Batches = list[tuple[str, AuditBatch]]


def altered(batches: Batches) -> int:
    batches[-4][1].lines[0] = batches[-4][1].lines[0].replace(b"admin", b"nobody")
    return batches[-4][1].first


def emptied(batches: Batches) -> int:
    first = batches[-4][1].first
    batches[-4][1].lines[0] = batches[-5][1].lines[0]
    return first


def exchanged(batches: Batches) -> int:
    (_, one), (_, other) = batches[-5], batches[-4]
    one.lines[0], other.lines[0] = other.lines[0], one.lines[0]
    return one.first


@pytest.mark.parametrize("change", [altered, emptied, exchanged])
async def test_a_record_that_was_rewritten_in_the_store_is_named(
    store: SqliteStore, auditor: Auditor, change: Callable[[Batches], int]
) -> None:
    keys = keys_of((await auditor.head()).keys)
    items = (await store.snapshot([keyspace.AUDIT_BATCHES_PREFIX])).items
    batches = [(item.key, parse(item, AuditBatch).message) for item in items]
    sequence = change(batches)
    await store.txn([], [Put(key, batch.SerializeToString()) for key, batch in batches])
    with pytest.raises(HoldfastError) as caught:
        verify_export(export_lines(await auditor.export()), trusted=keys.values())
    assert (caught.value.code, caught.value.facts["sequence"]) == (ErrorCode.CORRUPT, str(sequence))


async def test_a_log_that_was_set_back_goes_on_and_is_found_out_by_a_head_that_was_kept(
    store: SqliteStore, client: Client, auditor: Auditor
) -> None:
    """An operator who puts back an older copy of the log has the coordinator sign another story after it."""
    older = (await store.snapshot([keyspace.AUDIT_PREFIX])).items
    await client.register_vm("vm-later")
    kept = await auditor.head()
    newer = (await store.snapshot([keyspace.AUDIT_BATCHES_PREFIX])).items
    gone = {item.key for item in newer} - {item.key for item in older}
    await store.txn([], [*(Put(item.key, item.value) for item in older), *(Delete(key) for key in sorted(gone))])
    for number in itertools.count():
        await client.register_vm(f"vm-instead-{number}")
        if (await auditor.head()).head.size > kept.head.size:
            break
    lines = list(export_lines(await auditor.export()))
    trusted = keys_of(kept.keys).values()
    verify_export(lines, trusted=trusted)
    with pytest.raises(HoldfastError, match="head") as caught:
        verify_export(lines, trusted=trusted, known_head=kept.head)
    assert caught.value.code is ErrorCode.CORRUPT


async def test_the_role_of_an_operator_reads_writes_and_forgets_no_data(client: Client) -> None:
    point = await client.save("vm-1")
    await client.bind(("op", "operator", "*"), tenant="*")
    operator = Client(client.address, token=await client.new_token("op"))
    assert [seen.point_id for seen in await operator.points("vm-1")] == [point.point_id]
    calls = {
        "ResolvePoint": state_pb2.ResolvePointRequest(snapshot_id=point.point_id),
        "RefreshGrant": state_pb2.RefreshGrantRequest(resource_id=point.point_id),
        "ForgetPoint": state_pb2.ForgetPointRequest(point_id=point.point_id),
        "DiscardVm": state_pb2.DiscardVmRequest(vm_id="vm-1", newest_point_id=point.point_id),
        "BeginPoint": state_pb2.BeginPointRequest(vm_id="vm-1", nonce=bytes(16)),
        "BeginObject": state_pb2.BeginObjectRequest(task_id="task", nonce=bytes(16)),
    }
    await asyncio.gather(*(refused(ErrorCode.DENIED, operator.state(name, request)) for name, request in calls.items()))
    await operator.close()
