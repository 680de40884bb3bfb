"""Nodes that leave and come under load: drained while another dies, lost with all that they had, replaced."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from holdfast import HoldfastError, StateManager
from tests.e2e.harness import eventually
from tests.faults.cluster import FaultCluster
from tests.faults.convergence import converge
from tests.faults.load import assert_kept

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def test_a_node_drained_while_another_dies(cluster: FaultCluster, tmp_path: Path) -> None:
    source = random.Random(901)
    drained, killed = source.sample(sorted(cluster.nodes), 2)
    with cluster.manager() as manager, cluster.load(tmp_path, seed=901) as load:
        load.await_writes(6)
        assert manager.set_node(drained, draining=True).applied
        cluster.nodes[killed].kill()
        load.await_writes(3)
        cluster.nodes[killed].start()
        load.await_writes(3)
        load.close()
        eventually(lambda: blocks_on(manager, drained) == 0, f"{drained} hands everything over", within_s=120)
        converge(manager, nodes=len(cluster.nodes))
        cluster.nodes[drained].kill()
        assert_kept(manager, load)
        cluster.nodes[drained].start()
        assert manager.set_node(drained, draining=False).applied
        converge(manager, nodes=len(cluster.nodes))


def test_a_node_that_died_for_long_is_left_out_and_replaced(cluster: FaultCluster, tmp_path: Path) -> None:
    source = random.Random(501)
    lost = source.choice(sorted(cluster.nodes))
    for coordinator in cluster.coordinators:
        cluster.restart_with(coordinator, HOLDFAST_OUT_AFTER="1")
    with cluster.manager() as manager, cluster.load(tmp_path, seed=501) as load:
        load.await_writes(6)
        cluster.lose_node(lost)
        # The steward leaves it out by itself, and the others make what it had anew.
        eventually(lambda: lost not in manager.layout().layouts[0].slots, f"{lost} is left out", within_s=120)
        load.await_writes(3)
        converge(manager, nodes=3)
        manager.remove_node(lost, lost=True)
        cluster.add_nodes([lost])
        apply_next_layout(manager, lost)
        load.await_writes(3)
        load.close()
        converge(manager, nodes=4)
        assert blocks_on(manager, lost) > 0
        assert_kept(manager, load)
    for coordinator in cluster.coordinators:
        cluster.restart_with(coordinator, HOLDFAST_OUT_AFTER="")


def test_an_index_that_is_gone_is_made_from_the_segments(cluster: FaultCluster, tmp_path: Path) -> None:
    source = random.Random(502)
    name = source.choice(sorted(cluster.nodes))
    with cluster.load(tmp_path, seed=502) as load:
        load.await_writes(6)
        cluster.nodes[name].kill()
        shutil.rmtree(cluster.directory(name) / "index")
        load.await_writes(2)
        cluster.nodes[name].start()
        load.await_writes(2)
    with cluster.manager() as manager:
        converge(manager, nodes=len(cluster.nodes))
        assert_kept(manager, load)
    assert (cluster.directory(name) / "index").is_dir()


def blocks_on(manager: StateManager, name: str) -> int:
    return {node.node_id: node.block_count for node in manager.nodes()}[name]


def apply_next_layout(manager: StateManager, joining: str) -> None:
    """Take a new node into the layout, as an operator does, once it has registered."""

    def applied() -> bool:
        try:
            planned = manager.plan_layout()
            if joining not in planned.layout.slots:
                return False
            manager.apply_layout(planned.previous_epoch)
        except HoldfastError as error:
            if not error.retryable:
                raise
            return False
        return True

    eventually(applied, f"{joining} is taken in")
