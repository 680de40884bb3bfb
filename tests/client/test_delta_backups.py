"""Backups that code changed blocks against what was there before, end to end."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast import Codec, ErrorCode, HoldfastError, StateManager, VolumeSpec
from holdfast.index import volume_leaves
from holdfast.results import TransferStats
from holdfast.testing import MemoryCluster
from holdfast_core.model.block import Codec as BlockCodec
from holdfast_core.model.block import parse_header
from holdfast_core.model.tree import VolumeLeaf
from holdfast_proto.v1 import keys_pb2
from holdfast_storagenode.store import Verdict
from tests.client.keyed import ask_cluster
from tests.client.rig import BLOCK, TENANT, MemorySource, Vm, data_ids, error_of, noise, rot, store_of, write_at

COUNT = 40
MIB = 1 << 20


@pytest.fixture
def own(cluster: MemoryCluster, tmp_path: Path) -> Vm:
    """A VM of noise on a cluster of the test's own."""
    vm = Vm(cluster.state_manager(replica_wait_s=2.0), "vm", tmp_path)
    vm.volume(COUNT * BLOCK, [(0, noise(COUNT * BLOCK))])
    vm.register()
    return vm


def touch(vm: Vm, *blocks: int, seed: int = 1) -> None:
    """Change a few bytes of each of these blocks."""
    for block in blocks:
        write_at(vm.path(), block * BLOCK + 1000, noise(100, seed * 1000 + block))


def backed_up(vm: Vm, snapshot: str) -> tuple[str, TransferStats]:
    backup = vm.manager.incremental_backup(vm.name, snapshot)
    return backup, vm.manager.point(backup).stats


def references(manager: StateManager, point_id: str, volume: int = 0) -> dict[int, tuple[bytes, bytes]]:
    """Block and base by position, as the point's index names them, for one of its volumes."""

    async def read() -> list[tuple[int, VolumeLeaf]]:
        reading = manager._core._reading
        resolved = await manager._core._remote.resolve_point(point_id, "")
        _, index, _ = reading._open(resolved.grant, point_id)
        groups = volume_leaves(index, resolved.point.volumes[volume])
        return [(place, leaf) async for group in groups for place, _, leaf in group]

    return {
        place * 128 + slot: (block_id, base_id)
        for place, leaf in manager._loop.run(read())
        for slot, block_id, base_id in zip(leaf.slots, leaf.block_ids, leaf.base_ids, strict=True)
    }


def codec_of(cluster: MemoryCluster, block_id: bytes) -> tuple[BlockCodec, int]:
    """Codec and key epoch of a block that the first node holds."""
    found = store_of(cluster, 0).get(TENANT, [block_id], bytes_max=1 << 30)[0]
    assert not isinstance(found, Verdict)
    header = parse_header(found.data)
    return header.codec, header.key_epoch


def lose(cluster: MemoryCluster, block_id: bytes, how: str = "missing") -> None:
    """Take a block from every node, or break it on every node."""
    for number in range(3):
        if how == "corrupt":
            rot(cluster, number, block_id)
        else:
            store_of(cluster, number).delete(TENANT, [block_id])


@pytest.mark.slow
def test_successors_of_a_delta_are_coded_against_its_base(own: Vm, cluster: MemoryCluster) -> None:
    snapshot = own.snapshot()
    whole = references(own.manager, snapshot)
    assert all(base == b"" for _, base in whole.values())
    for round_ in range(1, 5):
        touch(own, 3, 4, 30 + round_, seed=round_)
        backup, stats = backed_up(own, snapshot)
        assert (stats.changed_blocks, stats.delta_blocks) == (3, 3)
        assert stats.delta_plain_bytes == 3 * BLOCK
        assert stats.delta_bytes < 3000
        named = references(own.manager, backup)
        for position, (block_id, base_id) in named.items():
            changed = position in (3, 4) or 30 < position <= 30 + round_
            assert (block_id, base_id)[changed] == whole[position][0]
            if changed:
                assert codec_of(cluster, block_id)[0] is BlockCodec.ZSTD_DELTA
        own.assert_restores(snapshot, backup)
        assert own.manager.verify(backup).blocks == COUNT
        assert own.manager.verify(backup, node_only=True).thin_blocks == 0
    # Back to what the snapshot has: known by its fingerprint alone, from this session or not at all.
    write_at(own.path(), 3 * BLOCK, noise(COUNT * BLOCK)[3 * BLOCK : 4 * BLOCK])
    backup, stats = backed_up(own, snapshot)
    assert stats.changed_blocks == 1
    own.assert_restores(snapshot, backup)


