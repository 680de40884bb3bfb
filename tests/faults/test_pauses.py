"""Processes that stop in their tracks for longer than their leases, and go on as if nothing had been."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.e2e.harness import eventually
from tests.e2e.services import Service
from tests.faults.cluster import FaultCluster
from tests.faults.convergence import converge
from tests.faults.load import assert_kept

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_node_paused_for_longer_than_its_lease(cluster: FaultCluster, tmp_path: Path) -> None:
    source = random.Random(201)
    name = source.choice(sorted(cluster.nodes))
    with cluster.manager() as manager, cluster.load(tmp_path, seed=201) as load:
        load.await_writes(source.randrange(2, 5))
        cluster.nodes[name].pause()
        eventually(
            lambda: not {node.node_id: node.up for node in manager.nodes()}[name],
            "its lease ends",
            within_s=120,
        )
        load.await_writes(5)
        cluster.nodes[name].resume()
        load.await_writes(3)
        load.close()
        converge(manager, nodes=len(cluster.nodes))
        assert_kept(manager, load)


def test_the_steward_paused_for_longer_than_its_lease(cluster: FaultCluster, tmp_path: Path) -> None:
    """The other coordinator has to take over, and the first must not go on as the steward that it was."""
    with cluster.manager() as manager, cluster.load(tmp_path, seed=202) as load:
        eventually(lambda: bool(max(map(term, cluster.coordinators))), "there is a steward")
        steward = max(cluster.coordinators, key=term)
        former_term = term(steward)
        load.await_writes(2)
        steward.pause()
        eventually(lambda: max(map(term, cluster.coordinators)) > former_term, "another steward", within_s=120)
        # A call that hangs on it is given up after `RPC_TIMEOUT_S` at the earliest, and need not be here.
        steward.resume()
        load.await_writes(3)
        load.close()
        converge(manager, nodes=len(cluster.nodes))
        assert_kept(manager, load)
    assert max(cluster.coordinators, key=term) is not steward


def term(coordinator: Service) -> int:
    """Return the newest stewardship that a coordinator's log tells of; 0 for none."""
    said = (json.loads(line) for line in coordinator.log.read_text().splitlines() if line.startswith("{"))
    return max((event["term"] for event in said if event.get("event") == "steward"), default=0)
