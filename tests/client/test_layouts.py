"""Layout changes under a running upload, and reads over several living epochs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import StateManager
from holdfast.testing import MemoryCluster
from tests.client.rig import MemorySource, Vm, noise

MIB = 1 << 20


@pytest.fixture
def four() -> Iterator[MemoryCluster]:
    """Four nodes, three copies."""
    with MemoryCluster(nodes=4, replicas=3) as cluster:
        yield cluster


def change_layout(manager: StateManager, *remove: str) -> int:
    """Apply the next layout; returns its epoch."""
    return manager.apply_layout(manager.plan_layout(remove=remove).previous_epoch, remove=remove).epoch


@pytest.mark.slow
def test_a_layout_that_changes_during_a_snapshot(four: MemoryCluster, tmp_path: Path) -> None:
    manager, other = four.state_manager(), four.state_manager()
    changed = threading.Event()

    def change(offset: int) -> None:
        if offset >= 24 * MIB and not changed.is_set():
            changed.set()
            change_layout(other, "node-2")

    vm = Vm(manager, "vm", tmp_path)
    vm.volume(0)
    vm.register()
    data = noise(64 * MIB, 31)
    snapshot = manager.create_snapshot("vm", sources={"root": MemorySource(data, at_read=change)})
    assert changed.is_set()
    assert (vm.restored(snapshot) / "root.raw").read_bytes() == data
    four.stop_node(1)
    assert (vm.restored(snapshot) / "root.raw").read_bytes() == data


@pytest.mark.slow
def test_points_of_older_epochs_are_read_and_built_on(four: MemoryCluster, tmp_path: Path) -> None:
    manager = four.state_manager()
    vm = Vm(manager, "vm", tmp_path)
    vm.volume(0)
    vm.register()
    data = bytearray(noise(20 * MIB, 32))
    snapshot = manager.create_snapshot("vm", sources={"root": MemorySource(bytes(data))})
    assert change_layout(manager, "node-1") == 2
    first = bytes(data)
    data[5 * MIB : 6 * MIB] = noise(MIB, 33)
    backup = manager.incremental_backup("vm", snapshot, sources={"root": MemorySource(bytes(data))})
    assert manager.point(backup).stats.stored_bytes < 2 * MIB
    assert change_layout(manager) == 3
    assert len(manager.layout().layouts) >= 2
    assert (vm.restored(snapshot) / "root.raw").read_bytes() == first
    assert (vm.restored(snapshot, backup) / "root.raw").read_bytes() == bytes(data)
    assert manager.verify(backup, node_only=True).blocks > 300
