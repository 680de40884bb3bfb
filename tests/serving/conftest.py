"""One cluster in memory a test process, and in it a point of two volumes."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from holdfast import StateManager
from holdfast.testing import MemoryCluster
from tests.client.rig import BLOCK, Vm, noise

_numbers = itertools.count(1)

ROOT_BYTES = 24 * BLOCK + 1000
ROOT_PIECES = (
    (0, noise(5 * BLOCK, 1)),
    (9 * BLOCK + 100, noise(300, 2)),
    (16 * BLOCK, noise(ROOT_BYTES - 16 * BLOCK, 3)),
)
DATA_BYTES = 2 * BLOCK


@dataclass(frozen=True)
class ServedVm:
    """A VM with a snapshot of its volumes `root` and `data`."""

    vm: Vm
    point: str

    def content(self, volume: str = "root") -> bytes:
        """What a volume holds in the snapshot."""
        return self.vm.path(volume).read_bytes()


@pytest.fixture(scope="session")
def shared_cluster() -> Iterator[MemoryCluster]:
    """Three nodes that no test stops or damages."""
    with MemoryCluster() as cluster:
        yield cluster


@pytest.fixture
def cluster() -> Iterator[MemoryCluster]:
    """Three nodes of the test's own, to stop and to damage."""
    with MemoryCluster() as cluster:
        yield cluster


@pytest.fixture
def manager(shared_cluster: MemoryCluster) -> Iterator[StateManager]:
    """A manager of the shared cluster."""
    with shared_cluster.state_manager() as manager:
        yield manager


@pytest.fixture
def served(manager: StateManager, tmp_path: Path) -> ServedVm:
    """A VM of the shared cluster, and its snapshot."""
    vm = Vm(manager, f"served-{next(_numbers)}", tmp_path)
    vm.volume(ROOT_BYTES, ROOT_PIECES)
    vm.volume(DATA_BYTES, [(4096, b"data" * 1024)], name="data")
    vm.register("root", "data")
    return ServedVm(vm, vm.snapshot())


@pytest.fixture
def socket() -> Iterator[Path]:
    """A path for a socket: short, because the system takes 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hf-") as folder:
        yield Path(folder) / "nbd"
