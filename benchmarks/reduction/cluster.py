"""A cluster for one row: real services on loopback, segment files on the disk, keys as ever; one copy of each block.

How many copies a cluster keeps changes no ratio, so one is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from benchmarks.measure import stored_bytes
from benchmarks.spans import digest
from holdfast.manager import StateManager
from holdfast.results import TransferStats
from holdfast.testing import MemoryCluster


class WrongBytes(RuntimeError):
    """What was read back is not what was stored: no reduction counts then."""


@contextmanager
def fresh_cluster(folder: Path) -> Iterator[StateManager]:
    """Run a cluster whose node keeps its segments in `folder`; yields a manager of it."""
    with MemoryCluster(nodes=1, replicas=1, data_dir=folder) as cluster:
        yield cluster.state_manager()


def last_stats(manager: StateManager) -> TransferStats:
    """What the call before this one moved."""
    transfer = manager.last_transfer
    if transfer is None:
        raise RuntimeError("nothing was stored")
    return transfer.stats


def allocated_bytes(manager: StateManager, point_id: str) -> int:
    """Plaintext of a point's blocks that are not zero."""
    volumes = manager.point(point_id).volumes
    return sum(min(volume.block_count * volume.block_bytes, volume.size_bytes) for volume in volumes)


def check_restored(manager: StateManager, points: tuple[str, str], images: Mapping[str, Path], target: Path) -> None:
    """Restore a snapshot, or a backup of its line, and compare its volumes with the images that they were.

    Raises:
        WrongBytes: a volume differs.
    """
    place = manager.restore_vm(*points, target=target)
    for name, image in images.items():
        if digest(place / f"{name}.raw") != digest(image):
            raise WrongBytes(f"volume {name} was not restored as it was saved")


def on_disk_bytes(folder: Path) -> int:
    """Bytes that a cluster's node occupies: segments, their headers, its index."""
    return stored_bytes(folder)