@pytest.mark.slow
def test_a_block_that_drifted_away_is_stored_whole_and_becomes_the_base(own: Vm, cluster: MemoryCluster) -> None:
    snapshot = own.snapshot()
    anchors = set()
    for round_ in range(12):
        write_at(own.path(), 7 * BLOCK + round_ * (BLOCK // 12), noise(BLOCK // 12, 500 + round_))
        backup, _ = backed_up(own, snapshot)
        block_id, base_id = references(own.manager, backup)[7]
        anchors.add(base_id or block_id)
        own.assert_restores(snapshot, backup)
    assert len(anchors) == 2
    assert all(codec_of(cluster, anchor)[0] is not BlockCodec.ZSTD_DELTA for anchor in anchors)


def test_a_template_is_what_a_snapshot_is_coded_against(vm: Vm, manager: StateManager) -> None:
    content = noise(COUNT * BLOCK, 9)
    vm.volume(COUNT * BLOCK, [(0, content)])
    vm.register()
    template = vm.snapshot()
    clone = Vm(manager, f"{vm.name}-clone", vm.folder)
    clone.volume(COUNT * BLOCK, [(0, content)])
    touch(clone, 2, 5, 39)
    clone.register()
    snapshot = manager.create_snapshot(clone.name, base=template)
    stats = manager.point(snapshot).stats
    assert stats.delta_blocks == 3
    assert stats.stored_bytes - stats.index_bytes == stats.delta_bytes < 1000
    assert stats.deduplicated_bytes == (COUNT - 3) * BLOCK
    clone.assert_restores(snapshot)
    manager.forget(template)
    clone.assert_restores(snapshot)
    touch(clone, 2, 6, seed=2)
    backup, stats = backed_up(clone, snapshot)
    assert stats.delta_blocks == 2
    clone.assert_restores(snapshot, backup)


def test_what_is_not_to_be_coded_so_is_not(vm: Vm) -> None:
    for name in ("always", "lz4", "never", "stored"):
        vm.volume(COUNT * BLOCK, [(0, noise(COUNT * BLOCK, 3))], name=name)
    specs = {
        "always": VolumeSpec(vm.path("always")),
        "never": VolumeSpec(vm.path("never"), delta=False),
        "stored": VolumeSpec(vm.path("stored"), codec=Codec.STORED),
        "lz4": VolumeSpec(vm.path("lz4"), codec=Codec.LZ4),
    }
    assert not vm.manager.register_vm(vm.name, specs).volumes["never"].delta
    snapshot = vm.snapshot()
    for name in specs:
        write_at(vm.path(name), 5 * BLOCK, b"changed")
    backup, stats = backed_up(vm, snapshot)
    assert (stats.changed_blocks, stats.delta_blocks) == (4, 1)
    # The same content in all four: what the first made of it is not named by the others.
    based = [any(base for _, base in references(vm.manager, backup, volume).values()) for volume in range(4)]
    assert based == [True, False, False, False]
    vm.assert_restores(snapshot, backup, names=sorted(specs))


@pytest.mark.slow
def test_processes_leave_blocks_waiting_as_threads_do(cluster: MemoryCluster, tmp_path: Path) -> None:
    made = []
    touched = range(0, 320, 7)
    for sealing in ("threads", "processes"):
        vm = Vm(cluster.state_manager(sealing=sealing), f"vm-{sealing}", tmp_path)
        vm.volume(20 * MIB + 777, [(0, noise(20 * MIB + 777))])
        vm.register()
        snapshot = vm.snapshot()
        touch(vm, *touched)
        # Written anew all over: no delta comes of it.
        write_at(vm.path(), 50 * BLOCK, noise(20 * BLOCK, 5))
        write_at(vm.path(), 20 * MIB + 700, b"in the last block, which is short")
        backup, stats = backed_up(vm, snapshot)
        vm.assert_restores(snapshot, backup)
        made.append((stats.changed_blocks, stats.delta_blocks, stats.delta_bytes, references(vm.manager, backup)))
    assert made[0] == made[1]
    assert made[0][1] == len([block for block in touched if not 50 <= block < 70]) + 1


@pytest.mark.slow
def test_no_delta_keeps_an_old_key_alive(own: Vm, cluster: MemoryCluster) -> None:
    snapshot = own.snapshot()
    touch(own, 3)
    old, stats = backed_up(own, snapshot)
    assert stats.delta_blocks == 1
    ask_cluster(cluster, "keys", "RotateTenantKeys", keys_pb2.RotateTenantKeysRequest(data=True))
    unchanged, stats = backed_up(own, snapshot)
    assert stats.changed_blocks == stats.stored_bytes == 0
    touch(own, 3, 4, seed=2)
    first, stats = backed_up(own, snapshot)
    assert (stats.changed_blocks, stats.delta_blocks) == (2, 0)
    touch(own, 3, 4, 5, seed=3)
    second, stats = backed_up(own, snapshot)
    assert (stats.changed_blocks, stats.delta_blocks) == (3, 2)
    for backup in (old, unchanged):
        assert own.manager.verify(backup).blocks == COUNT
    own.assert_restores(snapshot, second)
    for backup in (first, second):
        for block_id, base_id in references(own.manager, backup).values():
            if base_id:
                assert codec_of(cluster, block_id)[1] == codec_of(cluster, base_id)[1] == 2


@pytest.mark.slow
def test_a_base_that_rots_on_one_node_is_read_around(own: Vm, cluster: MemoryCluster) -> None:
    snapshot = own.snapshot()
    for block_id in data_ids(cluster, 0):
        rot(cluster, 0, block_id)
    touch(own, *range(10))
    backup, stats = backed_up(own, snapshot)
    assert stats.delta_blocks == 10
    own.assert_restores(snapshot, backup)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["corrupt", "missing"])
def test_a_lost_base_is_named_with_the_range_of_its_delta(own: Vm, cluster: MemoryCluster, how: str) -> None:
    snapshot = own.snapshot()
    touch(own, 11)
    backup, _ = backed_up(own, snapshot)
    delta, base = references(own.manager, backup)[11]
    lose(cluster, base, how)
    for call in (
        lambda: own.restored(snapshot, backup),
        lambda: own.manager.verify(backup),
        lambda: own.manager.verify(backup, node_only=True),
    ):
        error = error_of(call)
        assert error.code is (ErrorCode.CORRUPT if how == "corrupt" else ErrorCode.MISSING)
        assert error.block_ids == (base,)
        assert error.facts["ranges"] == f"root:{11 * BLOCK}-{12 * BLOCK}"
    # It is known by now: what is there is stored whole, although it did not change.
    again, stats = backed_up(own, snapshot)
    assert (stats.changed_blocks, stats.delta_blocks) == (1, 0)
    assert references(own.manager, again)[11][0] not in (delta, base)
    own.assert_restores(snapshot, again)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["corrupt", "missing"])
