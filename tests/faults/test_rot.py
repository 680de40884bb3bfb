"""Bits that flip on disks: found by reads, by checks and by scrubbing; fetched anew; and never given to anybody."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from holdfast import StateManager
from tests.e2e.harness import eventually
from tests.faults.cluster import FaultCluster
from tests.faults.convergence import converge
from tests.faults.load import Load, assert_kept
from tests.faults.rot import copies, rot

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

_KINDS = (0, 1, 2)
_ROTTEN_PER_KIND = 6


def written(cluster: FaultCluster, tmp_path: Path, *, seed: int) -> Load:
    """Write something, and wait until it is everywhere that it has to be."""
    with cluster.load(tmp_path, seed=seed) as load:
        load.await_writes(10)
    with cluster.manager() as manager:
        converge(manager, nodes=len(cluster.nodes))
    return load


def some_of_each_kind(directory: Path, source: random.Random, among: set[bytes] | None = None) -> set[bytes]:
    """Draw blocks of volumes, of application data and of index nodes that a directory has."""
    chosen: set[bytes] = set()
    for kind in _KINDS:
        ids = sorted({copy.block_id for copy in copies(directory) if copy.kind == kind})
        drawn = [each for each in ids if among is None or each in among]
        assert drawn, f"there are blocks of kind {kind}"
        chosen.update(source.sample(drawn, min(_ROTTEN_PER_KIND, len(drawn))))
    return chosen


def repaired(manager: StateManager) -> int:
    return sum(node.healing.repaired_blocks for node in manager.nodes())


def test_rot_under_reads_is_healed_and_never_read(cluster: FaultCluster, tmp_path: Path) -> None:
    load = written(cluster, tmp_path, seed=401)
    source = random.Random(401)
    directory = cluster.directory(source.choice(sorted(cluster.nodes)))
    with cluster.manager() as manager:
        before = repaired(manager)
        rotten = {copy.block_id for copy in copies(directory)}
        assert rot(directory, source, rotten) >= len(rotten)
        # Every copy that this node has is rotten now; so each read that asks it first finds that.
        assert_kept(manager, load)
        eventually(lambda: repaired(manager) > before, "what reads found is fetched anew")
        converge(manager, nodes=len(cluster.nodes))
        assert_kept(manager, load)


def test_the_same_blocks_rotten_on_two_of_three_owners(cluster: FaultCluster, tmp_path: Path) -> None:
    load = written(cluster, tmp_path, seed=402)
    source = random.Random(402)
    first, second = (cluster.directory(name) for name in source.sample(sorted(cluster.nodes), 2))
    shared = {copy.block_id for copy in copies(first)} & {copy.block_id for copy in copies(second)}
    rotten = some_of_each_kind(first, source, among=shared)
    with cluster.manager() as manager:
        before = repaired(manager)
        for directory in (first, second):
            assert rot(directory, source, rotten) >= len(rotten)
        assert_kept(manager, load)
        converge(manager, nodes=len(cluster.nodes))
        assert repaired(manager) >= before + len(rotten)
        assert_kept(manager, load)


def test_a_scrub_finds_rot_that_nobody_reads(cluster: FaultCluster, tmp_path: Path) -> None:
    load = written(cluster, tmp_path, seed=403)
    source = random.Random(403)
    name = source.choice(sorted(cluster.nodes))
    directory = cluster.directory(name)
    rotten = some_of_each_kind(directory, source)
    node = cluster.nodes[name]
    node.kill()
    rot(directory, source, rotten)
    node.variables["HOLDFAST_SCRUB_DAYS"] = str(5 / 86_400)
    node.start()
    with cluster.manager() as manager:
        own = lambda: {each.node_id: each for each in manager.nodes()}[name]  # noqa: E731
        eventually(lambda: own().healing.repaired_blocks >= len(rotten), "the scrub has all of it fetched")
        eventually(lambda: own().quarantined_count == 0, "nothing is set aside")
        cluster.restart_with(node, HOLDFAST_SCRUB_DAYS="")
        converge(manager, nodes=len(cluster.nodes))
        assert_kept(manager, load)
