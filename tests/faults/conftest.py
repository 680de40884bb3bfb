"""The cluster that most faults share: each test ends with it healed, and checks that it is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.cluster import FaultCluster, running


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultCluster]:
    with running(tmp_path_factory.mktemp("faults")) as cluster:
        yield cluster
