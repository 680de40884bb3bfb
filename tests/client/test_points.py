"""Snapshot, change, back up, restore: bit for bit, and no more sent than changed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast import Codec, Consistency, ErrorCode, StateManager
from holdfast.testing import MemoryCluster
from tests.client.rig import BLOCK, Vm, allocated_bytes, digest, error_of, noise, write_at

MIB = 1 << 20
_names = (f"drawn-{number}" for number in itertools.count())

pieces = st.lists(
    st.tuples(st.integers(0, 3 * MIB), st.integers(1, 200_000), st.integers(0, 3), st.booleans()), max_size=6
)


def draw_data(length: int, seed: int, compresses: bool) -> bytes:
    """Zeros for seed 0, noise, or something that compresses."""
    if seed == 0:
        return bytes(length)
    return (b"%08d" % seed * (length // 8 + 1))[:length] if compresses else noise(length, seed)


def apply(path: Path, size: int, changes: list[tuple[int, int, int, bool]]) -> None:
    """Resize a file and write pieces into it."""
    with path.open("r+b") as stream:
        stream.truncate(size)
        for offset, length, seed, compresses in changes:
            room = max(0, size - offset)
            stream.seek(offset)
            stream.write(draw_data(min(length, room), seed, compresses))


@pytest.mark.slow
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.integers(0, 3 * MIB),
    pieces,
    st.lists(st.tuples(st.integers(0, 3 * MIB), pieces), max_size=3),
    st.sampled_from([16 * 1024, BLOCK, 256 * 1024, 4 * MIB]),
    st.sampled_from(list(Codec)),
)
def test_every_point_of_a_chain_restores(
    manager: StateManager, tmp_path: Path, size: int, first: Any, later: Any, block_bytes: int, codec: Codec
) -> None:
    vm = Vm(manager, next(_names), tmp_path)
    path = vm.volume(size)
    vm.register(block_bytes=block_bytes, codec=codec)
    apply(path, size, first)
    snapshot = vm.snapshot()
    expected = {snapshot: (digest(path), path.stat().st_size)}
    for new_size, changes in later:
        apply(path, new_size, changes)
        backup = manager.incremental_backup(vm.name, snapshot)
        expected[backup] = (digest(path), new_size)
    for point, (wanted, wanted_size) in expected.items():
        target = vm.restored(snapshot, "" if point == snapshot else point)
        assert (digest(target / "root.raw"), (target / "root.raw").stat().st_size) == (wanted, wanted_size)
        assert manager.verify(point).blocks == manager.point(point).volumes[0].block_count
    path.unlink()


def test_the_five_calls_as_the_mission_writes_them(vm: Vm) -> None:
    vm.volume(5 * MIB + 123, [(0, noise(300_000)), (4 * MIB, b"text" * 100_000)])
    vm.register()
    snapshot = vm.manager.create_snapshot(vm.name)
    write_at(vm.path(), 100_000, b"changed")
    backup = vm.manager.incremental_backup(vm.name, snapshot)
    assert snapshot.startswith("snap-")
    assert backup.startswith("bkp-")
    vm.assert_restores(snapshot, backup)
    assert vm.manager.restore_vm(snapshot, backup, target=vm.folder / "x") == vm.folder / "x"


def test_holes_stay_holes(vm: Vm) -> None:
    vm.volume(64 * MIB, [(10 * MIB, noise(BLOCK)), (20 * MIB, bytes(MIB))])
    vm.register()
    target = vm.restored(vm.snapshot()) / "root.raw"
    assert target.stat().st_size == 64 * MIB
    assert allocated_bytes(target) == BLOCK
    assert digest(target) == digest(vm.path())


def test_an_empty_and_an_all_zero_volume(vm: Vm) -> None:
    vm.volume(0, name="empty")
    vm.volume(3 * MIB + 1, name="zero")
    vm.register("empty", "zero")
    snapshot = vm.snapshot()
    point = vm.manager.point(snapshot)
    assert [(volume.name, volume.root, volume.block_count) for volume in point.volumes] == [
        ("empty", b"", 0),
        ("zero", b"", 0),
    ]
    vm.assert_restores(snapshot, names=("empty", "zero"))
    backup = vm.manager.incremental_backup(vm.name, snapshot)
    vm.assert_restores(snapshot, backup, names=("empty", "zero"))


def test_several_volumes_of_several_block_sizes(vm: Vm) -> None:
    for number, name in enumerate(("data", "mem", "root")):
        vm.volume(2 * MIB + number, [(number * 1000, noise(700_000, number))], name=name)
    vm.register("data", "mem", "root")
    snapshot = vm.snapshot()
    write_at(vm.path("mem"), MIB, noise(100_000, 9))
    backup = vm.manager.incremental_backup(vm.name, snapshot)
    vm.assert_restores(snapshot, backup, names=("data", "mem", "root"))
    point = vm.manager.point(backup)
    assert [volume.name for volume in point.volumes] == ["data", "mem", "root"]
    assert point.size_bytes == 6 * MIB + 3
    assert all(volume.consistency is Consistency.OFFLINE for volume in point.volumes)


def test_an_unchanged_backup_sends_nothing_and_is_a_point(vm: Vm) -> None:
    vm.volume(20 * MIB, [(0, noise(9 * MIB))])
    vm.register()
    snapshot = vm.snapshot()
    first = vm.manager.point(snapshot)
    backup = vm.manager.incremental_backup(vm.name, snapshot)
    point = vm.manager.point(backup)
    assert point.stats.sent_bytes == point.stats.stored_bytes == point.stats.changed_bytes == 0
    assert point.stats.logical_bytes == 20 * MIB
    assert point.stats.read_bytes == first.stats.read_bytes == 9 * MIB
    assert [volume.root for volume in point.volumes] == [volume.root for volume in first.volumes]
    assert point.parent_id == snapshot
    vm.assert_restores(snapshot, backup)


@pytest.mark.slow
def test_a_backup_sends_what_changed(vm: Vm) -> None:
    vm.volume(40 * MIB, [(0, noise(30 * MIB, 6006))])
    vm.register()
    snapshot = vm.snapshot()
    stats = vm.manager.point(snapshot).stats
    assert stats.changed_bytes == 30 * MIB
    assert stats.changed_blocks == 480
    assert stats.stored_blocks > 480
    assert stats.under_replicated_blocks == 0
    assert stats.sent_bytes == 3 * stats.stored_bytes
    write_at(vm.path(), 10 * MIB, noise(BLOCK, 6007))
    write_at(vm.path(), 20 * MIB - 1, b"!!")
    backup = vm.manager.incremental_backup(vm.name, snapshot)
    stats = vm.manager.point(backup).stats
    assert stats.changed_blocks == 3
    assert stats.changed_bytes == 3 * BLOCK
    # Two of them differ by a byte from what was there before.
    assert (stats.delta_blocks, stats.delta_plain_bytes) == (2, 2 * BLOCK)
    assert stats.delta_bytes < 256
    assert BLOCK < stats.stored_bytes < BLOCK + 64 * 1024
    assert stats.index_bytes < 64 * 1024
    vm.assert_restores(snapshot, backup)


def test_a_second_vm_from_the_same_template_sends_next_to_nothing(vm: Vm, manager: StateManager) -> None:
    template = noise(10 * MIB, 77)
    vm.volume(16 * MIB, [(MIB, template)])
    vm.register()
    snapshot = vm.snapshot()
    other = Vm(manager, vm.name + "-twin", vm.folder)
    other.volume(16 * MIB, [(MIB, template), (13 * MIB, noise(BLOCK, 78))])
    other.register()
    plain = manager.point(manager.create_snapshot(other.name)).stats
    assert plain.deduplicated_bytes == 10 * MIB
    assert plain.stored_bytes < 2 * BLOCK
    based = manager.create_snapshot(other.name, base=snapshot)
    assert manager.point(based).stats.deduplicated_bytes >= 10 * MIB
    other.assert_restores(based)


def test_what_occurs_twice_is_stored_once(vm: Vm) -> None:
    vm.volume(64 * MIB, [(at * MIB, noise(BLOCK, 6008)) for at in range(0, 64, 2)])
    vm.register()
    snapshot = vm.snapshot()
    stats = vm.manager.point(snapshot).stats
    assert stats.changed_blocks == 32
    assert stats.deduplicated_bytes == 31 * BLOCK
    vm.assert_restores(snapshot)


def test_volumes_that_grow_shrink_come_and_go(vm: Vm) -> None:
    vm.volume(10 * MIB, [(0, noise(10 * MIB))])
    vm.register()
    snapshot = vm.snapshot()
    with vm.path().open("r+b") as stream:
        stream.truncate(3 * MIB + 5)
    small = vm.manager.incremental_backup(vm.name, snapshot)
    vm.assert_restores(snapshot, small)
    with vm.path().open("r+b") as stream:
        stream.truncate(70 * MIB)
    write_at(vm.path(), 69 * MIB, b"far away")
    vm.volume(MIB, [(0, b"new")], name="more")
    vm.register("root", "more")
    large = vm.manager.incremental_backup(vm.name, snapshot)
    vm.assert_restores(snapshot, large, names=("more", "root"))
    assert [volume.name for volume in vm.manager.point(large).volumes] == ["more", "root"]
    vm.register("more")
    assert [volume.name for volume in vm.manager.point(vm.manager.incremental_backup(vm.name, snapshot)).volumes] == [
        "more"
    ]


def test_parents_explicit_and_newest(vm: Vm) -> None:
    vm.volume(MIB, [(0, noise(MIB))])
    vm.register()
    snapshot = vm.snapshot()
    first = vm.manager.incremental_backup(vm.name, snapshot)
    second = vm.manager.incremental_backup(vm.name, snapshot)
    third = vm.manager.incremental_backup(vm.name, snapshot, parent=first)
    assert [point.parent_id for point in vm.manager.points(vm.name)] == ["", snapshot, first, first]
    assert [point.point_id for point in vm.manager.points(vm.name)] == [snapshot, first, second, third]
    vm.manager.forget(snapshot)
    vm.manager.forget(third)
    fourth = vm.manager.incremental_backup(vm.name, snapshot)
    assert vm.manager.point(fourth).parent_id == second
    assert vm.manager.point(snapshot).forgotten
    assert len(vm.manager.points(vm.name)) == 3
    assert len(vm.manager.points(vm.name, include_forgotten=True)) == 5
    vm.assert_restores(snapshot, fourth)
    for point in (first, second, fourth):
        vm.manager.forget(point)
    assert error_of(lambda: vm.manager.incremental_backup(vm.name, snapshot)).code is ErrorCode.NO_PARENT


def test_another_vms_points_do_not_fit(vm: Vm, manager: StateManager) -> None:
    vm.volume(MIB, [(0, noise(MIB))])
    vm.register()
    snapshot = vm.snapshot()
    other = Vm(manager, vm.name + "-other", vm.folder)
    other.volume(MIB)
    other.register()
    foreign = other.snapshot()
    assert error_of(lambda: manager.incremental_backup(vm.name, foreign)).code is ErrorCode.MISMATCH
    assert error_of(lambda: manager.restore_vm(snapshot, foreign, target=vm.folder / "t")).code is ErrorCode.MISMATCH
    assert not (vm.folder / "t").exists()


def test_a_gigantic_hole_costs_nothing(vm: Vm) -> None:
    vm.volume(8 << 40, [((8 << 40) - 5, b"end")])
    vm.register()
    snapshot = vm.snapshot()
    point = vm.manager.point(snapshot)
    assert point.volumes[0].block_count == 1
    assert vm.manager.verify(snapshot).blocks == 1


def test_progress_goes_up_to_the_end(vm: Vm) -> None:
    vm.volume(20 * MIB, [(0, noise(18 * MIB))])
    vm.register()
    seen: list[tuple[str, int, int]] = []
    snapshot = vm.manager.create_snapshot(
        vm.name, progress=lambda at: seen.append((at.phase, at.bytes_done, at.bytes_total))
    )
    assert list(dict.fromkeys(phase for phase, _, _ in seen)) == ["send", "settle", "commit"]
    assert all(total == 20 * MIB for _, _, total in seen)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == 20 * MIB
    seen.clear()
    vm.manager.restore_vm(
        snapshot, target=vm.folder / "out", progress=lambda at: seen.append((at.phase, at.bytes_done, at.bytes_total))
    )
    assert seen[-1] == ("restore", 20 * MIB, 20 * MIB)


def test_times_of_the_last_write(vm: Vm, shared_cluster: MemoryCluster) -> None:
    vm.volume(4 * MIB, [(0, noise(4 * MIB))])
    vm.register()
    with shared_cluster.state_manager(replica_wait_s=0) as quick:
        assert quick.last_transfer is None
        snapshot = quick.create_snapshot(vm.name)
        assert quick.settle(30)
        transfer = quick.last_transfer
    assert transfer is not None
    assert transfer.resource_id == snapshot
    assert transfer.replicated_s is not None
    assert 0 < transfer.quorum_s <= transfer.committed_s
    assert transfer.quorum_s <= transfer.replicated_s
    vm.assert_restores(snapshot)


@pytest.mark.parametrize("kind", ["file", "full", "below-a-file"])
def test_a_target_that_is_taken(vm: Vm, kind: str) -> None:
    vm.volume(MIB, [(0, b"x")])
    vm.register()
    snapshot = vm.snapshot()
    target = vm.folder / "target"
    if kind == "full":
        target.mkdir()
        (target / "precious").write_bytes(b"1")
    else:
        target.write_bytes(b"1")
    place = target / "below" if kind == "below-a-file" else target
    error = error_of(lambda: vm.manager.restore_vm(snapshot, target=place))
    assert error.code is (ErrorCode.TARGET_UNWRITABLE if kind == "below-a-file" else ErrorCode.TARGET_EXISTS)
    kept = target / "precious" if kind == "full" else target
    assert kept.read_bytes() == b"1"


def test_restore_places(vm: Vm, shared_cluster: MemoryCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    vm.volume(MIB, [(0, b"x")])
    vm.register()
    snapshot = vm.snapshot()
    assert error_of(lambda: vm.manager.restore_vm(snapshot)).code is ErrorCode.INVALID_ARGUMENT
    place = vm.folder / "restores"
    monkeypatch.setenv("HOLDFAST_RESTORE_DIR", str(place))
    monkeypatch.setenv("HOLDFAST_COORDINATOR", shared_cluster.coordinator_address)
    monkeypatch.setenv("HOLDFAST_TOKEN", shared_cluster.token)
    with StateManager() as manager:
        target = manager.restore_vm(snapshot, durable=True)
    assert target == place / vm.name / snapshot
    assert digest(target / "root.raw") == digest(vm.path())
    empty = vm.folder / "empty"
    empty.mkdir()
    assert vm.manager.restore_vm(snapshot, target=empty) == empty
    assert {path.name for path in empty.iterdir()} == {"vm.json", "root.raw"}
