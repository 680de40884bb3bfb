"""Backups by a change hint: the same point as by reading everything, and no more read than changed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast import ErrorCode, StateManager, VolumeSpec
from holdfast.index import IndexReader
from holdfast.results import Reading
from holdfast.testing import MemoryCluster
from tests.client.rig import BLOCK, Vm, data_ids, digest, error_of, noise, rot, write_at
from tests.client.test_points import apply, pieces

MIB = 1 << 20
_names = (f"hinted-{number}" for number in itertools.count())

spare_ranges = st.lists(st.tuples(st.integers(0, 4 * MIB), st.integers(0, 300_000)), max_size=4)


@pytest.mark.slow
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.integers(0, 3 * MIB),
    pieces,
    st.lists(st.tuples(st.none() | st.integers(0, 3 * MIB), pieces, spare_ranges), min_size=1, max_size=3),
    st.sampled_from([16 * 1024, BLOCK, 4 * MIB]),
)
def test_a_hinted_point_is_the_point_that_reading_everything_makes(
    manager: StateManager, tmp_path: Path, size: int, first: Any, later: Any, block_bytes: int
) -> None:
    vm = Vm(manager, next(_names), tmp_path)
    path = vm.volume(size)
    # Which block a delta is coded against follows from what is read first; without deltas even the roots are the same.
    manager.register_vm(vm.name, {"root": VolumeSpec(path, block_bytes=block_bytes, delta=False)})
    apply(path, size, first)
    parent = snapshot = vm.snapshot()
    for new_size, changes, spare in later:
        new_size = path.stat().st_size if new_size is None else new_size
        apply(path, new_size, changes)
        changed = [(offset, length) for offset, length, _, _ in changes] + spare
        compared = manager.point(manager.incremental_backup(vm.name, snapshot, parent=parent))
        hinted = manager.point(
            manager.incremental_backup(vm.name, snapshot, parent=parent, changed=changed, since=parent, sample=1)
        )
        assert hinted.volumes[0].reading is Reading.CHANGED
        assert compared.volumes[0].reading is Reading.COMPARED
        for field in ("root", "size_bytes", "block_count"):
            assert getattr(hinted.volumes[0], field) == getattr(compared.volumes[0], field)
        assert hinted.stats.changed_bytes == compared.stats.changed_bytes
        assert manager.verify(hinted.point_id).blocks == hinted.volumes[0].block_count
        vm.assert_restores(snapshot, hinted.point_id)
        parent = hinted.point_id
    path.unlink()


@pytest.mark.slow
def test_no_more_is_read_than_changed(vm: Vm) -> None:
    vm.volume(200 * MIB, [(0, noise(30 * MIB, 8))])
    vm.register()
    snapshot = vm.snapshot()
    write_at(vm.path(), 10 * MIB + 5, noise(BLOCK, 5))
    write_at(vm.path(), 150 * MIB, noise(BLOCK, 6))
    changed = [(10 * MIB + 5, BLOCK), (150 * MIB, BLOCK), (100 * MIB, MIB), (1 << 40, 5)]
    backup = vm.manager.incremental_backup(vm.name, snapshot, changed=changed, since=snapshot)
    point = vm.manager.point(backup)
    assert point.stats.read_bytes == 3 * BLOCK
    assert point.stats.changed_blocks == 3
    assert point.volumes[0].reading is Reading.CHANGED
    assert point.volumes[0].block_count == vm.manager.point(snapshot).volumes[0].block_count + 1
    vm.assert_restores(snapshot, backup)


@pytest.mark.slow
def test_what_is_fetched_does_not_grow_with_the_disk(vm: Vm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same data and the same change, on disks of 1, 4 and 16 GiB."""
    fetched: list[int] = []
    nodes = IndexReader.nodes

    async def counted(self: IndexReader, ids: Iterable[bytes], *, what: str) -> dict[bytes, bytes]:
        wanted = list(ids)
        fetched.append(len(wanted))
        return await nodes(self, wanted, what=what)

    counts = []
    for size_gib in (1, 4, 16):
        # One piece of data a leaf, 100 leaves of them.
        step = size_gib * (1 << 30) // 100
        vm.volume(size_gib << 30, [(at * step, noise(BLOCK, at)) for at in range(100)])
        vm.register()
        snapshot = vm.snapshot()
        write_at(vm.path(), 50 * step, b"changed")
        monkeypatch.setattr(IndexReader, "nodes", counted)
        fetched.clear()
        backup = vm.manager.incremental_backup(vm.name, snapshot, changed=[(50 * step, 7)], since=snapshot, sample=0)
        monkeypatch.setattr(IndexReader, "nodes", nodes)
        counts.append((len(fetched), sum(fetched)))
        assert vm.manager.point(backup).stats.read_bytes <= 2 * BLOCK
        assert vm.manager.point(backup).volumes[0].reading is Reading.CHANGED
    # A way down the tree: one node a level.
    assert counts == [(2, 2), (3, 3), (3, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("block_bytes", [BLOCK, 4 * MIB])
def test_processes_read_no_more_than_changed_either(
    shared_cluster: MemoryCluster, tmp_path: Path, block_bytes: int
) -> None:
    with shared_cluster.state_manager(sealing="processes") as manager:
        vm = Vm(manager, next(_names), tmp_path)
        vm.volume(64 * MIB, [(0, noise(40 * MIB, 8))])
        vm.register(block_bytes=block_bytes)
        snapshot = vm.snapshot()
        changed = [(2 * MIB, 100), (9 * MIB, 5 * MIB), (50 * MIB, 100), (63 * MIB, MIB)]
        for offset, length in changed:
            write_at(vm.path(), offset, noise(length, offset))
        backup = manager.incremental_backup(vm.name, snapshot, changed=changed, since=snapshot, sample=1)
        point = manager.point(backup)
        assert point.volumes[0].reading is Reading.CHANGED
        assert point.stats.read_bytes <= sum(length + 2 * block_bytes for _, length in changed)
        assert manager.verify(backup).blocks == point.volumes[0].block_count
        vm.assert_restores(snapshot, backup)


def test_blocks_that_changed_and_are_holes_become_zero(vm: Vm) -> None:
    vm.volume(20 * MIB, [(0, noise(20 * MIB, 8))])
    vm.register()
    snapshot = vm.snapshot()
    with vm.path().open("r+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, 20 * MIB)
        stream.truncate(9 * MIB)
        stream.truncate(20 * MIB)
    backup = vm.manager.incremental_backup(vm.name, snapshot, changed=[(9 * MIB, 11 * MIB)], since=snapshot, sample=1)
    point = vm.manager.point(backup)
    assert point.volumes[0].reading is Reading.CHANGED
    assert point.volumes[0].block_count == 9 * 16
    vm.assert_restores(snapshot, backup)


def test_volumes_that_nothing_was_told_of_are_read(vm: Vm) -> None:
    for name in ("data", "root"):
        vm.volume(2 * MIB, [(0, noise(2 * MIB))], name=name)
    vm.register("data", "root")
    snapshot = vm.snapshot()
    for name in ("data", "root"):
        write_at(vm.path(name), MIB, b"changed")
    backup = vm.manager.incremental_backup(vm.name, snapshot, changed={"data": [(MIB, 7)]}, since=snapshot)
    readings = {volume.name: volume.reading for volume in vm.manager.point(backup).volumes}
    assert readings == {"data": Reading.CHANGED, "root": Reading.COMPARED}
    vm.assert_restores(snapshot, backup, names=("data", "root"))
    assert vm.manager.last_transfer is not None
    assert vm.manager.last_transfer.notices == ()


def test_a_hint_since_another_point_is_not_used(vm: Vm) -> None:
    vm.volume(2 * MIB, [(0, noise(2 * MIB))])
    vm.register()
    snapshot = vm.snapshot()
    write_at(vm.path(), 0, b"one")
    first = vm.manager.incremental_backup(vm.name, snapshot)
    write_at(vm.path(), MIB, b"two")
    backup = vm.manager.incremental_backup(vm.name, snapshot, changed=[(MIB, 3)], since=snapshot)
    point = vm.manager.point(backup)
    assert point.parent_id == first
    assert point.volumes[0].reading is Reading.COMPARED
    assert snapshot in point.volumes[0].reading_note
    assert vm.manager.last_transfer is not None
    assert [snapshot in notice for notice in vm.manager.last_transfer.notices] == [True]
    vm.assert_restores(snapshot, backup)


def test_a_hint_over_another_block_size_is_not_used(vm: Vm) -> None:
    vm.volume(2 * MIB, [(0, noise(2 * MIB))])
    vm.register()
    snapshot = vm.snapshot()
    vm.register(block_bytes=2 * BLOCK)
    backup = vm.manager.incremental_backup(vm.name, snapshot, changed=[], since=snapshot)
    point = vm.manager.point(backup)
    assert point.volumes[0].reading is Reading.WHOLE
    assert point.volumes[0].reading_note
    vm.assert_restores(snapshot, backup)


@pytest.mark.parametrize(
    "arguments",
    [
        {"changed": [(0, 1)]},
        {"since": "snap-x"},
        {"changed": [(-1, 5)], "since": "snap-x"},
        {"changed": [(0, -5)], "since": "snap-x"},
        {"changed": [(0, 1 << 63)], "since": "snap-x"},
        {"changed": [(0,)], "since": "snap-x"},
        {"changed": [0, 5], "since": "snap-x"},
        {"changed": [(0, 1.5)], "since": "snap-x"},
        {"changed": [(True, True)], "since": "snap-x"},
        {"changed": ["ab"], "since": "snap-x"},
        {"changed": "ab", "since": "snap-x"},
        {"changed": {"": [(0, 1)]}, "since": "snap-x"},
        {"changed": {"root": 5}, "since": "snap-x"},
        {"changed": [(0, 1)], "since": "../x"},
    ],
)
def test_changes_that_make_no_sense_are_refused(vm: Vm, arguments: dict[str, Any]) -> None:
    error = error_of(lambda: vm.manager.incremental_backup(vm.name, "snap-x", **arguments))
    assert error.code is ErrorCode.INVALID_ARGUMENT


def test_changes_of_no_volume_are_refused(vm: Vm) -> None:
    for name in ("data", "root"):
        vm.volume(MIB, name=name)
    vm.register("data", "root")
    snapshot = vm.snapshot()
    for changed in ([(0, 1)], {"other": [(0, 1)]}):
        error = error_of(
            lambda changed=changed: vm.manager.incremental_backup(vm.name, snapshot, changed=changed, since=snapshot)  # type: ignore[misc]
        )
        assert error.code is ErrorCode.INVALID_ARGUMENT
    assert len(vm.manager.points(vm.name)) == 1
    assert vm.manager.cluster_status().session_count == 0


@pytest.fixture
def own(cluster: MemoryCluster, tmp_path: Path) -> Vm:
    """A VM with 40 MiB of data on a cluster of the test's own; no deltas, so that blocks stand for themselves."""
    vm = Vm(cluster.state_manager(), "vm", tmp_path)
    vm.volume(64 * MIB, [(0, noise(40 * MIB))])
    vm.register()
    return vm


def rot_everywhere(cluster: MemoryCluster, block_id: bytes) -> None:
    """No owner has the block whole."""
    for number in range(3):
        rot(cluster, number, block_id)


@pytest.mark.slow
def test_damaged_blocks_of_the_parent_are_read_again(own: Vm, cluster: MemoryCluster) -> None:
    snapshot = own.snapshot()
    lost = data_ids(cluster, 0)[77]
    rot_everywhere(cluster, lost)
    assert error_of(lambda: own.manager.verify(snapshot)).block_ids == (lost,)
    write_at(own.path(), 50 * MIB, b"elsewhere")
    backup = own.manager.incremental_backup(own.name, snapshot, changed=[(50 * MIB, 9)], since=snapshot)
    point = own.manager.point(backup)
    assert point.volumes[0].reading is Reading.CHANGED
    assert point.stats.read_bytes == BLOCK + 4096
    own.assert_restores(snapshot, backup)
    assert own.manager.verify(backup).blocks == point.volumes[0].block_count == 40 * 16 + 1


@pytest.mark.slow
@pytest.mark.parametrize("known", [False, True])
def test_a_damaged_index_where_the_hint_touches_it_reads_everything(
    own: Vm, cluster: MemoryCluster, known: bool
) -> None:
    snapshot = own.snapshot()
    for block_id in data_ids(cluster, 0, 2):
        if block_id != own.manager.point(snapshot).volumes[0].root:
            rot_everywhere(cluster, block_id)
    if known:
        assert error_of(lambda: own.manager.verify(snapshot)).code is ErrorCode.CORRUPT
    write_at(own.path(), 20 * MIB, b"here")
    write_at(own.path(), 50 * MIB, b"there")
    changed = [(20 * MIB, 4), (50 * MIB, 5)]
    backup = own.manager.incremental_backup(own.name, snapshot, changed=changed, since=snapshot, sample=0)
    point = own.manager.point(backup)
    assert point.volumes[0].reading is Reading.COMPARED
    assert "index" in point.volumes[0].reading_note
    assert own.manager.verify(backup).blocks == point.volumes[0].block_count == 40 * 16 + 1
    assert digest(own.restored(snapshot, backup) / "root.raw") == digest(own.path())
