"""The cluster that most faults share: each test ends with it healed, and checks that it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.cluster import FaultCluster, running


@pytest.fixture(scope="package")
def shared_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultCluster]:
    with running(tmp_path_factory.mktemp("faults")) as cluster:
        yield cluster


@pytest.fixture
def cluster(shared_cluster: FaultCluster) -> Iterator[FaultCluster]:
    """The shared cluster, whole again after the test, however that went, and without what it wrote."""
    yield shared_cluster
    shared_cluster.clear()
