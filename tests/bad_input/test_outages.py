"""Nodes, coordinators and etcd that are down: unavailable is an answer of its own, and nothing is half-done."""

from __future__ import annotations

from pathlib import Path

import pytest

from holdfast import AsyncStateManager, ErrorCode, HoldfastError
from holdfast.testing import MemoryCluster
from holdfast_coordinator.embedded import EmbeddedCoordinator
from holdfast_core.runtime.credentials import new_token
from holdfast_core.runtime.metadata.etcd import EtcdStore
from tests.bad_input.rig import error_of, make_vm
from tests.support.etcd import EtcdCluster

TOKEN = new_token(bytes)


@pytest.mark.slow
def test_no_reachable_quorum(tmp_path: Path) -> None:
    with MemoryCluster(nodes=3) as cluster, cluster.state_manager() as manager:
        vm = make_vm(manager, tmp_path, "one")
        before = [point.point_id for point in manager.points("one")]
        cluster.stop_node(0)
        cluster.stop_node(1)
        # One copy of three is left: enough to read from, not enough to write to.
        where = manager.restore_vm(vm.snapshot_id, vm.backup_id, target=tmp_path / "again")
        assert (where / "root.raw").read_bytes() == vm.disk.read_bytes()
        vm.disk.write_bytes(b"changed" * 100_000)
        error = error_of(lambda: manager.incremental_backup("one", vm.snapshot_id))
        assert error.code is ErrorCode.NO_QUORUM, repr(error)
        assert error.retryable
        assert [point.point_id for point in manager.points("one")] == before
        assert manager.cluster_status().session_count == 0

        cluster.stop_node(2)
        error = error_of(lambda: manager.restore_vm(vm.snapshot_id, "", target=tmp_path / "none"))
        assert error.code is ErrorCode.UNREACHABLE, repr(error)
        assert not (tmp_path / "none").exists()

        for number in range(3):
            cluster.start_node(number)
        assert manager.incremental_backup("one", vm.snapshot_id)


@pytest.mark.slow
async def test_an_etcd_that_is_down(tmp_path: Path) -> None:
    with EtcdCluster(members=1, tmp_path=tmp_path) as etcd:
        store = await EtcdStore.open(etcd.endpoints, tls=None, call_timeout_s=2.0)
        coordinator = EmbeddedCoordinator(nodes_expected=3, replicas=3, store=store, admin_token=TOKEN)
        address = await coordinator.start()
        try:
            async with AsyncStateManager(address, token=TOKEN) as manager:
                await manager.register_vm("one", {"root": "/disk.raw"})
                etcd.kill(0)
                with pytest.raises(HoldfastError) as caught:
                    await manager.register_vm("two", {"root": "/disk.raw"})
                assert caught.value.code is ErrorCode.UNREACHABLE
                assert caught.value.retryable
                etcd.restart(0)
                etcd.wait_healthy()
                assert [vm.vm_id for vm in await manager.list_vms()] == ["one"]
        finally:
            await coordinator.stop()
            await store.close()
