"""Nodes that stop, blocks that rot, sources that change, sessions that collide: each its own error."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from holdfast import ErrorCode, HoldfastError, StateManager
from holdfast.testing import MemoryCluster
from tests.client.rig import BLOCK, MemorySource, Vm, data_ids, error_of, noise, rot, store_of, write_at
from tests.support.waiting import wait_until

MIB = 1 << 20


@pytest.fixture
def own(cluster: MemoryCluster, tmp_path: Path) -> Vm:
    """A VM with 6 MiB of data on a cluster of the test's own."""
    vm = Vm(cluster.state_manager(replica_wait_s=2.0), "vm", tmp_path)
    vm.volume(8 * MIB + 100, [(0, noise(6 * MIB))])
    vm.register()
    return vm


def left_behind(vm: Vm) -> list[str]:
    """Names in the VM's folder that are not its volumes."""
    return sorted(path.name for path in vm.folder.iterdir() if not path.name.startswith(vm.name))


def test_one_node_less_is_enough_to_write_and_to_read(own: Vm, cluster: MemoryCluster) -> None:
    cluster.stop_node(1)
    snapshot = own.snapshot()
    stats = own.manager.point(snapshot).stats
    assert stats.under_replicated_blocks == stats.stored_blocks
    own.assert_restores(snapshot)
    cluster.start_node(1)
    cluster.stop_node(0)
    own.assert_restores(snapshot)


def test_two_nodes_less_are_too_many_to_write(own: Vm, cluster: MemoryCluster) -> None:
    snapshot = own.snapshot()
    cluster.stop_node(0)
    cluster.stop_node(2)
    own.assert_restores(snapshot)
    write_at(own.path(), 0, noise(BLOCK, 3))
    error = error_of(lambda: own.manager.incremental_backup(own.name, snapshot))
    assert error.code in (ErrorCode.NO_QUORUM, ErrorCode.UNREACHABLE)
    assert error.retryable
    cluster.start_node(0)
    backup = own.manager.incremental_backup(own.name, snapshot)
    own.assert_restores(snapshot, backup)
    assert [point.point_id for point in own.manager.points(own.name)] == [snapshot, backup]


def test_no_node_at_all_to_read_from(own: Vm, cluster: MemoryCluster) -> None:
    snapshot = own.snapshot()
    for number in range(3):
        cluster.stop_node(number)
    error = error_of(lambda: own.restored(snapshot))
    assert error.code is ErrorCode.UNREACHABLE
    assert left_behind(own) == []


@pytest.mark.slow
def test_a_node_that_stops_during_a_snapshot(own: Vm, cluster: MemoryCluster) -> None:
    def stop(offset: int) -> None:
        if offset >= 16 * MIB and not stopped.is_set():
            stopped.set()
            cluster.stop_node(2)

    stopped = threading.Event()
    source = MemorySource(noise(48 * MIB), at_read=stop)
    snapshot = own.manager.create_snapshot(own.name, sources={"root": source})
    assert stopped.is_set()
    assert source.closed
    assert own.manager.point(snapshot).stats.under_replicated_blocks > 0
    target = own.restored(snapshot)
    assert (target / "root.raw").read_bytes() == bytes(source.data)


@pytest.mark.slow
def test_a_node_that_stops_during_a_restore(own: Vm, cluster: MemoryCluster) -> None:
    data = noise(48 * MIB)
    snapshot = own.manager.create_snapshot(own.name, sources={"root": MemorySource(data)})
    stopped = threading.Event()

    def stop(progress: object) -> None:
        if not stopped.is_set():
            stopped.set()
            stopper.start()

    stopper = threading.Thread(target=cluster.stop_node, args=(1,))
    own.manager.restore_vm(snapshot, target=own.folder / "out", progress=stop)
    stopper.join()
    assert (own.folder / "out" / "root.raw").read_bytes() == data


@pytest.mark.slow
def test_rot_on_one_node_is_read_around(own: Vm, cluster: MemoryCluster) -> None:
    snapshot = own.snapshot()
    for kind in (0, 2):
        for block_id in data_ids(cluster, 0, kind):
            rot(cluster, 0, block_id)
    own.assert_restores(snapshot)
    assert own.manager.verify(snapshot).blocks == 96
    # What reads found, the node fetches from its peers; the rest is found by a verification that hashes on the nodes.
    wait_until(lambda: own.manager.verify(snapshot, node_only=True).thin_blocks == 0, "whole copies everywhere")
    assert store_of(cluster, 0).status().quarantined_count == 0


@pytest.mark.slow
@pytest.mark.parametrize("how", ["corrupt", "missing"])
def test_a_block_lost_everywhere_is_named_with_its_range(own: Vm, cluster: MemoryCluster, how: str) -> None:
    snapshot = own.snapshot()
    lost = data_ids(cluster, 0)[7]
    for number in range(3):
        if how == "corrupt":
            rot(cluster, number, lost)
        else:
            store_of(cluster, number).delete(1, [lost])
    code = ErrorCode.CORRUPT if how == "corrupt" else ErrorCode.MISSING
    for call in (
        lambda: own.restored(snapshot),
        lambda: own.manager.verify(snapshot),
        lambda: own.manager.verify(snapshot, node_only=True),
    ):
        error = error_of(call)
        assert error.code is code
        assert error.block_ids == (lost,)
        name, _, where = error.facts["ranges"].partition(":")
        start, end = map(int, where.split("-"))
        assert name == "root"
        assert end - start == BLOCK
        assert start % BLOCK == 0
    assert left_behind(own) == []
    backup = own.manager.incremental_backup(own.name, snapshot)
    assert own.manager.point(backup).stats.stored_blocks >= 1
    own.assert_restores(snapshot, backup)
    own.assert_restores(snapshot)


