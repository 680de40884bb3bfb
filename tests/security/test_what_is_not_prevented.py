"""What the threat model says that an attacker can do, where nothing but the statement would otherwise show it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from holdfast.testing import MemoryCluster
from holdfast_coordinator import keyspace
from holdfast_coordinator.audit.entry import Entry
from holdfast_coordinator.records import parse
from holdfast_core.model.audit.export import export_lines, keys_of
from holdfast_core.model.audit.verify import verify_export
from holdfast_core.model.block import verify
from holdfast_core.model.keys import KeyRing
from holdfast_core.model.tree import VolumeLeaf, decode_node
from holdfast_core.runtime.metadata.store import Delete, Put
from holdfast_proto.v1.records_pb2 import PointRecord
from tests.client.keyed import coordinator_of, metadata_of
from tests.client.rig import BLOCK, TENANT, Vm, data_ids, noise, store_of, write_at
from tests.coordinator.test_audit_service import Auditor


@pytest.fixture
def cluster() -> Iterator[MemoryCluster]:
    with MemoryCluster() as made:
        yield made


@pytest.fixture
def vm(cluster: MemoryCluster, tmp_path: Path) -> Vm:
    """A VM whose first and last block are equal."""
    made = Vm(cluster.state_manager(), "vm-1", tmp_path)
    made.volume(3 * BLOCK, [(0, noise(BLOCK)), (BLOCK, noise(BLOCK, 1)), (2 * BLOCK, noise(BLOCK))])
    made.register()
    return made


def test_nodes_see_which_blocks_are_read(cluster: MemoryCluster, vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = vm.snapshot()
    asked: set[bytes] = set()
    for number in range(3):
        store = store_of(cluster, number)

        def seen(tenant: int, ids: Sequence[bytes], *, bytes_max: int, get: Any = store.get) -> Any:
            asked.update(ids)
            return get(tenant, ids, bytes_max=bytes_max)

        monkeypatch.setattr(store, "get", seen)
    vm.assert_restores(snapshot)
    held = set(data_ids(cluster, 0))
    assert held
    assert asked >= held


def test_an_operator_can_hide_the_newest_point_and_an_older_one_passes_for_it(cluster: MemoryCluster, vm: Vm) -> None:
    snapshot = vm.snapshot()
    write_at(vm.path(), 0, noise(BLOCK, 2))
    backup = vm.manager.incremental_backup(vm.name, snapshot)

    async def hide() -> None:
        store, space = metadata_of(cluster), keyspace.TenantKeyspace(TENANT)
        _, newest = (await store.snapshot([space.points_of(vm.name)])).items
        number = Put(space.point_number(vm.name), b"1")
        await store.txn([], [Delete(newest.key), Delete(space.point_id(backup)), number])

    cluster.run(hide())
    assert [point.point_id for point in vm.manager.points(vm.name)] == [snapshot]
    later = vm.manager.incremental_backup(vm.name, snapshot)
    assert vm.manager.points(vm.name)[-1].parent_id == snapshot
    vm.assert_restores(snapshot, later)


def test_an_operator_reads_the_index_and_the_names_without_any_data_key(cluster: MemoryCluster, vm: Vm) -> None:
    vm.snapshot()
    parts = coordinator_of(cluster)._parts
    assert parts is not None
    ring = KeyRing(cluster.run(parts.chain.secrets(TENANT)).without_data())
    assert not ring.has_data
    (item,) = cluster.run(metadata_of(cluster).snapshot([keyspace.TenantKeyspace(TENANT).points_of(vm.name)])).items
    volume = parse(item, PointRecord).message.volumes[0]
    assert (volume.name, volume.size_bytes) == ("root", 3 * BLOCK)
    (found,) = store_of(cluster, 0).get(TENANT, [volume.root], bytes_max=1 << 30)
    node = decode_node(ring.opener().open(verify(volume.root, bytes(found.data))))  # type: ignore[union-attr]
    assert isinstance(node, VolumeLeaf)
    assert node.fingerprints[0] == node.fingerprints[2] != node.fingerprints[1]
    assert set(node.block_ids) == set(data_ids(cluster, 0))


def test_who_runs_a_coordinator_can_have_it_record_what_nobody_did(cluster: MemoryCluster, vm: Vm) -> None:
    """The log proves that nothing in it was changed later, not that its writer was honest."""
    parts = coordinator_of(cluster)._parts
    assert parts is not None
    forged = Entry(
        principal="somebody else",
        tenant="default",
        action="point.restore",
        request_id="made-up",
        entry_id="0" * 16,
        resource="vm/vm-1",
    )
    cluster.run(parts.ledger.record(forged))

    async def export() -> tuple[list[bytes], list[bytes]]:
        auditor = Auditor(cluster.coordinator_address, cluster.token)
        head = await auditor.head()
        lines = list(export_lines(await auditor.export()))
        await auditor.close()
        return lines, list(keys_of(head.keys).values())

    lines, trusted = asyncio.run(export())
    verify_export(lines, trusted=trusted)
    assert any(b'"principal":"somebody else"' in line for line in lines)