def test_a_base_that_is_lost_when_it_is_wanted_costs_the_saving_alone(
    own: Vm, cluster: MemoryCluster, how: str
) -> None:
    snapshot = own.snapshot()
    lost = references(own.manager, snapshot)[11][0]
    lose(cluster, lost, how)
    touch(own, 11, 12)
    backup, stats = backed_up(own, snapshot)
    assert (stats.changed_blocks, stats.delta_blocks) == (2, 1)
    own.assert_restores(snapshot, backup)
    # It was reported on the way, so a backup that finds its content unchanged sends it whole.
    own.path().write_bytes(noise(COUNT * BLOCK))
    healed = own.manager.incremental_backup(own.name, snapshot, parent=snapshot)
    assert own.manager.point(healed).stats.stored_plain_bytes >= BLOCK
    own.assert_restores(snapshot, healed)
    own.assert_restores(snapshot)


def test_a_node_less_changes_nothing(own: Vm, cluster: MemoryCluster) -> None:
    snapshot = own.snapshot()
    cluster.stop_node(1)
    touch(own, 1, 2, 3)
    backup, stats = backed_up(own, snapshot)
    assert stats.delta_blocks == 3
    own.assert_restores(snapshot, backup)


@pytest.mark.slow
def test_a_forgotten_parent_goes_on_being_the_base(own: Vm) -> None:
    snapshot = own.snapshot()
    touch(own, 1, 2)
    first, _ = backed_up(own, snapshot)
    own.manager.forget(snapshot)
    own.assert_restores(snapshot, first)
    touch(own, 2, 3, seed=2)
    second, stats = backed_up(own, snapshot)
    assert stats.delta_blocks == 2
    own.assert_restores(snapshot, second)
    sums = own.manager.stats(own.name)
    assert sums.transfer.delta_blocks == 4
    assert sums.exclusive_bytes is not None
    assert sums.exclusive_bytes > COUNT * BLOCK


