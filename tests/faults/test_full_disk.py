"""A real disk that fills up: writes go on at quorum, what is refused is said plainly, and space comes back."""

from __future__ import annotations

import hashlib
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from holdfast import ErrorCode, HoldfastError, StateManager
from tests.e2e.harness import eventually
from tests.e2e.images import MIB
from tests.faults.cluster import FaultCluster, running
from tests.faults.convergence import converge

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

_SMALL_DISK_BYTES = 56 * MIB
_OBJECT_BYTES = 2 * MIB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of some MiB."""
    image, place = tmp_path / "disk.ext4", tmp_path / "cluster" / "node-3"
    place.mkdir(parents=True)
    with image.open("wb") as file:
        file.truncate(_SMALL_DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True)
    mount = ["mount", "-o", "loop", str(image), str(place)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    assert mounted.returncode == 0, f"file systems may not be mounted here: {mounted.stderr}"
    (place / "lost+found").rmdir()
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def cluster(tmp_path: Path, small_disk: Path) -> Iterator[FaultCluster]:
    """Three nodes, of which the third has the small disk, and the second is told to take little more."""
    options = {"node-3": ("--reserve", "6MiB"), "node-2": ("--capacity", "72MiB")}
    with running(small_disk.parent, nodes=3, coordinators=1, members=1, options=options) as cluster:
        yield cluster


def test_a_full_disk_refuses_writes_and_takes_them_again(cluster: FaultCluster) -> None:
    source = random.Random(601)
    kept: dict[str, str] = {}
    with cluster.manager() as manager:

        def write() -> None:
            data = source.randbytes(_OBJECT_BYTES)
            kept[manager.persist_application_data("task", data)] = hashlib.sha256(data).hexdigest()

        while not is_full(manager, "node-3"):
            write()
        for _ in range(3):
            write()
        assert manager.cluster_status().writable

        def write_until_refused() -> None:
            for _ in range(_SMALL_DISK_BYTES // _OBJECT_BYTES):
                write()

        with pytest.raises(HoldfastError) as refused:
            write_until_refused()
        assert refused.value.code is ErrorCode.DISK_FULL, refused.value
        assert "space" in refused.value.message
        assert_kept(manager, kept)

        for storage_id in source.sample(list(kept), len(kept) * 2 // 3):
            del kept[storage_id]
            manager.forget_application_data(storage_id)
        eventually(lambda: is_collected(manager), "garbage goes", within_s=120)
        eventually(lambda: not is_full(manager, "node-3"), "space comes back", within_s=120)
        converge(manager, nodes=3)
        write()
        converge(manager, nodes=3)
        for name in ("node-1", "node-2"):
            cluster.nodes[name].kill()
        with cluster.place.manager(cluster.address) as alone:
            # The node that was full has everything by itself.
            assert_kept(alone, kept)


def is_full(manager: StateManager, name: str) -> bool:
    return {node.node_id: node.full for node in manager.nodes()}[name]


def is_collected(manager: StateManager) -> bool:
    report = manager.collect()
    assert report.phase == "done", report
    return not (report.garbage_copies or report.young_copies)


def assert_kept(manager: StateManager, kept: dict[str, str]) -> None:
    for storage_id, content in kept.items():
        assert hashlib.sha256(manager.retrieve_application_data(storage_id)).hexdigest() == content
