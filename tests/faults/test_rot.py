"""Bits that flip on disks: found by reads, by checks and by scrubbing; fetched anew; and never given to anybody."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from holdfast import StateManager
from tests.e2e.harness import eventually
from tests.faults.cluster import FaultCluster
from tests.faults.convergence import converge
from tests.faults.load import Load, assert_kept
from tests.faults.rot import Copy, copies, rot

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

_KINDS = (0, 1, 2)
_ROTTEN_PER_KIND = 6


def written(cluster: FaultCluster, tmp_path: Path, *, seed: int) -> tuple[Load, dict[str, set[Copy]]]:
    """Write something, wait until it is everywhere that it has to be, and return the copies of it by node."""
    before = {name: set(copies(cluster.directory(name))) for name in cluster.nodes}
    with cluster.load(tmp_path, seed=seed) as load:
        load.await_writes(10)
    with cluster.manager() as manager:
        converge(manager, nodes=len(cluster.nodes))
    return load, {name: set(copies(cluster.directory(name))) - before[name] for name in cluster.nodes}


def ids_of(found: Iterable[Copy]) -> set[bytes]:
    return {copy.block_id for copy in found}


def some_of_each_kind(among: Iterable[Copy], source: random.Random) -> set[bytes]:
    """Draw blocks of volumes, of application data and of index nodes."""
    chosen: set[bytes] = set()
    for kind in _KINDS:
        ids = sorted(ids_of(copy for copy in among if copy.kind == kind))
        assert ids, f"there are blocks of kind {kind}"
        chosen.update(source.sample(ids, min(_ROTTEN_PER_KIND, len(ids))))
    return chosen


def repaired(manager: StateManager) -> int:
    return sum(node.healing.repaired_blocks for node in manager.nodes())


def test_rot_under_reads_is_healed_and_never_read(cluster: FaultCluster, tmp_path: Path) -> None:
    load, fresh = written(cluster, tmp_path, seed=401)
    source = random.Random(401)
    name = source.choice(sorted(fresh))
    rotten = ids_of(fresh[name])
    with cluster.manager() as manager:
        before = repaired(manager)
        # Every copy that this node has is rotten now; so each read that asks it first finds that.
        assert rot(cluster.directory(name), source, rotten) >= len(rotten)
        assert_kept(manager, load)
        eventually(lambda: repaired(manager) > before, "what reads found is fetched anew", within_s=120)
        converge(manager, nodes=len(cluster.nodes))
        eventually(lambda: repaired(manager) >= before + len(rotten), "all of it is reported as fetched anew")
        assert_kept(manager, load)


def test_the_same_blocks_rotten_on_two_of_three_owners(cluster: FaultCluster, tmp_path: Path) -> None:
    load, fresh = written(cluster, tmp_path, seed=402)
    source = random.Random(402)
    first, second = source.sample(sorted(fresh), 2)
    shared = ids_of(fresh[second])
    rotten = some_of_each_kind([copy for copy in fresh[first] if copy.block_id in shared], source)
    with cluster.manager() as manager:
        before = repaired(manager)
        for name in (first, second):
            assert rot(cluster.directory(name), source, rotten) >= len(rotten)
        assert_kept(manager, load)
        converge(manager, nodes=len(cluster.nodes))
        eventually(lambda: repaired(manager) >= before + 2 * len(rotten), "both are reported as having it anew")
        assert_kept(manager, load)


def test_a_scrub_finds_rot_that_nobody_reads(cluster: FaultCluster, tmp_path: Path) -> None:
    load, fresh = written(cluster, tmp_path, seed=403)
    source = random.Random(403)
    name = source.choice(sorted(fresh))
    rotten = some_of_each_kind(fresh[name], source)
    node = cluster.nodes[name]
    node.kill()
    assert rot(cluster.directory(name), source, rotten) >= len(rotten)
    node.variables["HOLDFAST_SCRUB_DAYS"] = str(5 / 86_400)
    node.start()
    with cluster.manager() as manager:

        def healed() -> bool:
            own = {each.node_id: each for each in manager.nodes()}[name]
            return own.healing.repaired_blocks >= len(rotten) and own.quarantined_count == 0

        eventually(healed, "the scrub has all of it fetched", within_s=120)
        cluster.restart_with(node, HOLDFAST_SCRUB_DAYS="")
        converge(manager, nodes=len(cluster.nodes))
        assert_kept(manager, load)
