"""Nodes without space, nodes whose disk hangs, and clients that are gone in mid-stream."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from holdfast import ErrorCode, StateManager
from holdfast.testing import MemoryCluster
from holdfast_core.model.limits import RPC_TIMEOUT_S
from tests.client.rig import MemorySource, Vm, data_ids, error_of, noise, store_of
from tests.client.slow import fill, stalled
from tests.support.waiting import wait_until

MIB = 1 << 20
# Well below what waiting for one hanging node once would take, and enough for a busy machine.
SOON_S = 0.8 * RPC_TIMEOUT_S


@pytest.fixture
def vm(cluster: MemoryCluster, tmp_path: Path) -> Vm:
    """A VM whose volume is given with each point."""
    vm = Vm(cluster.state_manager(replica_wait_s=1.0), "vm", tmp_path)
    vm.volume(0)
    vm.register()
    return vm


def save(manager: StateManager, data: bytes) -> str:
    """Take a snapshot of these bytes."""
    return manager.create_snapshot("vm", sources={"root": MemorySource(data)})


@pytest.mark.slow
def test_one_full_node_of_three_stops_no_backup(cluster: MemoryCluster, vm: Vm) -> None:
    fill(cluster, 1)
    data = noise(24 * MIB, 1)
    snapshot = save(vm.manager, data)
    stats = vm.manager.point(snapshot).stats
    assert stats.under_replicated_blocks == stats.stored_blocks > 300
    assert (vm.restored(snapshot) / "root.raw").read_bytes() == data
    assert not data_ids(cluster, 1)


@pytest.mark.slow
def test_two_full_nodes_of_three_are_an_error_and_leave_nothing(cluster: MemoryCluster, vm: Vm) -> None:
    before = save(vm.manager, noise(4 * MIB, 2))
    held = store_of(cluster, 1).status().block_count
    for number in (1, 2):
        fill(cluster, number)
    error = error_of(lambda: save(vm.manager, noise(24 * MIB, 3)))
    assert error.code is ErrorCode.DISK_FULL
    assert "no space" in error.message
    assert [point.point_id for point in vm.manager.points("vm")] == [before]
    assert vm.manager.cluster_status().session_count == 0
    assert store_of(cluster, 1).status().block_count == held
    # Reads go on, and so do writes once there is space.
    assert (vm.restored(before) / "root.raw").read_bytes() == noise(4 * MIB, 2)
    store_of(cluster, 1)._capacity_bytes = 1 << 30
    after = save(vm.manager, noise(24 * MIB, 3))
    assert (vm.restored(after) / "root.raw").read_bytes() == noise(24 * MIB, 3)


@pytest.mark.slow
def test_a_node_whose_disk_hangs_holds_up_no_restore(cluster: MemoryCluster, vm: Vm) -> None:
    data = noise(96 * MIB, 4)
    snapshot = save(vm.manager, data)
    with stalled(cluster, 1):
        began_s = time.monotonic()
        assert (vm.restored(snapshot) / "root.raw").read_bytes() == data
        assert vm.manager.verify(snapshot).blocks > 1000
        with vm.manager.open_volume(snapshot, cache_bytes=0) as file:
            assert file.read(MIB) == data[:MIB]
        assert time.monotonic() - began_s < SOON_S


@pytest.mark.slow
def test_a_node_whose_disk_hangs_holds_up_no_backup(cluster: MemoryCluster, vm: Vm) -> None:
    data = noise(160 * MIB, 5)
    with stalled(cluster, 2):
        began_s = time.monotonic()
        snapshot = save(vm.manager, data)
        assert time.monotonic() - began_s < SOON_S
        assert vm.manager.point(snapshot).stats.under_replicated_blocks > 2000
        assert (vm.restored(snapshot) / "root.raw").read_bytes() == data


@pytest.mark.slow
def test_what_all_owners_are_slow_with_is_waited_for(cluster: MemoryCluster, vm: Vm) -> None:
    data = noise(4 * MIB, 6)
    snapshot = save(vm.manager, data)
    with ExitStack() as stalls:
        for number in range(3):
            stalls.enter_context(stalled(cluster, number))
        # After every owner was passed over once.
        timer = threading.Timer(8.0, stalls.pop_all().close)
        timer.start()
        try:
            assert (vm.restored(snapshot) / "root.raw").read_bytes() == data
        finally:
            timer.join()


_DYING_CLIENT = """
import sys, threading
from holdfast import StateManager
from tests.client.rig import MemorySource, noise

def stay(offset):
    if offset >= 48 << 20:
        threading.Event().wait()

manager = StateManager(sys.argv[1], token=sys.argv[2])
manager.create_snapshot("vm", sources={"root": MemorySource(noise(64 << 20, 7), at_read=stay)})
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_client_that_is_gone_leaves_no_session_and_its_blocks_are_collected(cluster: MemoryCluster, vm: Vm) -> None:
    kept = save(vm.manager, noise(4 * MIB, 8))
    held = sorted(data_ids(cluster, 0))
    client = subprocess.Popen([sys.executable, "-c", _DYING_CLIENT, cluster.coordinator_address, cluster.token])
    try:
        wait_until(lambda: len(data_ids(cluster, 0)) > len(held), "blocks that the client sends")
    finally:
        client.kill()
        client.wait()
    busy = error_of(lambda: save(vm.manager, noise(MIB, 9)))
    assert busy.code is ErrorCode.BUSY
    wait_until(lambda: not vm.manager.cluster_status().session_count, "the lapse of the session")
    # Others are served as ever, and what the dead one left is collected.
    later = save(vm.manager, noise(MIB, 9))
    vm.manager.forget(later)
    vm.manager.collect()
    assert sorted(data_ids(cluster, 0)) == held
    assert [point.point_id for point in vm.manager.points("vm")] == [kept]