edits = st.lists(
    st.lists(
        st.tuples(
            st.integers(0, 20 * BLOCK - 1),
            st.integers(1, 3 * BLOCK),
            st.sampled_from(["noise", "zero", "copy", "text"]),
            st.integers(0, 5),
        ),
        max_size=6,
    ),
    min_size=1,
    max_size=5,
)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits, st.integers(1, 20 * BLOCK), st.integers(0, 2**16))
def test_every_point_of_any_chain_is_what_was_there(
    shared_cluster: MemoryCluster, rounds: list[list[tuple[int, int, str, int]]], size: int, number: int
) -> None:
    with shared_cluster.state_manager() as manager:
        name = f"chain-{random.Random(str((rounds, size, number))).getrandbits(64):x}"
        manager.register_vm(name, {"root": VolumeSpec("/nowhere", block_bytes=16 * 1024)}, replace=True)
        data = bytearray(noise(size, number))
        points = [(manager.create_snapshot(name, sources={"root": MemorySource(bytes(data))}), bytes(data))]
        for edits_ in rounds:
            for at, length, kind, seed in edits_:
                start, end = at % size, min(at % size + length, size)
                new = {
                    "noise": noise(end - start, seed),
                    "zero": bytes(end - start),
                    "copy": bytes(data[: end - start]),
                    "text": (b"row %d of the table; " % seed * (end - start))[: end - start],
                }[kind]
                data[start : start + len(new)] = new
            source = MemorySource(bytes(data))
            points.append((manager.incremental_backup(name, points[0][0], sources={"root": source}), bytes(data)))
        for point, content in points:
            with manager.open_volume(point) as volume:
                assert volume.read() == content
            assert manager.verify(point).plain_bytes <= len(content)


def test_a_hint_and_a_delta_go_together(own: Vm) -> None:
    snapshot = own.snapshot()
    touch(own, 3, 9)
    changed = [(3 * BLOCK + 1000, 100), (9 * BLOCK + 1000, 100), (20 * BLOCK, 10)]
    backup = own.manager.incremental_backup(own.name, snapshot, changed=changed, since=snapshot)
    stats = own.manager.point(backup).stats
    assert stats.read_bytes == 3 * BLOCK
    assert (stats.changed_blocks, stats.delta_blocks) == (2, 2)
    own.assert_restores(snapshot, backup)


@pytest.mark.slow
def test_a_source_that_fails_while_blocks_wait_fails_plainly(own: Vm) -> None:
    content = bytearray(noise(300 * BLOCK, 4))
    snapshot = own.manager.create_snapshot(own.name, sources={"root": MemorySource(bytes(content))})
    for block in range(0, 300, 3):
        content[block * BLOCK] ^= 1

    def fail(offset: int) -> None:
        if offset >= 200 * BLOCK:
            raise HoldfastError(ErrorCode.SOURCE_UNREADABLE, "the disk is gone")

    source = MemorySource(bytes(content), at_read=fail)
    error = error_of(lambda: own.manager.incremental_backup(own.name, snapshot, sources={"root": source}))
    assert (error.code, error.message) == (ErrorCode.SOURCE_UNREADABLE, "the disk is gone")
    assert source.closed
    source = MemorySource(bytes(content))
    backup = own.manager.incremental_backup(own.name, snapshot, sources={"root": source})
    assert own.manager.point(backup).stats.delta_blocks == 100
    with own.manager.open_volume(backup) as volume:
        assert volume.read() == content
