"""A real cluster of four nodes on directories: what a node loses comes back, and what a node leaves goes over."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast.testing import MemoryCluster
from holdfast_storagenode.embedded import EmbeddedStorageNode
from holdfast_storagenode.store import BlockStore, Verdict
from tests.client.rig import BLOCK, Vm, noise
from tests.storagenode.engines import plant_rot
from tests.support.waiting import wait_until

TENANT = 1


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[MemoryCluster]:
    """Four nodes, three copies, blocks in segment files."""
    with MemoryCluster(nodes=4, replicas=3, data_dir=tmp_path / "cluster") as running:
        yield running


@pytest.fixture
def vm(cluster: MemoryCluster, tmp_path: Path) -> Vm:
    """A VM with 4 MiB that differ from everything."""
    vm = Vm(cluster.state_manager(), "vm-1", tmp_path)
    vm.volume(8 << 20, [(0, noise(4 << 20))])
    vm.register()
    return vm


def node(cluster: MemoryCluster, number: int) -> EmbeddedStorageNode:
    """A node, counted from 0."""
    found = cluster.node(number)
    assert isinstance(found, EmbeddedStorageNode)
    return found


def store(cluster: MemoryCluster, number: int) -> BlockStore:
    """The store of a running node."""
    return node(cluster, number).core.store


def ids(cluster: MemoryCluster, number: int) -> set[bytes]:
    """What a node holds whole."""
    return {entry.block_id for entry in store(cluster, number).scan(TENANT, partition=None, after=b"", limit=100_000)}


def settled(cluster: MemoryCluster) -> list[set[bytes]]:
    """Wait until every block is on three nodes; return what each node holds."""

    def copies() -> bool:
        held = [ids(cluster, number) for number in range(4)]
        return all(sum(block_id in each for each in held) == 3 for block_id in set().union(*held))

    wait_until(copies, "three copies of each block")
    return [ids(cluster, number) for number in range(4)]


def test_a_node_that_lost_its_blocks_gets_all_of_them_back(cluster: MemoryCluster, vm: Vm, tmp_path: Path) -> None:
    snapshot = vm.snapshot()
    before = settled(cluster)
    assert len(before[1]) > 40
    cluster.stop_node(1)
    directory = tmp_path / "cluster" / "node-2"
    for path in directory.iterdir():
        if path.name not in ("node.json", "cluster.pb", "lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    cluster.start_node(1)
    wait_until(lambda: ids(cluster, 1) == before[1], "the return of the blocks")
    healing = node(cluster, 1).core.healing
    assert healing.repaired_blocks >= len(before[1])
    assert healing.wrong_blocks == 0
    for number in (0, 2):
        cluster.stop_node(number)
    vm.assert_restores(snapshot)


def test_rot_that_a_read_meets_is_healed(cluster: MemoryCluster, vm: Vm, tmp_path: Path) -> None:
    vm.snapshot()
    settled(cluster)
    rotten = sorted(ids(cluster, 0))[:5]
    for block_id in rotten:
        (found,) = store(cluster, 0).get(TENANT, [block_id], bytes_max=BLOCK * 2)
        plant_rot(tmp_path / "cluster" / "node-1", found.data)  # type: ignore[union-attr]
    # As a scrub, or a client's read of this copy, would find it.
    assert store(cluster, 0).has(TENANT, rotten, verify=True) == [Verdict.CORRUPT] * 5
    wait_until(lambda: node(cluster, 0).core.healing.repaired_blocks >= 5, "the healing")
    assert store(cluster, 0).has(TENANT, rotten, verify=True) == [Verdict.OK] * 5
    assert store(cluster, 0).status().quarantined_count == 0


def test_a_node_that_is_drained_hands_everything_over_and_holds_nothing_then(cluster: MemoryCluster, vm: Vm) -> None:
    snapshot = vm.snapshot()
    before = settled(cluster)
    everything = set().union(*before)
    vm.manager.set_node("node-4", draining=True)
    wait_until(lambda: ids(cluster, 3) == set(), "the drop of what others own")
    assert [ids(cluster, number) for number in range(3)] == [everything] * 3
    healing = node(cluster, 3).core.healing
    # What it says of itself follows at the end of the round in which the last block went.
    wait_until(lambda: (healing.foreign_blocks, healing.partitions) == (0, 0), "an account without blocks")
    assert healing.dropped_blocks == len(before[3])
    cluster.stop_node(3)
    vm.assert_restores(snapshot)