@pytest.mark.slow
def test_a_lost_index_node_is_named_and_healed(own: Vm, cluster: MemoryCluster) -> None:
    snapshot = own.snapshot()
    root = own.manager.point(snapshot).volumes[0].root
    for number in range(3):
        store_of(cluster, number).delete(1, [root])
    error = error_of(lambda: own.restored(snapshot))
    assert error.code is ErrorCode.MISSING
    assert error.block_ids == (root,)
    assert left_behind(own) == []
    own.manager.incremental_backup(own.name, snapshot)
    own.assert_restores(snapshot)


def test_a_source_that_changes_while_it_is_read(own: Vm) -> None:
    changed = threading.Event()

    def change(progress: object) -> None:
        if not changed.is_set():
            changed.set()
            write_at(own.path(), 5, b"meanwhile")

    error = error_of(lambda: own.manager.create_snapshot(own.name, progress=change))
    assert error.code is ErrorCode.VOLUME_CHANGED
    assert own.manager.points(own.name) == []
    assert own.manager.cluster_status().session_count == 0
    own.register(live=True)
    changed.clear()
    point = own.manager.point(own.manager.create_snapshot(own.name, progress=change))
    assert [volume.consistency.value for volume in point.volumes] == ["fuzzy"]
    assert [
        volume.consistency.value for volume in own.manager.point(own.manager.create_snapshot(own.name)).volumes
    ] == ["offline"]


@pytest.mark.slow
def test_a_block_is_what_was_read_once(own: Vm) -> None:
    # The source shows other bytes at every read: the point must restore to what one read gave, whole and verified.
    source = MemorySource(noise(4 * MIB))

    def change(offset: int) -> None:
        source.data[offset : offset + MIB] = noise(MIB, source.reads)

    source._at_read = change
    snapshot = own.manager.create_snapshot(own.name, sources={"root": source})
    # In pieces of 1 MiB, and no piece twice.
    assert source.reads == 4
    assert (own.restored(snapshot) / "root.raw").read_bytes() == bytes(source.data)


def test_a_missing_source_leaves_no_session(own: Vm) -> None:
    own.path().unlink()
    assert error_of(own.snapshot).code is ErrorCode.SOURCE_UNREADABLE
    assert own.manager.cluster_status().session_count == 0
    own.volume(MIB)
    own.assert_restores(own.snapshot())


@pytest.mark.slow
def test_two_sessions_on_one_vm(own: Vm, cluster: MemoryCluster) -> None:
    other = cluster.state_manager()
    found: list[HoldfastError] = []
    taken: list[str] = []

    def meet(offset: int) -> None:
        if offset == 8 * MIB:
            found.append(error_of(lambda: other.create_snapshot(own.name)))
        if offset == 16 * MIB:
            taken.append(other.create_snapshot(own.name, takeover=True))

    source = MemorySource(noise(32 * MIB), at_read=meet)
    error = error_of(lambda: own.manager.create_snapshot(own.name, sources={"root": source}))
    assert found[0].code is ErrorCode.BUSY
    assert float(found[0].facts["seconds_left"]) > 0
    assert error.code is ErrorCode.SESSION_LAPSED
    assert [point.point_id for point in own.manager.points(own.name)] == taken
    own.assert_restores(taken[0])


def test_an_exception_from_the_progress_callback_ends_the_operation(own: Vm) -> None:
    class Enough(Exception):
        pass

    def stop(progress: object) -> None:
        raise Enough

    with pytest.raises(Enough):
        own.manager.create_snapshot(own.name, progress=stop)
    assert own.manager.points(own.name) == []
    assert own.manager.cluster_status().session_count == 0
    snapshot = own.snapshot()
    with pytest.raises(Enough):
        own.manager.restore_vm(snapshot, target=own.folder / "out", progress=stop)
    assert left_behind(own) == []


def test_no_coordinator() -> None:
    with StateManager("127.0.0.1:1") as manager:
        error = error_of(lambda: manager.list_vms())
        assert error.code is ErrorCode.UNREACHABLE
        assert error_of(lambda: manager.create_snapshot("vm")).code is ErrorCode.UNREACHABLE
    assert error_of(lambda: StateManager()).code is ErrorCode.INVALID_ARGUMENT
    assert error_of(lambda: StateManager("nonsense")).code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 129, ".hidden"])
def test_names_and_ids_that_are_not_allowed(manager: StateManager, name: str, tmp_path: Path) -> None:
    calls = [
        lambda: manager.register_vm(name, {"root": tmp_path / "x"}),
        lambda: manager.register_vm("fine", {name: tmp_path / "x"}),
        lambda: manager.create_snapshot(name),
        lambda: manager.incremental_backup("fine", name),
        lambda: manager.restore_vm(name, target=tmp_path / "t"),
        lambda: manager.persist_application_data(name, b""),
        lambda: manager.retrieve_application_data(name),
        lambda: manager.point(name),
        lambda: manager.forget(name),
        lambda: manager.verify(name),
    ]
    for call in calls:
        assert error_of(call).code is ErrorCode.INVALID_ARGUMENT
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there(manager: StateManager, tmp_path: Path) -> None:
    for call in (
        lambda: manager.create_snapshot("nobody"),
        lambda: manager.point("snap-nothing"),
        lambda: manager.restore_vm("snap-nothing", target=tmp_path / "t"),
        lambda: manager.verify("snap-nothing"),
        lambda: manager.forget("snap-nothing"),
        lambda: manager.retrieve_application_data("app-nothing"),
        lambda: manager.application_data("app-nothing"),
        lambda: manager.forget_application_data("app-nothing"),
        lambda: manager.vm("nobody"),
    ):
        assert error_of(call).code is ErrorCode.NOT_FOUND
    assert list(tmp_path.iterdir()) == []
