"""Real networks that split: each service has a namespace of its own, and cables that are taken out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import pytest

from holdfast import StateManager
from tests.e2e.harness import eventually
from tests.faults.cluster import FaultCluster, running
from tests.faults.convergence import converge
from tests.faults.load import assert_kept
from tests.faults.network import Network

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

_COORDINATORS = ("coordinator-1", "coordinator-2")
_NODES = ("node-1", "node-2", "node-3", "node-4")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    with ExitStack() as stack:
        yield Network(tmp_path_factory.mktemp("network"), (*_COORDINATORS, *_NODES), stack)


@pytest.fixture(scope="module")
def split_cluster(tmp_path_factory: pytest.TempPathFactory, network: Network) -> Iterator[FaultCluster]:
    folder = tmp_path_factory.mktemp("splits")
    with running(folder, nodes=len(_NODES), coordinators=len(_COORDINATORS), members=1, place=network) as cluster:
        yield cluster


@pytest.fixture
def cluster(split_cluster: FaultCluster) -> Iterator[FaultCluster]:
    yield split_cluster
    split_cluster.clear()


def test_a_node_that_is_cut_off_for_longer_than_its_lease(
    cluster: FaultCluster, network: Network, tmp_path: Path
) -> None:
    name = random.Random(301).choice(_NODES)
    with cluster.manager() as manager, cluster.load(tmp_path, seed=301) as load:
        load.await_writes(3)
        with network.unplugged(name):
            eventually(lambda: not is_up(manager, name), f"{name} is down", within_s=120)
            load.await_writes(3)
        load.await_writes(3)
        load.close()
        converge(manager, nodes=len(_NODES))
        assert_kept(manager, load)


@pytest.mark.parametrize(("what", "seed"), [("coordinator", 302), ("half the nodes", 303), ("one way", 304)])
def test_splits_under_load(cluster: FaultCluster, network: Network, tmp_path: Path, what: str, seed: int) -> None:
    """Shorter ones: a coordinator without everything, too few nodes for some writes, nodes that are not heard."""
    with cluster.manager() as manager, cluster.load(tmp_path, seed=seed) as load:
        load.await_writes(3)
        with split(network, what, random.Random(seed)):
            if what == "half the nodes":
                eventually(lambda: bool(load.book.refusals), "writes that find no quorum are refused", within_s=120)
            else:
                load.await_writes(4)
        load.await_writes(3)
        load.close()
        converge(manager, nodes=len(_NODES))
        assert_kept(manager, load)


def split(network: Network, what: str, source: random.Random) -> AbstractContextManager[None]:
    if what == "coordinator":
        return network.unplugged(source.choice(_COORDINATORS))
    if what == "half the nodes":
        return network.unplugged(*source.sample(_NODES, 2))
    unheard, *others = source.sample(_NODES, len(_NODES))
    return network.unheard(unheard, *others)


def is_up(manager: StateManager, name: str) -> bool:
    return {node.node_id: node.up for node in manager.nodes()}[name]
