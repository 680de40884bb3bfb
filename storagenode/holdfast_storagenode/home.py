"""Where a node lives: in a directory, or in memory for clusters that live as long as their process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from holdfast_proto.v1.cluster_pb2 import HeartbeatResponse
from holdfast_storagenode.datadir import DataDirectory, Identity
from holdfast_storagenode.healing.scrub_place import ScrubPlace
from holdfast_storagenode.memory import MemoryStore
from holdfast_storagenode.segments.engine import EngineOptions, SegmentStore
from holdfast_storagenode.segments.observer import StoreObserver
from holdfast_storagenode.segments.record import INCARNATION_BYTES
from holdfast_storagenode.store import BlockStore, PartitionOf


class NodeHome(Protocol):
    """What a node keeps over restarts. `identity` is its name and incarnation, `capacity_bytes` what it offers."""

    identity: Identity

    def load_cluster(self) -> HeartbeatResponse | None:
        """Return the coordinator's answer that was saved last, None if none was."""
        ...

    def save_cluster(self, known: HeartbeatResponse) -> None:
        """Save a coordinator's answer."""
        ...

    def load_scrub(self) -> ScrubPlace:
        """Return how far scrubbing came, as it was saved last; the beginning if it was not."""
        ...

    def save_scrub(self, place: ScrubPlace) -> None:
        """Save how far scrubbing came."""
        ...

    def capacity_bytes(self) -> int:
        """Return the bytes that the node offers, also while there is no store yet."""
        ...

    def open_store(self, partition_of: PartitionOf, observer: StoreObserver) -> BlockStore:
        """Open the store; called once the placement is known."""
        ...

    def close(self) -> None:
        """Let go of what is held between restarts."""
        ...


class DirectoryHome:
    """A node that lives in a data directory."""

    def __init__(self, directory: DataDirectory, options: EngineOptions) -> None:
        self.identity = directory.identity
        self._directory = directory
        self._options = options

    def load_cluster(self) -> HeartbeatResponse | None:
        """See `NodeHome`."""
        return self._directory.load_cluster()

    def save_cluster(self, known: HeartbeatResponse) -> None:
        """See `NodeHome`."""
        self._directory.save_cluster(known)

    def load_scrub(self) -> ScrubPlace:
        """See `NodeHome`."""
        return self._directory.load_scrub()

    def save_scrub(self, place: ScrubPlace) -> None:
        """See `NodeHome`."""
        self._directory.save_scrub(place)

    def capacity_bytes(self) -> int:
        """See `NodeHome`."""
        return SegmentStore.capacity_of(self._directory.path, self._options)

    def open_store(self, partition_of: PartitionOf, observer: StoreObserver) -> BlockStore:
        """See `NodeHome`.

        Raises:
            HoldfastError: INTERNAL if the disk cannot be read.
        """
        return SegmentStore.open(
            self._directory.path,
            incarnation=self.identity.incarnation,
            partition_of=partition_of,
            options=self._options,
            observer=observer,
        )

    def close(self) -> None:
        """See `NodeHome`."""
        self._directory.close()


class MemoryHome:
    """A node that lives in memory; blocks, identity and knowledge outlive a stop of the node, not the process."""

    def __init__(self, node_id: str, *, random_bytes: Callable[[int], bytes]) -> None:
        self.identity = Identity(node_id, random_bytes(INCARNATION_BYTES))
        self._known: HeartbeatResponse | None = None
        self._scrub = ScrubPlace()
        self._store: MemoryStore | None = None

    def load_cluster(self) -> HeartbeatResponse | None:
        """See `NodeHome`."""
        return self._known

    def save_cluster(self, known: HeartbeatResponse) -> None:
        """See `NodeHome`."""
        self._known = known

    def load_scrub(self) -> ScrubPlace:
        """See `NodeHome`."""
        return self._scrub

    def save_scrub(self, place: ScrubPlace) -> None:
        """See `NodeHome`."""
        self._scrub = place

    def capacity_bytes(self) -> int:
        """See `NodeHome`."""
        return MemoryStore(lambda _: 0).status().capacity_bytes

    def open_store(self, partition_of: PartitionOf, observer: StoreObserver) -> BlockStore:
        """See `NodeHome`."""
        if self._store is None:
            self._store = MemoryStore(partition_of)
        return self._store

    def close(self) -> None:
        """See `NodeHome`."""


def open_directory(
    path: Path, *, node_id: str | None, options: EngineOptions, random_bytes: Callable[[int], bytes]
) -> DirectoryHome:
    """Lock and open a data directory.

    Raises:
        HoldfastError: as `DataDirectory.open`.
    """
    return DirectoryHome(DataDirectory.open(path, node_id=node_id, random_bytes=random_bytes), options)
