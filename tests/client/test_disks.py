"""The same on real segment stores: what is acknowledged is on disk, and comes back after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.testing import MemoryCluster
from tests.client.rig import Vm, noise, write_at
from tests.support.waiting import wait_until

MIB = 1 << 20


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[MemoryCluster]:
    """Three nodes with directories."""
    with MemoryCluster(data_dir=tmp_path / "nodes") as cluster:
        yield cluster


@pytest.mark.slow
def test_a_chain_on_disk_survives_a_restart_of_every_node(disks: MemoryCluster, tmp_path: Path) -> None:
    vm = Vm(disks.state_manager(), "vm", tmp_path)
    vm.volume(32 * MIB, [(0, noise(20 * MIB, 41)), (25 * MIB, b"text " * 400_000)])
    vm.register()
    snapshot = vm.snapshot()
    vm.assert_restores(snapshot)
    write_at(vm.path(), 3 * MIB + 7, noise(500_000, 42))
    backup = vm.manager.incremental_backup(vm.name, snapshot)
    storage_id = vm.manager.persist_application_data("task", noise(5 * MIB, 43))
    for number in range(3):
        disks.stop_node(number)
        disks.start_node(number)
    vm.assert_restores(snapshot, backup)
    with disks.state_manager() as fresh:
        assert fresh.retrieve_application_data(storage_id) == noise(5 * MIB, 43)
        assert fresh.verify(backup).blocks == fresh.point(backup).volumes[0].block_count
        assert fresh.verify(backup, node_only=True).thin_blocks == 0


@pytest.mark.slow
def test_rot_on_disk_is_read_around_counted_and_made_good(disks: MemoryCluster, tmp_path: Path) -> None:
    vm = Vm(disks.state_manager(), "vm", tmp_path)
    vm.volume(8 * MIB, [(0, noise(8 * MIB, 44))])
    vm.register()
    snapshot = vm.snapshot()
    disks.stop_node(0)
    largest = max((tmp_path / "nodes" / "node-1").rglob("*"), key=lambda path: path.stat().st_size)
    # Half of what the node holds: a restore reads each block from one node, so it meets some of it and not all.
    write_at(largest, 2 * MIB, noise(4 * MIB, 45))
    disks.start_node(0)
    vm.assert_restores(snapshot)
    # The node fetches again what it knows to be bad, and learns of the rest only now.
    assert vm.manager.verify(snapshot, node_only=True).thin_blocks > 0
    wait_until(lambda: vm.manager.verify(snapshot, node_only=True).thin_blocks == 0, "three whole copies of each block")
    vm.assert_restores(snapshot)
