"""One in-memory cluster a file of tests, and a manager and a VM for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import StateManager
from holdfast.testing import MemoryCluster
from tests.client.rig import Vm

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def shared_cluster() -> Iterator[MemoryCluster]:
    """Three nodes that no test stops or damages; a file's alone, since they keep in memory all that is ever stored."""
    with MemoryCluster() as cluster:
        yield cluster


@pytest.fixture
def manager(shared_cluster: MemoryCluster) -> Iterator[StateManager]:
    """A manager of the shared cluster."""
    with shared_cluster.state_manager() as manager:
        yield manager


@pytest.fixture
def cluster() -> Iterator[MemoryCluster]:
    """Three nodes of the test's own, to stop and to damage."""
    with MemoryCluster() as cluster:
        yield cluster


@pytest.fixture
def vm(manager: StateManager, tmp_path: Path) -> Vm:
    """A VM of the shared cluster with a name of its own; no volumes yet."""
    return Vm(manager, f"vm-{next(_numbers)}", tmp_path)
