"""Readers and writers while a layout change settles: owners let go of blocks, and nobody takes that for damage."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from holdfast import ErrorCode, StateManager
from holdfast.testing import MemoryCluster
from holdfast_coordinator import keyspace
from tests.client.rig import BLOCK, TENANT, MemorySource, Vm, data_ids, error_of, noise, store_of
from tests.client.settling import change_layout, metadata_of, move

MIB = 1 << 20
SIZE = 24 * MIB
# More than the windows that a restore has in flight at once.
LARGE = 56 * MIB


@pytest.fixture
def two() -> Iterator[MemoryCluster]:
    """Two nodes and one copy, all of it on the first: a move leaves nothing where it was."""
    with MemoryCluster(nodes=2, replicas=1) as cluster:
        with cluster.state_manager() as manager:
            move(cluster, manager, 2, "node-2")
        yield cluster


@pytest.fixture
def vm(two: MemoryCluster, tmp_path: Path) -> Vm:
    """A VM of that cluster."""
    vm = Vm(two.state_manager(), "vm", tmp_path)
    vm.volume(0)
    vm.register()
    return vm


def once_moved(cluster: MemoryCluster) -> tuple[Callable[[object], None], threading.Event]:
    """A callback that moves everything to the second node at its first call, and whether it has."""
    done = threading.Event()
    one_at_a_time = threading.Lock()
    other = cluster.state_manager()

    def act(_: object) -> None:
        with one_at_a_time:
            if not done.is_set():
                move(cluster, other, 2, "node-1")
                assert not data_ids(cluster, 0)
                done.set()

    return act, done


def damage_recorded(cluster: MemoryCluster) -> int:
    """How many blocks the coordinator took for lost."""
    prefix = keyspace.TenantKeyspace(TENANT).damage_ids_prefix
    return len(cluster.run(metadata_of(cluster).snapshot([prefix])).items)


@pytest.mark.slow
def test_a_restore_goes_on_with_the_new_owners(two: MemoryCluster, vm: Vm) -> None:
    data = noise(LARGE, 1)
    snapshot = vm.manager.create_snapshot("vm", sources={"root": MemorySource(data)})
    act, moved = once_moved(two)
    target = vm.manager.restore_vm(snapshot, target=vm.folder / "out", progress=act)
    assert moved.is_set()
    assert (target / "root.raw").read_bytes() == data
    assert damage_recorded(two) == 0


@pytest.mark.slow
@pytest.mark.parametrize("node_only", [False, True])
def test_a_check_goes_on_with_the_new_owners(two: MemoryCluster, vm: Vm, node_only: bool) -> None:
    snapshot = vm.manager.create_snapshot("vm", sources={"root": MemorySource(noise(LARGE, 2))})
    act, moved = once_moved(two)
    report = vm.manager.verify(snapshot, node_only=node_only, progress=act)
    assert moved.is_set()
    assert report.blocks >= LARGE // BLOCK
    assert damage_recorded(two) == 0


@pytest.mark.slow
def test_a_served_image_goes_on_with_the_new_owners(two: MemoryCluster, vm: Vm) -> None:
    data = noise(SIZE, 3)
    snapshot = vm.manager.create_snapshot("vm", sources={"root": MemorySource(data)})
    act, _ = once_moved(two)
    with vm.manager.open_volume(snapshot, cache_bytes=0) as file:
        assert file.read(BLOCK) == data[:BLOCK]
        act(None)
        file.seek(0)
        assert file.readall() == data


@pytest.mark.slow
def test_data_of_tasks_is_read_on_from_the_new_owners(two: MemoryCluster, vm: Vm) -> None:
    data = noise(40 * MIB, 4)
    stored = vm.manager.persist_application_data("task", data)
    act, _ = once_moved(two)
    pieces = vm.manager.retrieve_stream(stored)
    read = next(pieces)
    act(None)
    assert read + b"".join(pieces) == data


@pytest.mark.slow
def test_a_backup_reads_its_parent_and_its_bases_from_the_new_owners(two: MemoryCluster, vm: Vm) -> None:
    data = bytearray(b"".join(noise(512, at) * 128 for at in range(SIZE // BLOCK)))
    snapshot = vm.manager.create_snapshot("vm", sources={"root": MemorySource(bytes(data))})
    act, moved = once_moved(two)
    for at in range(0, SIZE, 4 * BLOCK):
        data[at + 100 : at + 200] = noise(100, at)
    source = MemorySource(bytes(data), at_read=act)
    backup = vm.manager.incremental_backup("vm", snapshot, sources={"root": source})
    assert moved.is_set()
    stats = vm.manager.point(backup).stats
    assert stats.stored_plain_bytes < SIZE // 2
    assert stats.delta_blocks > 50
    assert (vm.restored(snapshot, backup) / "root.raw").read_bytes() == bytes(data)
    assert damage_recorded(two) == 0


@pytest.mark.slow
def test_what_is_lost_while_a_layout_settles_is_still_told(two: MemoryCluster, vm: Vm) -> None:
    snapshot = vm.manager.create_snapshot("vm", sources={"root": MemorySource(noise(LARGE, 5))})
    lost = data_ids(two, 0)[17]
    store_of(two, 0).delete(TENANT, [lost])
    act, _ = once_moved(two)
    error = error_of(lambda: vm.manager.restore_vm(snapshot, target=vm.folder / "out", progress=act))
    assert error.code is ErrorCode.MISSING
    assert error.block_ids == (lost,)
    assert damage_recorded(two) == 1


def test_nothing_counts_as_lost_while_no_coordinator_can_say_who_the_owners_are(two: MemoryCluster, vm: Vm) -> None:
    snapshot = vm.manager.create_snapshot("vm", sources={"root": MemorySource(noise(SIZE, 6))})
    with vm.manager.open_volume(snapshot, cache_bytes=0) as file:
        file.read(BLOCK)
        for block_id in data_ids(two, 0):
            store_of(two, 0).delete(TENANT, [block_id])
        two.run(two._coordinator.stop())  # type: ignore[union-attr]
        file.seek(20 * MIB)
        assert error_of(lambda: file.read(BLOCK)).code is ErrorCode.UNREACHABLE


@pytest.mark.slow
def test_a_snapshot_over_two_layout_changes_commits(two: MemoryCluster, vm: Vm) -> None:
    data = noise(SIZE, 7)
    other: StateManager = two.state_manager()
    due = {8 * MIB: "node-1", 16 * MIB: "node-2"}

    one_at_a_time = threading.Lock()

    def act(offset: int) -> None:
        with one_at_a_time:
            for place in [place for place in due if offset >= place]:
                change_layout(other, due.pop(place))

    snapshot = vm.manager.create_snapshot("vm", sources={"root": MemorySource(data, at_read=act)})
    assert not due
    move(two, other, 2, "node-1")
    assert (vm.restored(snapshot) / "root.raw").read_bytes() == data
