"""Processes of every role killed under load and started again."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.faults.cluster import FaultCluster
from tests.faults.convergence import converge
from tests.faults.load import assert_kept

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

KILLS = 3


@pytest.mark.parametrize(("role", "seed"), [("coordinator", 101), ("node", 102), ("etcd", 103)])
def test_kills_of_a_role_under_load(cluster: FaultCluster, tmp_path: Path, role: str, seed: int) -> None:
    source = random.Random(seed)
    with cluster.load(tmp_path, seed=seed) as load:
        for _ in range(KILLS):
            strike_after = source.randrange(1, 4)
            load.await_writes(strike_after)
            if role == "etcd":
                member = source.randrange(3)
                cluster.etcd.kill(member)
                load.await_writes(1)
                cluster.etcd.restart(member)
                cluster.etcd.wait_healthy()
            else:
                services = cluster.coordinators if role == "coordinator" else list(cluster.nodes.values())
                victim = source.choice(services)
                victim.kill()
                load.await_writes(1)
                victim.start()
        load.await_writes(2)
    with cluster.manager() as manager:
        converge(manager, nodes=len(cluster.nodes))
        assert_kept(manager, load)
    assert len(load.book.points) > 1
    assert load.book.objects
