"""Damage told and not hidden: what can be read is restored, and the map says what is not there and why."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import DamagedRange, DamageReason, ErrorCode, StateManager
from holdfast.restoring.points import DAMAGE_NAME
from holdfast.testing import MemoryCluster
from holdfast.verifying.everything import Everything
from holdfast.verifying.tree_check import Whole
from holdfast_core.model.limits import TREE_FAN_OUT
from tests.client.rig import BLOCK, TENANT, MemorySource, Vm, data_ids, error_of, noise, rot, store_of, write_at

MIB = 1 << 20
LEAF = TREE_FAN_OUT * BLOCK
SIZE = 3 * LEAF + 5 * BLOCK + 100


@pytest.fixture
def cluster() -> Iterator[MemoryCluster]:
    with MemoryCluster() as cluster:
        yield cluster


@pytest.fixture
def manager(cluster: MemoryCluster) -> StateManager:
    return cluster.state_manager(replica_wait_s=5.0)


def lose(cluster: MemoryCluster, *block_ids: bytes, nodes: tuple[int, ...] = (0, 1, 2)) -> None:
    """Take blocks away from nodes, as if they had never been there."""
    for number in nodes:
        store_of(cluster, number).delete(TENANT, list(block_ids))


class Disk:
    """A VM with one volume of noise, and where its blocks lie."""

    def __init__(self, cluster: MemoryCluster, manager: StateManager, folder: Path, name: str = "vm") -> None:
        self.cluster = cluster
        self.manager = manager
        self.vm = Vm(manager, name, folder)
        self.data = bytearray(noise(SIZE, 1))
        self.vm.volume(0)
        self.vm.register()
        self.snapshot = manager.create_snapshot(name, sources={"root": MemorySource(bytes(self.data))})

    def block_at(self, position: int) -> bytes:
        """Id of the block at a position."""
        with self.manager.open_volume(self.snapshot) as file:
            image = file._image._image  # type: ignore[attr-defined]
            group = self.manager._loop.run(image._leaves.group(position // (TREE_FAN_OUT * 16)))
        leaf = group[position // TREE_FAN_OUT]
        return bytes(leaf.block_ids[leaf.slots.index(position % TREE_FAN_OUT)])

    def leaf_at(self, number: int) -> bytes:
        """Id of a leaf of the index."""
        with self.manager.open_volume(self.snapshot) as file:
            image = file._image._image  # type: ignore[attr-defined]

            async def ids() -> list[tuple[int, bytes]]:
                return [ref async for found in image._leaves._present(0, 16) for ref in found]

            return dict(self.manager._loop.run(ids()))[number]

    @property
    def root(self) -> bytes:
        """Id of the root of the index."""
        return self.manager.point(self.snapshot).volumes[0].root

    def holed(self, *ranges: DamagedRange) -> bytes:
        """The volume with zeros in place of ranges."""
        content = bytearray(self.data)
        for lost in ranges:
            content[lost.offset : lost.offset + lost.length] = bytes(lost.length)
        return bytes(content)


@pytest.fixture
def disk(cluster: MemoryCluster, manager: StateManager, tmp_path: Path) -> Disk:
    return Disk(cluster, manager, tmp_path)


def damaged(disk: Disk) -> tuple[DamagedRange, ...]:
    """Do damage of every kind, and return what it comes to."""
    gone, rotten, away = disk.block_at(7), disk.block_at(200), disk.block_at(301)
    lose(disk.cluster, gone)
    for number in range(3):
        rot(disk.cluster, number, rotten)
    lose(disk.cluster, away, nodes=(0, 1))
    disk.cluster.stop_node(2)
    return (
        DamagedRange("root", 7 * BLOCK, BLOCK, DamageReason.UNREACHABLE, (gone,)),
        DamagedRange("root", 200 * BLOCK, BLOCK, DamageReason.UNREACHABLE, (rotten,)),
        DamagedRange("root", 301 * BLOCK, BLOCK, DamageReason.UNREACHABLE, (away,)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_what_can_be_read_is_restored_and_the_rest_is_named(disk: Disk, tmp_path: Path, image_format: str) -> None:
    gone, rotten = disk.block_at(7), disk.block_at(200)
    lose(disk.cluster, gone, disk.block_at(8))
    for number in range(3):
        rot(disk.cluster, number, rotten)
    wanted = (
        DamagedRange("root", 7 * BLOCK, 2 * BLOCK, DamageReason.MISSING, (gone, disk.block_at(8))),
        DamagedRange("root", 200 * BLOCK, BLOCK, DamageReason.CORRUPT, (rotten,)),
    )
    assert error_of(lambda: disk.vm.restored(disk.snapshot)).code is ErrorCode.CORRUPT
    target = disk.manager.restore_vm(disk.snapshot, target=tmp_path / "out", partial=True, image_format=image_format)
    report = disk.manager.last_restore
    assert report is not None
    assert report.damage == wanted
    assert report.fetched_bytes == SIZE - 3 * BLOCK
    path = target / f"root.{image_format}"
    if image_format == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", path], check=True)
        path = tmp_path / "converted.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", target / "root.qcow2", path], check=True)
    assert path.read_bytes()[:SIZE] == disk.holed(*wanted)
    told = json.loads((target / DAMAGE_NAME).read_text())
    assert told == {
        "point_id": disk.snapshot,
        "volumes": [
            {
                "name": "root",
                "size_bytes": SIZE,
                "damaged": [
                    {
                        "offset": lost.offset,
                        "length": lost.length,
                        "reason": lost.reason.value,
                        "block_ids": [block_id.hex() for block_id in lost.block_ids],
                    }
                    for lost in wanted
                ],
            }
        ],
    }
    assert json.loads((target / "vm.json").read_text())["damage"] == DAMAGE_NAME
    assert disk.manager.survey(disk.snapshot).damage == wanted
    assert [lost.reason for lost in disk.manager.survey(disk.snapshot, node_only=True).damage] == [
        lost.reason for lost in wanted
    ]


@pytest.mark.slow
def test_what_may_come_back_is_told_apart_from_what_is_lost(disk: Disk, tmp_path: Path) -> None:
    wanted = damaged(disk)
    # Of what one node might still have nobody can say that it is lost.
    target = disk.manager.restore_vm(disk.snapshot, target=tmp_path / "out", partial=True)
    report = disk.manager.last_restore
    assert report is not None
    assert report.damage == wanted
    assert (target / "root.raw").read_bytes() == disk.holed(*wanted)
    assert error_of(lambda: disk.vm.restored(disk.snapshot)).code is ErrorCode.UNREACHABLE
    disk.cluster.start_node(2)
    after = disk.manager.survey(disk.snapshot).damage
    assert [(lost.offset, lost.reason) for lost in after] == [
        (7 * BLOCK, DamageReason.MISSING),
        (200 * BLOCK, DamageReason.CORRUPT),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("image_format", ["raw", "qcow2"])
def test_an_unreadable_leaf_takes_its_range_along_and_nothing_else(
    disk: Disk, tmp_path: Path, image_format: str
) -> None:
    leaf = disk.leaf_at(1)
    lose(disk.cluster, leaf)
    wanted = (DamagedRange("root", LEAF, LEAF, DamageReason.MISSING, (leaf,)),)
    assert disk.manager.survey(disk.snapshot).damage == wanted
    error = error_of(lambda: disk.manager.verify(disk.snapshot))
    assert error.block_ids == (leaf,)
    assert error.facts["ranges"] == f"root:{LEAF}-{2 * LEAF}"
    target = disk.manager.restore_vm(disk.snapshot, target=tmp_path / "out", partial=True, image_format=image_format)
    assert disk.manager.last_restore is not None
    assert disk.manager.last_restore.damage == wanted
    path = target / f"root.{image_format}"
    if image_format == "qcow2":
        subprocess.run(["qemu-img", "check", "-q", path], check=True)
        path = tmp_path / "converted.raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", target / "root.qcow2", path], check=True)
    assert path.read_bytes()[:SIZE] == disk.holed(*wanted)


@pytest.mark.slow
def test_of_which_nothing_can_be_read_is_not_restored(disk: Disk, tmp_path: Path) -> None:
    lose(disk.cluster, disk.root)
    error = error_of(lambda: disk.manager.restore_vm(disk.snapshot, target=tmp_path / "out", partial=True))
    assert error.code is ErrorCode.MISSING
    assert error.facts["ranges"] == f"root:0-{SIZE}"
    assert not (tmp_path / "out").exists()
    assert disk.manager.survey(disk.snapshot).damage == (
        DamagedRange("root", 0, SIZE, DamageReason.MISSING, (disk.root,)),
    )


def test_one_volume_is_lost_and_the_other_restored(
    cluster: MemoryCluster, manager: StateManager, tmp_path: Path
) -> None:
    vm = Vm(manager, "pair", tmp_path)
    vm.volume(MIB, [(0, noise(MIB, 5))], name="good")
    vm.volume(MIB, [(0, noise(MIB, 6))], name="lost")
    vm.register("good", "lost")
    snapshot = vm.snapshot()
    lose(cluster, manager.point(snapshot).volumes[1].root)
    target = manager.restore_vm(snapshot, target=tmp_path / "out", partial=True)
    assert (target / "good.raw").read_bytes() == vm.path("good").read_bytes()
    assert (target / "lost.raw").read_bytes() == bytes(MIB)
    assert manager.last_restore is not None
    assert [(lost.volume, lost.offset, lost.length) for lost in manager.last_restore.damage] == [("lost", 0, MIB)]


def test_a_whole_point_is_restored_as_ever_and_no_copy_in_part(disk: Disk, tmp_path: Path) -> None:
    target = disk.manager.restore_vm(disk.snapshot, target=tmp_path / "out", partial=True)
    assert sorted(path.name for path in target.iterdir()) == ["root.raw", "vm.json"]
    assert disk.manager.last_restore is not None
    assert disk.manager.last_restore.damage == ()
    error = error_of(lambda: disk.manager.restore_vm(disk.snapshot, onto=target, partial=True))
    assert error.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.slow
def test_all_is_checked_and_what_is_shared_once(
    cluster: MemoryCluster, manager: StateManager, disk: Disk, tmp_path: Path
) -> None:
    write = bytearray(disk.data)
    write[5 * BLOCK : 6 * BLOCK] = noise(BLOCK, 77)
    backup = manager.incremental_backup("vm", disk.snapshot, sources={"root": MemorySource(bytes(write))})
    twin = Disk(cluster, manager, tmp_path, "twin")
    stored = [manager.persist_application_data(f"task-{number}", noise(MIB, number)) for number in (8, 9)]
    blocks = -(-SIZE // BLOCK)
    clean = manager.verify_all()
    assert (clean.points, clean.objects, clean.damaged, clean.damaged_points, clean.gone) == (3, 2, (), 0, 0)
    # The backup has one leaf of its own; the twin and everything else of the backup was checked with the snapshot.
    assert blocks + TREE_FAN_OUT <= clean.blocks < blocks + TREE_FAN_OUT + 200
    on_nodes = manager.verify_all(node_only=True)
    assert (on_nodes.points, on_nodes.objects, on_nodes.thin_blocks) == (3, 2, 0)
    shared, own = disk.block_at(140), disk.block_at(5)
    lose(cluster, shared, own)
    lose(cluster, data_ids(cluster, 0, 1)[0])
    found = manager.verify_all()
    assert (found.damaged_points, found.damaged_objects) == (3, 1)
    told = {each.resource_id: [lost.offset for lost in each.damage] for each in found.damaged}
    assert told[disk.snapshot] == told[twin.snapshot] == [5 * BLOCK, 140 * BLOCK]
    assert told[backup] == [140 * BLOCK]
    assert {each.owner for each in found.damaged} >= {"vm", "twin"}
    assert set(told) - {disk.snapshot, twin.snapshot, backup} < set(stored)


@pytest.mark.slow
def test_content_that_is_sent_again_heals_all_points_that_need_it(
    cluster: MemoryCluster, manager: StateManager, disk: Disk, tmp_path: Path
) -> None:
    twin = Disk(cluster, manager, tmp_path, "twin")
    lose(cluster, disk.block_at(140), disk.leaf_at(2), disk.root)
    found = manager.verify_all()
    assert found.damaged_points == 2
    manager.incremental_backup("vm", disk.snapshot, sources={"root": MemorySource(bytes(disk.data))})
    healed = manager.verify_all()
    assert (healed.points, healed.damaged_points) == (3, 0)
    for point in (disk.snapshot, twin.snapshot):
        assert (disk.vm.restored(point) / "root.raw").read_bytes() == bytes(disk.data)


@pytest.mark.slow
def test_the_base_of_deltas_is_healed_for_all_that_build_on_it(
    cluster: MemoryCluster, manager: StateManager, tmp_path: Path
) -> None:
    old = b"".join(noise(512, at) * 128 for at in range(40))
    new = bytearray(old)
    for at in range(0, len(old), BLOCK):
        new[at + 100 : at + 150] = noise(50, at)
    points = {}
    for name in ("one", "two"):
        vm = Vm(manager, name, tmp_path)
        vm.volume(0)
        vm.register()
        snapshot = manager.create_snapshot(name, sources={"root": MemorySource(old)})
        backup = manager.incremental_backup(name, snapshot, sources={"root": MemorySource(bytes(new))})
        points[name] = (snapshot, backup)
    assert manager.point(points["one"][1]).stats.delta_blocks > 30
    base = store_of(cluster, 0).scan(TENANT, partition=None, after=b"", limit=100_000)
    with manager.open_volume(points["one"][0]) as file:
        group = manager._loop.run(file._image._image._leaves.group(0))  # type: ignore[attr-defined]
    lost = bytes(group[0].block_ids[3])
    assert lost in [entry.block_id for entry in base]
    lose(cluster, lost)
    found = manager.verify_all()
    assert {each.resource_id for each in found.damaged} == {each for pair in points.values() for each in pair}
    assert all(each.damage[0].block_ids == (lost,) for each in found.damaged)
    # The old content, sent again from the other VM: its snapshot and everybody's deltas are whole again.
    manager.create_snapshot("two", sources={"root": MemorySource(old)})
    assert manager.verify_all().damaged_points == 0


def test_what_was_whole_is_remembered_up_to_a_bound() -> None:
    whole = Whole(most=2)
    ids = [bytes([number]) * 32 for number in range(3)]
    for node_id in ids:
        whole.add(node_id)
    assert [node_id in whole for node_id in ids] == [False, True, True]
    assert ids[1] in whole
    whole.add(ids[0])
    assert [node_id in whole for node_id in ids] == [True, True, False]


def test_what_goes_meanwhile_is_no_damage(manager: StateManager, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    second = manager.create_snapshot("vm", sources={"root": MemorySource(bytes(disk.data))})
    survey = Everything._survey

    async def forgets_first(self: Everything, resource_id: str) -> object:
        if resource_id == second:
            await manager._core.forget(second)
        return await survey(self, resource_id)

    monkeypatch.setattr(Everything, "_survey", forgets_first)
    report = manager.verify_all()
    assert (report.points, report.gone, report.damaged) == (1, 1, ())


def test_data_of_a_task_names_what_is_lost(cluster: MemoryCluster, manager: StateManager) -> None:
    stored = manager.persist_application_data("task", noise(8 * MIB, 3))
    lost = data_ids(cluster, 0, 1)[2]
    lose(cluster, lost)
    error = error_of(lambda: manager.retrieve_application_data(stored))
    assert (error.code, error.block_ids) == (ErrorCode.MISSING, (lost,))
    (damage,) = manager.survey(stored).damage
    assert error.facts["ranges"] == f"{damage.offset}-{damage.offset + damage.length}"
    assert (damage.volume, damage.reason, damage.block_ids) == ("", DamageReason.MISSING, (lost,))
    before = manager.retrieve_application_data(stored, length=damage.offset)
    assert before == noise(8 * MIB, 3)[: damage.offset]
    assert error_of(lambda: manager.verify(stored)).code is ErrorCode.MISSING


@pytest.mark.slow
def test_a_changed_block_is_saved_beside_damage(disk: Disk) -> None:
    lose(disk.cluster, disk.block_at(3))
    # Whoever reads it tells the coordinator, and the next backup sends it again.
    assert len(disk.manager.survey(disk.snapshot).damage) == 1
    disk.vm.volume(SIZE, [(0, bytes(disk.data))])
    write_at(disk.vm.path(), 9 * BLOCK, b"changed")
    backup = disk.manager.incremental_backup("vm", disk.snapshot)
    assert disk.manager.survey(backup).damage == ()
    assert disk.manager.survey(disk.snapshot).damage == ()
